"""Uniform grids: what they promise, and that alternating from one never loses to it."""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import lutq.fit
from lutq import uniform
from lutq.bcq import alternating
from lutq.config import QuantConfig
from lutq.fit import fit
from lutq.pack import dequantize
from lutq.paths import ASSETS

quick = settings(deadline=None, max_examples=60)
BITS = st.integers(1, 4)
SEEDS = st.integers(0, 2**32 - 1)

# rows of a few weights that hypothesis can shrink, from fp16's subnormals to its largest number
any_group = (
    st.integers(1, 6)
    .flatmap(lambda g: st.lists(st.lists(st.floats(-6e4, 6e4, width=32), min_size=g, max_size=g), min_size=1, max_size=3))
    .map(torch.tensor)
)


@st.composite
def gaussian_group(draw):
    """Rows as models have them: bell-shaped, of any magnitude, sometimes off center."""
    random = torch.Generator().manual_seed(draw(SEEDS))
    w = torch.randn(draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 31, 128])), generator=random)
    return (w + draw(st.sampled_from([0.0, 0.5, 4.0]))) * 2.0 ** draw(st.integers(-24, 12))


groups = any_group | gaussian_group()


def values(found, bits):
    """The stored weights in float64, from u, scale and zero point alone."""
    center = (2**bits - 1) / 2 if found.zero_points is None else found.zero_points.double()[:, None]
    return found.scales.double()[:, None] * (found.u.double() - center)


def distance(w, stored):
    """Euclidean distance of every group from its stored weights, float64 [R]."""
    return (w.double() - stored).square().sum(1).sqrt()


@quick
@given(w=groups, bits=BITS, symmetric=st.booleans(), clip=st.booleans())
@example(w=torch.tensor([[6e4, -6e4]]), bits=1, symmetric=False, clip=False)  # a range above the largest fp16 number
def test_what_is_stored(w, bits, symmetric, clip):
    found = uniform.rtn(w, bits, symmetric, clip)
    about = f"{w=} {bits=} {symmetric=} {clip=} {found=}"
    assert found.u.shape == w.shape, about
    assert found.u.dtype == torch.uint8, about
    assert found.u.max() < 2**bits, about
    assert torch.isfinite(found.scales).all(), about
    assert (found.scales > 0).all(), about
    assert torch.equal(found.scales, found.scales.half().float()), about
    assert (found.zero_points is None) == symmetric, about
    if not symmetric:
        assert torch.equal(found.zero_points, found.zero_points.round()), about
        assert found.zero_points.min() >= 0, about
        assert found.zero_points.max() < 2**bits, about


@quick
@given(w=groups, bits=BITS, clip=st.booleans(), seed=SEEDS)
def test_asymmetric_grid_keeps_zeros(w, bits, clip, seed):
    zero = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    w = w.masked_fill(zero, 0.0)
    found = uniform.rtn(w, bits, symmetric=False, clip=clip)
    assert not values(found, bits)[zero].any(), f"{w=} {bits=} {clip=} {found=}"


@quick
@given(w=groups, bits=BITS, clip=st.booleans())
def test_symmetric_levels_are_odd_multiples_of_half_a_step(w, bits, clip):
    found = uniform.rtn(w, bits, symmetric=True, clip=clip)
    multiples = values(found, bits) / (found.scales.double()[:, None] / 2)
    assert (multiples.remainder(2) == 1).all(), f"{w=} {bits=} {clip=} {found=}"
    assert (multiples.abs() < 2**bits).all(), f"{w=} {bits=} {clip=} {found=}"


@quick
@given(w=groups, bits=BITS, symmetric=st.booleans(), clip=st.booleans())
def test_u_is_the_nearest_level(w, bits, symmetric, clip):
    found = uniform.rtn(w, bits, symmetric, clip)
    levels = found._replace(u=torch.arange(2**bits).expand(len(w), -1))
    least = (w.double()[:, :, None] - values(levels, bits)[:, None]).abs().amin(2)
    # fp32 rounds w/s + center, a number of the size of 2^b steps for every weight that is not clipped
    excess = ((w.double() - values(found, bits)).abs() - least - 2.0 ** (bits - 22) * found.scales[:, None]).max()
    assert excess <= 0, f"{w=} {bits=} {symmetric=} {clip=} {found=} {excess=}"


@quick
@given(w=groups, bits=BITS, symmetric=st.booleans())
def test_whole_range_is_within_half_a_step(w, bits, symmetric):
    found = uniform.rtn(w, bits, symmetric, clip=False)
    assume(found.scales.max() < 65504)  # where fp16 ends and the range does not
    # rounding s to fp16 shortens the range of 2^b - 1 steps; the integer zero point moves it by half a step at most
    shortened = (2**bits - 1) * (found.scales.double() * 2.0**-11).clamp(min=2.0**-25)
    excess = ((w.double() - values(found, bits)).abs() - ((0.5 + 1e-5) * found.scales + shortened)[:, None]).max()
    assert excess <= 0, f"{w=} {bits=} {symmetric=} {found=} {excess=}"


