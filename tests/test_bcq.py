"""Binary-coding fits against closed forms, brute force, LAPACK in float64, and each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutq import bcq
from lutq.bcq import alternating, fine_grid, greedy, greedy_grid, nearest, quantile_grid, refit, solve
from lutq.config import METHODS, STARTS, QuantConfig
from lutq.fit import fit
from lutq.pack import dequantize

quick = settings(deadline=None, max_examples=60)
BITS = st.integers(1, 4)
SEEDS = st.integers(0, 2**32 - 1)

# a few rows of a few weights, which hypothesis can shrink to a readable example; magnitudes from fp16's subnormals up
small_groups = (
    st.integers(1, 6)
    .flatmap(lambda g: st.lists(st.lists(st.floats(-1024, 1024, width=32), min_size=g, max_size=g), min_size=1, max_size=4))
    .map(torch.tensor)
)


def gaussian(R, g, seed):
    return torch.randn(R, g, generator=torch.Generator().manual_seed(seed))


def values(fitted):
    """The stored weights in float64, from planes, scales and offsets alone."""
    w = ((2 * fitted.planes.double() - 1) * fitted.scales.double()[:, :, None]).sum(0)
    return w if fitted.offsets is None else w + fitted.offsets.double()[:, None]


def distance(w, fitted):
    """Euclidean distance of every group from its stored weights, float64 [R]."""
    return (w.double() - values(fitted)).square().sum(1).sqrt()


def rounding(w, fitted):
    """What fp32 can add to `distance`: each weight is a sum of at most 5 terms, and so is each level it is judged by."""
    largest = fitted.scales.sum(0).double() + (0 if fitted.offsets is None else fitted.offsets.abs().double())
    return 2.0**-21 * largest * w.shape[1] ** 0.5


def check_storable(fitted, about):
    assert (fitted.scales >= 0).all(), f"{about} {fitted.scales=}"
    assert (fitted.scales[:-1] >= fitted.scales[1:]).all(), f"{about} {fitted.scales=}"
    for name in ("scales", "offsets"):
        numbers = getattr(fitted, name)
        if numbers is not None:
            assert torch.isfinite(numbers).all(), f"{about} {name}={numbers}"
            assert torch.equal(numbers, numbers.half().float()), f"{about} {name}={numbers}"


def fits(w, bits, has_offsets):
    """Greedy and every kind of alternating fit, by name."""
    found = {"greedy": greedy(w, bits, has_offsets)}
    for start in STARTS:
        found[f"alternating {start=}"] = alternating(w, bits, has_offsets, start)
    return found


@quick
@given(R=st.integers(1, 5), log_g=st.integers(0, 7), seed=SEEDS)
def test_one_bit_is_the_closed_form(R, log_g, seed):
    g = 2**log_g
    w = (gaussian(R, g, seed) * 64).round() / 64  # sums of these are exact in fp32, so the mean is rounded once, to fp16
    scale = w.double().abs().mean(1).half().float()
    for name, fitted in (("greedy", greedy(w, 1, False)), ("alternating", alternating(w, 1, False, "greedy", iterations=0))):
        assert torch.equal(fitted.scales[0], scale), f"{name} {R=} {g=} {seed=} {fitted.scales=} {scale=}"
        assert torch.equal(fitted.planes[0], w >= 0), f"{name} {R=} {g=} {seed=}"
        assert fitted.offsets is None, f"{name} {R=} {g=} {seed=}"


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("iterations", [0, 15])
def test_sign_of_zero_is_plus_one(start, iterations):
    w = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    for fitted in (greedy(w, 1, False), alternating(w, 1, False, start, iterations=iterations)):
        assert fitted.planes[0].tolist() == [[True, True, True, False]], f"{start=} {iterations=} {fitted=}"


def greedy_row(row, bits, has_offsets):
    """Greedy for one group as the paper has it, in float64: residual, its sign, its mean magnitude, and again."""
    offset = sum(row) / len(row) if has_offsets else 0.0
    residual, scales = [weight - offset for weight in row], []
    for _ in range(bits):
        scales.append(sum(map(abs, residual)) / len(residual))
        residual = [r - scales[-1] if r >= 0 else r + scales[-1] for r in residual]
    return scales, offset


@quick
@given(R=st.integers(1, 4), g=st.integers(1, 40), bits=BITS, has_offsets=st.booleans(), seed=SEEDS)
def test_greedy_is_the_loop_over_rows(R, g, bits, has_offsets, seed):
    w = gaussian(R, g, seed)
    fitted = greedy(w, bits, has_offsets)
    scales, offsets = greedy_grid(w, bits, has_offsets)
    for r, row in enumerate(w.tolist()):
        about = f"{R=} {g=} {bits=} {has_offsets=} {seed=} {r=}"
        row_scales, row_offset = greedy_row(row, bits, has_offsets)
        difference = (scales[:, r] - torch.tensor(row_scales)).abs().max()
        # fp32 may take the other sign only where the residual is 0 up to rounding, which changes the next scale by as little
        assert difference <= 1e-5, f"{about} {scales[:, r]=} {row_scales=}"
        if has_offsets:
            assert abs(offsets[r] - row_offset) <= 1e-6, f"{about} {offsets[r]=} {row_offset=}"
            assert fitted.offsets[r] == offsets[r].half(), f"{about} {fitted.offsets[r]=} {offsets[r]=}"
        # the codes follow the scales as they are stored: fp16, largest first
        stored = sorted((scale.half().item() for scale in scales[:, r]), reverse=True)
        assert fitted.scales[:, r].tolist() == stored, f"{about} {fitted.scales[:, r]=} {stored=}"
        residual = w[r] - fitted.offsets[r] if has_offsets else w[r].clone()
        for i, scale in enumerate(stored):
            for k in range(g):
                plus = bool(residual[k] >= 0)
                assert fitted.planes[i, r, k] == plus, f"{about} {i=} {k=} {residual[k]=}"
                residual[k] += -scale if plus else scale


@quick
@given(w=small_groups, bits=BITS, has_offsets=st.booleans(), start=st.sampled_from(["best", "greedy"]))
def test_alternating_is_never_worse_than_greedy(w, bits, has_offsets, start):
    fitted, reference = alternating(w, bits, has_offsets, start), greedy(w, bits, has_offsets)
    excess = distance(w, fitted) - distance(w, reference) * (1 + 1e-6) - rounding(w, reference)
    assert excess.max() <= 0, f"{w=} {bits=} {has_offsets=} {start=} {excess=}"


@quick
@given(R=st.integers(1, 40), g=st.integers(1, 128), bits=BITS, has_offsets=st.booleans(), seed=SEEDS)
def test_alternating_is_never_worse_than_greedy_on_gaussian_weights(R, g, bits, has_offsets, seed):
    w = gaussian(R, g, seed)
    reference = greedy(w, bits, has_offsets)
    for start in ("best", "greedy"):
        fitted = alternating(w, bits, has_offsets, start)
        excess = distance(w, fitted) - distance(w, reference) * (1 + 1e-6) - rounding(w, reference)
        assert excess.max() <= 0, f"{R=} {g=} {bits=} {has_offsets=} {start=} {seed=} {excess.max()=}"


def matrix_error(W, **settings_):
    config = QuantConfig(**settings_)
    layer = config.layer("x")
    return (W - dequantize(*fit(W, layer, config), layer.group, layer.grid, W.shape[1])).double().square().sum().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_error_falls_with_bits(method, with_offsets, group):
    W = gaussian(8, 512, 0)
    extra = {"offsets": with_offsets, "symmetric": not with_offsets, "start": "best"}
    errors = [matrix_error(W, method=method, bits=bits, group=group, **extra) for bits in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True), f"{method=} {with_offsets=} {group=} {errors=}"


# not rtn: at 1 and 2 bits an asymmetric grid spends its levels on an integer zero point, which a smaller group may place worse
@pytest.mark.parametrize("method", ["greedy", "alternating"])
@pytest.mark.parametrize("with_offsets", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_falls_with_smaller_groups(method, with_offsets, bits):
    W = gaussian(8, 512, 0)
    extra = {"offsets": with_offsets, "symmetric": not with_offsets, "start": "best"}
    errors = [matrix_error(W, method=method, bits=bits, group=group, **extra) for group in (0, 256, 128, 64, 32)]
    assert errors == sorted(errors, reverse=True), f"{method=} {with_offsets=} {bits=} {errors=}"


@quick
@given(w=small_groups, bits=BITS, has_offsets=st.booleans())
def test_what_is_stored(w, bits, has_offsets):
    R, g = w.shape
    for name, fitted in fits(w, bits, has_offsets).items():
        about = f"{name} {w=} {bits=} {has_offsets=}"
        assert fitted.planes.shape == (bits, R, g), f"{about} {fitted.planes.shape=}"
        assert fitted.planes.dtype == torch.bool, f"{about} {fitted.planes.dtype=}"
        assert fitted.scales.shape == (bits, R), f"{about} {fitted.scales.shape=}"
        assert (fitted.offsets is not None) == has_offsets, about
        check_storable(fitted, about)


@quick
@given(R=st.integers(1, 4), g=st.integers(1, 40), bits=BITS, has_offsets=st.booleans(), seed=SEEDS)
def test_nearest_is_brute_force(R, g, bits, has_offsets, seed):
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(R, g, generator=random)
    # multiples of 2^-10 below 2: levels and their middles are exact in fp32, so there is no rounding to make allowance for
    scales = torch.randint(0, 2048, (bits, R), generator=random).sort(dim=0, descending=True).values / 1024
    offsets = torch.randint(-2048, 2048, (R,), generator=random) / 1024 if has_offsets else None
    w[:, 0] = scales.sum(0)  # a level, and with these a middle
    planes, found = nearest(w, scales, offsets)
    for r in range(R):
        levels = []
        for number in range(2**bits):
            pattern = [(number >> i) & 1 for i in range(bits)]
            level = sum((2 * s - 1) * scale for s, scale in zip(pattern, scales[:, r].tolist(), strict=True))
            levels.append(level + (offsets[r].item() if has_offsets else 0.0))
        for k in range(g):
            about = f"{R=} {g=} {bits=} {has_offsets=} {seed=} {r=} {k=}"
            terms = [scale if s else -scale for s, scale in zip(planes[:, r, k], scales[:, r].tolist(), strict=True)]
            chosen = sum(terms) + (offsets[r].item() if has_offsets else 0.0)
            assert found[r, k].item() == chosen, f"{about} {found[r, k]=} {chosen=}"
            least = min(abs(w[r, k].item() - level) for level in levels)
            assert abs(w[r, k].item() - chosen) == least, f"{about} {w[r, k]=} {chosen=} {levels=}"


def test_nearest_takes_the_upper_level_in_the_middle():
    w = torch.tensor([[-1.0, 0.0, 1.0]])  # middles of the levels -1.5, -0.5, 0.5, 1.5
    _, found = nearest(w, torch.tensor([[1.0], [0.5]]), None)
    assert found.tolist() == [[-0.5, 0.5, 1.5]], f"{found=}"


def design(planes, has_offsets):
    """Float64 [R, g, b (+1)]: what scales and offsets are multiplied with."""
    columns = (2 * planes.double() - 1).permute(1, 2, 0)
    return torch.cat([columns, torch.ones_like(columns[..., :1])], 2) if has_offsets else columns


@quick
@given(R=st.integers(1, 20), g=st.sampled_from([32, 64, 100, 128]), bits=BITS, has_offsets=st.booleans(), seed=SEEDS)
def test_refit_is_least_squares(R, g, bits, has_offsets, seed):
    w = gaussian(R, g, seed)
    planes = greedy(w, bits, has_offsets).planes
    scales, offsets = refit(planes, w, has_offsets)
    assert scales.shape == (bits, R), f"{R=} {g=} {bits=} {has_offsets=} {scales.shape=}"
    found = torch.cat([scales, offsets[None]]).T if has_offsets else scales.T
    matrix = design(planes, has_offsets)
    expected = torch.linalg.lstsq(matrix, w.double()[:, :, None]).solution[:, :, 0]
    # the ridge of 1e-6 and fp32 move the solution by as much as the system is ill-conditioned
    allowed = 4e-6 * torch.linalg.cond(matrix).square() * expected.abs().amax(1)
    excess = ((found - expected).abs().amax(1) - allowed).max()
    assert excess <= 0, f"{R=} {g=} {bits=} {has_offsets=} {seed=} {excess=}"


@quick
@given(w=small_groups, bits=BITS, has_offsets=st.booleans(), start=st.sampled_from(STARTS))
def test_refit_never_hurts(w, bits, has_offsets, start):
    before = alternating(w, bits, has_offsets, start, iterations=0)
    scales, offsets = refit(before.planes, w, has_offsets)
    after = before._replace(scales=scales, offsets=offsets)
    # The ridge minimizes error + 1e-6 g c^2 instead of the error (c: scales and offset), hence the first allowance. The
    # second is fp32: normal equations from sums of g terms, each up to the size of the group's largest weight.
    g = w.shape[1]
    c2 = before.scales.double().square().sum(0) + (before.offsets.double().square() if has_offsets else 0)
    allowed = 1e-6 * g * c2 + 1e-6 * w.double().square().sum(1)
    excess = distance(w, after).square() - distance(w, before).square() - allowed
    assert excess.max() <= 0, f"{w=} {bits=} {has_offsets=} {start=} {excess=}"


@pytest.mark.parametrize("has_offsets", [False, True])
def test_refit_shares_the_scale_of_equal_planes(has_offsets):
    w = gaussian(5, 64, 0)
    plane = w >= 0
    alone, _ = refit(plane[None], w, has_offsets)
    shared, _ = refit(torch.stack([plane, plane]), w, has_offsets)
    assert torch.allclose(shared.sum(0), alone[0], rtol=1e-5), f"{has_offsets=} {shared=} {alone=}"
    # who gets how much is decided by a ridge that is only 16 times fp32's rounding, so the halves are roughly equal
    assert torch.allclose(shared, alone / 2, rtol=0.1), f"{has_offsets=} {shared=} {alone=}"


@quick
@given(R=st.integers(1, 20), n=st.integers(1, 5), seed=SEEDS)
def test_solve_is_solve(R, n, seed):
    random = torch.Generator().manual_seed(seed)
    factor = torch.randn(R, n, 32, generator=random)
    gram, target = factor @ factor.transpose(1, 2), torch.randn(R, n, generator=random)
    expected = torch.linalg.solve(gram.double(), target.double())
    allowed = 4e-6 * torch.linalg.cond(gram.double()) * expected.abs().amax(1)  # of which the ridge is 1e-6
    excess = ((solve(gram, target) - expected).abs().amax(1) - allowed).max()
    assert excess <= 0, f"{R=} {n=} {seed=} {excess=}"


def test_solve_of_a_zero_system_is_zero():
    for n in range(1, 6):
        assert not solve(torch.zeros(2, n, n), torch.zeros(2, n)).any(), f"{n=}"


DEGENERATE = {
    "all zeros": torch.zeros(1, 128),
    "one weight is not zero": torch.eye(1, 128),
    "all equal": torch.full((1, 128), 0.3),
    "all equal and negative": torch.full((1, 128), -0.3),
    "one outlier": torch.cat([gaussian(1, 127, 0), torch.tensor([[1e4]])], 1),
    "one negative outlier": torch.cat([gaussian(1, 127, 0), torch.tensor([[-1e4]])], 1),
    "two values": torch.tensor([[0.25, -0.75]]).repeat(1, 64),
    "tiny": gaussian(1, 128, 0) * 1e-7,
    "tinier than fp16": gaussian(1, 128, 0) * 1e-12,
    "huge": gaussian(1, 128, 0).clamp(-3, 3) * 2e4,
    "huge and equal": torch.full((1, 128), 6e4),
    "huge of both signs": torch.tensor([[6e4, -6e4]]).repeat(1, 64),
    "one weight": torch.tensor([[0.3]]),
    "one huge weight": torch.tensor([[-6e4]]),
    "one zero weight": torch.tensor([[0.0]]),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_degenerate_groups(name, bits, has_offsets):
    w = DEGENERATE[name]
    for kind, fitted in fits(w, bits, has_offsets).items():
        about = f"{name} {kind} {bits=} {has_offsets=}"
        check_storable(fitted, about)
        error, norm = distance(w, fitted).item(), w.double().norm().item()
        # a grid of zeros would be as far away as `norm`; below fp16's range every level is 0 or has an error of half a step
        assert error <= norm * (1 + 1e-6) + 2.0**-25 * w.shape[1] ** 0.5, f"{about} {error=} {norm=} {fitted=}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_zeros_stay_zeros(bits, has_offsets):
    for kind, fitted in fits(torch.zeros(3, 64), bits, has_offsets).items():
        # a symmetric grid has no level 0, and its smallest step in fp16 is 2^-24: refitting brings it to 0
        assert not values(fitted).any(), f"{kind} {bits=} {has_offsets=} {fitted=}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [0.3, -0.3, 1.0, 6e4, -6e4])
@pytest.mark.parametrize("g", [1, 128])
def test_equal_weights_are_kept_to_fp16(bits, number, g):
    w = torch.full((1, g), number)
    for has_offsets in (False, True):
        for start in ("best", "greedy"):  # uniform grids need not have a level there, and the refit of one need not find it
            error = (values(alternating(w, bits, has_offsets, start)) - w).abs().max().item()
            assert error <= abs(number) * 2.0**-11, f"{bits=} {number=} {g=} {has_offsets=} {start=} {error=}"


@quick
@given(w=small_groups, bits=BITS, has_offsets=st.booleans())
def test_no_iterations_give_the_best_start(w, bits, has_offsets):
    by_start = {start: alternating(w, bits, has_offsets, start, iterations=0) for start in ("best", *bcq.BEST)}
    best = by_start.pop("best")
    least = torch.stack([distance(w, fitted) for fitted in by_start.values()]).amin(0)
    excess = (distance(w, best) - least * (1 + 1e-6) - rounding(w, best)).max()
    assert excess <= 0, f"{w=} {bits=} {has_offsets=} {excess=}"
    for r in range(len(w)):  # and it is one of them, not a mixture
        equal = [
            torch.equal(best.planes[:, r], fitted.planes[:, r]) and torch.equal(best.scales[:, r], fitted.scales[:, r])
            for fitted in by_start.values()
        ]
        assert any(equal), f"{w=} {bits=} {has_offsets=} {r=} {best=} {by_start=}"


@pytest.mark.parametrize(("bits", "levels"), [(1, [1.5, 5.5]), (2, [1.5, 5.5, 9.5, 13.5])])
def test_fine_grid_is_the_middle_of_the_finer_levels(bits, levels):
    w = torch.arange(2.0 ** (bits + 2))[None]  # lies on the grid of 2 bits more: 4 of its levels for each of these
    scales, offsets = fine_grid(w, bits, True)
    _, found = nearest(w, scales, offsets)
    assert found[0].tolist() == [level for level in levels for _ in range(4)], f"{bits=} {scales=} {offsets=} {found=}"


def test_fine_grid_without_offsets_is_symmetric():
    w = torch.tensor([[-7.5, -0.5, 0.5, 7.5]])  # odd multiples of half a step of 1, in 4 bits
    scales, offsets = fine_grid(w, 2, False)
    assert offsets is None
    assert scales[:, 0].tolist() == [4, 2], f"{scales=}"


@pytest.mark.parametrize(
    ("w", "bits", "scales", "offset"),
    [
        ([10.0, 0.0, 11.0, 1.0], 1, [5.0], 5.5),  # two halves, whose means are 0.5 and 10.5
        ([10.0, 0.0, 11.0, 1.0], 2, [5.0, 0.5], 5.5),  # every weight a level
        ([0.0, 6.0, 3.0], 1, [2.25], 3.75),  # the lower half of three weights is two of them
    ],
)
def test_quantile_grid_cuts_into_equal_parts(w, bits, scales, offset):
    found, offsets = quantile_grid(torch.tensor([w]), bits, True)
    assert torch.allclose(found[:, 0], torch.tensor(scales), rtol=1e-4), f"{w=} {bits=} {found=}"
    assert torch.allclose(offsets, torch.tensor([offset]), rtol=1e-4), f"{w=} {bits=} {offsets=}"


@quick
@given(R=st.integers(1, 4), g=st.integers(1, 40), bits=BITS, has_offsets=st.booleans(), seed=SEEDS)
def test_best_is_never_worse_for_one_start_more(R, g, bits, has_offsets, seed):
    w = gaussian(R, g, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bcq, "BEST", ("greedy", "uniform"))
        fewer = alternating(w, bits, has_offsets, "best")
        patch.setattr(bcq, "BEST", ("greedy", "uniform", "fine", "quantiles"))
        more = alternating(w, bits, has_offsets, "best")
    excess = (distance(w, more) - distance(w, fewer) * (1 + 1e-6) - rounding(w, more)).max()
    assert excess <= 0, f"{R=} {g=} {bits=} {has_offsets=} {seed=} {excess=}"


@settings(deadline=None, max_examples=25)
@given(R=st.integers(1, 8), g=st.integers(1, 64), bits=BITS, has_offsets=st.booleans(), start=st.sampled_from(STARTS), seed=SEEDS)
def test_more_iterations_are_never_worse(R, g, bits, has_offsets, start, seed):
    w = gaussian(R, g, seed)
    for tolerance in (0.0, 1e-3):
        before = None
        for iterations in (0, 1, 2, 4, 8, 15):
            fitted = alternating(w, bits, has_offsets, start, iterations=iterations, tolerance=tolerance)
            error = distance(w, fitted)
            about = f"{R=} {g=} {bits=} {has_offsets=} {start=} {seed=} {tolerance=} {iterations=}"
            if before is not None:
                excess = (error - before * (1 + 1e-6) - rounding(w, fitted)).max()
                assert excess <= 0, f"{about} {excess=}"
            before = error