@quick
@given(w=groups, bits=BITS, symmetric=st.booleans())
def test_clip_search_is_never_worse(w, bits, symmetric):
    clipped = distance(w, values(uniform.rtn(w, bits, symmetric, clip=True), bits))
    whole = distance(w, values(uniform.rtn(w, bits, symmetric, clip=False), bits))
    excess = (clipped - whole * (1 + 1e-6)).max()  # which of two is less is decided by sums in fp32
    assert excess <= 0, f"{w=} {bits=} {symmetric=} {clipped=} {whole=}"


def test_clip_search_gains():
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for bits in (1, 2, 3):
        for symmetric in (False, True):
            clipped = distance(w, values(uniform.rtn(w, bits, symmetric, clip=True), bits)).sum()
            whole = distance(w, values(uniform.rtn(w, bits, symmetric, clip=False), bits)).sum()
            assert clipped < 0.95 * whole, f"{bits=} {symmetric=} {clipped=} {whole=}"


@quick
@given(w=groups, bits=BITS, symmetric=st.booleans(), clip=st.booleans())
def test_bcq_grid_has_the_same_levels(w, bits, symmetric, clip):
    found = uniform.rtn(w, bits, symmetric, clip)
    scales, offsets = uniform.bcq_grid(found, bits)
    assert scales.shape == (bits, len(w)), f"{w=} {bits=} {symmetric=} {clip=} {scales.shape=}"
    center = (2**bits - 1) / 2 if symmetric else found.zero_points
    for u in range(2**bits):
        level = offsets.clone()  # summed in fp32, as kernels do
        for i in range(bits):
            level += scales[i] if (u >> (bits - 1 - i)) & 1 else -scales[i]
        expected = found.scales * (u - center)
        assert torch.equal(level, expected), f"{w=} {bits=} {symmetric=} {clip=} {u=} {level=} {expected=}"


@settings(deadline=None, max_examples=100)
@given(
    w=groups,
    bits=BITS,
    has_offsets=st.booleans(),
    start=st.sampled_from(["range", "uniform", "best"]),
    iterations=st.sampled_from([0, 15]),
)
@example(w=torch.tensor([[3e-7, -1e-7, 0.0]]), bits=2, has_offsets=True, start="uniform", iterations=0)
def test_alternating_never_loses_to_rtn(w, bits, has_offsets, start, iterations):
    grid = uniform.rtn(w, bits, symmetric=not has_offsets, clip=start != "range")
    scales, offsets = uniform.bcq_grid(grid, bits)
    fitted = alternating(w, bits, has_offsets, start, iterations)
    stored = ((2 * fitted.planes.double() - 1) * fitted.scales.double()[:, :, None]).sum(0)
    if has_offsets:
        stored += fitted.offsets.double()[:, None]
    # What a BCQ checkpoint cannot hold of the uniform grid: the offset, which it rounds to fp16, and the last scale s/2
    # where that is an odd multiple of 2^-25, half of fp16's smallest number. Either moves every level by as much.
    lost = (scales - scales.half().float()).abs().double().sum(0)
    assert lost.max() <= 2.0**-25, f"{w=} {bits=} {scales=} {lost=}"
    assert (lost[grid.scales >= 2.0**-13] == 0).all(), f"{w=} {bits=} {scales=} {lost=}"
    if has_offsets:
        lost += (offsets - offsets.half().float()).abs().double()
    allowed = distance(w, values(grid, bits)) * (1 + 1e-6) + lost * w.shape[1] ** 0.5
    excess = (distance(w, stored) - allowed).max()
    assert excess <= 0, f"{w=} {bits=} {has_offsets=} {start=} {iterations=} {fitted=} {grid=} {excess=}"


def embedded_weights():
    """Name and fp32 weight of every Linear layer of the embedded model."""
    with safe_open(ASSETS / "opt-tiny" / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, a safetensors handle is not a dict
            if name.endswith(".weight") and "embed" not in name and "norm" not in name:
                yield name, file.get_tensor(name).float()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_alternating_beats_rtn_on_the_embedded_model(monkeypatch, bits, has_offsets):
    monkeypatch.setitem(lutq.fit.CHUNK, "cpu", 1 << 18)  # fits into a small cache: twice as fast
    ways = {"rtn": {"method": "rtn"}, "rtn over the whole range": {"method": "rtn", "clip": False}}
    ways |= {start: {"start": start} for start in ("range", "uniform", "best")}
    # one round instead of the usual 15: more rounds are never worse (tests/test_bcq.py)
    totals, layers = dict.fromkeys(ways, 0.0), 0
    for _, W in embedded_weights():
        layers += 1
        for way, extra in ways.items():
            config = QuantConfig(bits=bits, offsets=has_offsets, symmetric=not has_offsets, iterations=1, **extra)
            layer = config.layer("x")
            stored = dequantize(*fit(W, layer, config), layer.group, layer.grid, W.shape[1])
            totals[way] += (W - stored).double().square().sum().item()
    assert layers == 24, f"{layers=}"  # 4 blocks of q, k, v, out_proj, fc1 and fc2
    for start, grid in (("range", "rtn over the whole range"), ("uniform", "rtn"), ("best", "rtn")):
        assert totals[start] < totals[grid], f"{bits=} {has_offsets=} {start=} {totals=}"
