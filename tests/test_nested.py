"""Any-precision checkpoints: the fit against brute force, and every precision of a file against its own definition."""

import contextlib
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lutq
import lutq.hf
from lutq import bcq, calib, nested, refine, solve
from lutq.bcq import Bcq
from lutq.blocks import Blocks
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.hessian import accumulate, damp, inverse_factor
from lutq.info import describe
from lutq.linear import LutLinear
from lutq.pack import LOWER, PARTS, dequantize, from_tensors, to_tensors
from lutq.parallel.ranks import Ranks
from lutq.quantize import quantize_checkpoint
from lutq.store import Store
from lutq.tunable import run_at

SMALL = {"calib_windows": 6, "calib_length": 48, "rounds": 2, "sweeps": 2, "iterations": 2}


def problem(N, K, seed=0):
    random = torch.Generator().manual_seed(seed)
    W, x = torch.randn(N, K, generator=random), torch.randn(4 * K, K, generator=random)
    H = torch.zeros(K, K)
    accumulate(H, x @ torch.randn(K, K, generator=random))
    return W, damp(H / len(x), 0.01).H


def grid_of(fit, n):
    """Scales [b] and offset of row n in float64."""
    return fit.scales[:, n].double(), 0.0 if fit.offsets is None else fit.offsets[n].double()


def assert_stored(fit, lower, about):
    assert torch.equal(fit.planes[:-1], lower.planes), f"{about}: a code of the lower planes changed"
    for part in (fit.scales, fit.offsets):
        assert part is None or torch.equal(part, part.half().float()), f"{about}: not as stored"
    assert (fit.scales >= 0).all(), about


@pytest.mark.parametrize(("bits", "has_offsets"), [*itertools.product((1, 2, 3), (True, False))])
def test_a_plane_more_is_no_worse_and_its_bits_are_the_best(bits, has_offsets):
    w = torch.randn(12, 40, generator=torch.Generator().manual_seed(bits))
    about = f"{bits=} {has_offsets=}"
    lower = bcq.alternating(w, bits, has_offsets)
    errors = [(w - bcq.values(*lower)).square().sum(1)]
    for iterations in range(4):
        fit = nested.extend(w, lower, iterations)
        assert_stored(fit, lower, about)
        errors.append((w - bcq.values(*fit)).square().sum(1))
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-6)).all(), f"{about} {before=} {after=}"
    assert errors[-1].sum() < 0.6 * errors[0].sum(), about
    for n in range(len(w)):
        scales, offset = grid_of(fit, n)
        given = offset + sum(s * (2 * plane[n].double() - 1) for s, plane in zip(scales[:-1], lower.planes, strict=True))
        least = torch.minimum((w[n] - given - scales[-1]).abs(), (w[n] - given + scales[-1]).abs()).square().sum()
        assert torch.allclose(errors[-1][n].double(), least, rtol=1e-4), f"{about} {n=}: a bit is not the best one"


def test_exact_weights_are_found():
    """Weights that b + 1 planes can hold, of which b are given: the rest is found exactly."""
    random = torch.Generator().manual_seed(0)
    planes = torch.rand(3, 5, 64, generator=random) < 0.5
    scales = torch.tensor([1.0, 0.5, 0.125])[:, None].repeat(1, 5)
    fit = Bcq(planes, scales, torch.full((5,), 0.25))
    w = bcq.values(*fit)
    grown = nested.extend(w, Bcq(planes[:2], *bcq.storable(*bcq.refit(planes[:2], w, True))), 10)
    assert torch.allclose(bcq.values(*grown), w, atol=1e-3), f"{(bcq.values(*grown) - w).abs().max()=}"


def inputs_at(K, count):
    """An H for each of `count` precisions, all different."""
    return [problem(1, K, seed)[1] for seed in range(count)]


def levels_of(fit, n):
    """The 2^b levels of row n by code in float64."""
    scales, offset = grid_of(fit, n)
    return torch.stack([offset + (2 * bits.double() - 1) @ scales for bits in bcq.patterns(len(scales), scales.device)])


def values_of(code, levels):
    """The level at each precision of the code of all planes."""
    return [level[code * len(level) // len(levels[-1])] for level in levels]


def brute_feedback(w, Hs, levels):
    """One row quantized input by input at every precision in float64: the codes of least summed loss, if the later weights of
    each precision are then at their best by least squares.
    """
    qs, K = [[] for _ in Hs], len(w)
    w = w.double()
    for k in range(K):

        def cost(i, q, k=k):
            H, e = Hs[i].double(), w[: k + 1] - torch.stack([*qs[i], q])
            e = torch.cat([e, -torch.linalg.solve(H[k + 1 :, k + 1 :], H[k + 1 :, : k + 1] @ e)])
            return e @ H @ e

        costs = [sum(cost(i, q) for i, q in enumerate(values_of(code, levels))) for code in range(len(levels[-1]))]
        for q, value in zip(qs, values_of(int(torch.stack(costs).argmin()), levels), strict=True):
            q.append(value)
    return [torch.stack(q) for q in qs]


@pytest.mark.parametrize(("bits", "has_offsets"), [(range(2, 5), True), (range(1, 3), False)])
def test_feedback_is_brute_force_least_squares(bits, has_offsets):
    W, Hs = problem(5, 8)[0], inputs_at(8, len(bits))
    Us = [inverse_factor(H) for H in Hs]
    grids = nested.starts([W] * len(bits), [1 / U.diagonal() for U in Us], bits, has_offsets, 2)
    grids = [Bcq(fit.planes[:, :5], fit.scales[:, :5], fit.offsets[:5] if has_offsets else None) for fit in grids]
    fits, Es = nested.feedback([W] * len(bits), Us, grids)
    for n in range(5):
        expected = brute_feedback(W[n], Hs, [levels_of(fit, n) for fit in grids])
        for fit, q in zip(fits, expected, strict=True):
            assert torch.allclose(bcq.values(*fit)[n].double(), q, atol=1e-5), f"{bits=} {n=} {len(fit.planes)=}"
    for fit, E, H in zip(fits, Es, Hs, strict=True):
        assert torch.equal(fit.planes, fits[-1].planes[: len(fit.planes)]), f"{bits=}"
        assert torch.allclose(E.square().sum(1), solve.loss(W, bcq.values(*fit), H), rtol=1e-3), f"{bits=} {len(fit.planes)=}"


def test_coordinate_steps_are_exact():
    W, Hs = problem(4, 6)[0], inputs_at(6, 3)
    fits = nested.extend_layer(
        W, Bcq(*(part[..., None] if part.dim() < 3 else part for part in bcq.alternating(W, 2, True))), 4, 6
    )
    fits = [nested.group_of(fit, slice(0, 6), 0) for fit in fits]
    qs = [bcq.values(*fit) for fit in fits]
    moved, new = nested.move_codes(fits, qs, [(W - q) @ H for q, H in zip(qs, Hs, strict=True)], Hs)
    for n in range(4):
        levels, expected = [levels_of(fit, n) for fit in fits], [q[n].double().clone() for q in qs]
        for k in range(6):
            costs = []
            for code in range(16):
                tries = [q.clone() for q in expected]
                for q, value in zip(tries, values_of(code, levels), strict=True):
                    q[k] = value
                costs.append(sum((W[n].double() - q) @ H.double() @ (W[n].double() - q) for q, H in zip(tries, Hs, strict=True)))
            for q, value in zip(expected, values_of(int(torch.stack(costs).argmin()), levels), strict=True):
                q[k] = value
        for fit, q, exact in zip(moved, new, expected, strict=True):
            assert torch.allclose(q[n].double(), exact, atol=1e-5), f"{n=} {len(fit.planes)=}"
            assert torch.allclose(bcq.values(*fit)[n], q[n], atol=1e-6), f"{n=} {len(fit.planes)=}"


@pytest.mark.parametrize(
    ("K", "g", "has_offsets", "sweeps", "bits"),
    [(100, 32, True, 3, range(2, 5)), (96, 96, False, 2, range(1, 4)), (64, 32, True, 0, range(3, 5))],
)
def test_all_precisions_together_beat_plane_after_plane(K, g, has_offsets, sweeps, bits):
    about = f"{K=} {g=} {has_offsets=} {sweeps=} {bits=}"
    W, Hs = problem(16, K)[0], inputs_at(K, len(bits))

    def losses(fits):
        return [solve.loss(W, solve.dense(fit, g), H) for fit, H in zip(fits, Hs, strict=True)]

    plain = solve.solve(W.clone(), torch.eye(K), bits[0], g, has_offsets)
    plain = nested.extend_layer(W, plain, bits[-1], g)
    solved = nested.solve(W, Hs, bits, g, has_offsets, rounds=2, iterations=4)
    before = losses(solved)
    fits = nested.descend(W, Hs, solved, g, sweeps)
    after = losses(fits)
    assert (sum(after) <= sum(before) * (1 + 1e-5)).all(), f"{about} {before=} {after=}"
    for one, other in zip(nested.no_worse(W, Hs, fits, g), fits, strict=True):  # so it is at once, with these inputs
        assert_stored(one, one._replace(planes=fits[-1].planes[: len(one.planes) - 1]), about)
        assert torch.equal(one.planes, other.planes), about
    for ours, theirs in zip(after, losses(plain), strict=True):
        assert ours.sum() < theirs.sum(), f"{about} {ours.sum()=} {theirs.sum()=}"
    for lower, higher in itertools.pairwise(after):
        assert higher.sum() < 0.7 * lower.sum(), f"{about} {lower.sum()=} {higher.sum()=}"


def test_a_row_that_more_planes_made_worse_takes_the_grid_below():
    W, H = problem(6, 64)
    fits = nested.solve(W, [H, H], range(2, 4), 32, True)
    fits[1].scales[:, 2] *= 9
    again = nested.no_worse(W, [H, H], fits, 32)
    low, bad, good = (solve.dense(fit, 32) for fit in (fits[0], fits[1], again[1]))
    assert torch.equal(good[2], low[2])
    assert torch.equal(good[[0, 1, 3, 4, 5]], bad[[0, 1, 3, 4, 5]])


def test_weights_that_need_no_more_planes():
    """Constant and zero groups: the new plane gets the scale 0, and nothing is NaN."""
    W = torch.cat([torch.zeros(4, 32), torch.full((4, 32), 0.5)], 1)
    lower = solve.solve(W.clone(), torch.eye(64), 2, 32, True)
    for fits in (nested.extend_layer(W, lower, 4, 32), nested.solve(W, [torch.eye(64)] * 3, range(2, 5), 32, True)):
        for fit in fits:
            assert torch.allclose(solve.dense(fit, 32), W, atol=1e-4), f"{len(fit.planes)=} {solve.dense(fit, 32)=}"


FILES = {
    "alternating, 4 to 2 bits": ("opt", {"bits": 4, "lowest_bits": 2, "group": 64}),
    "feedback, 3 to 1 bits, no offsets": (
        "llama",
        {"bits": 3, "lowest_bits": 1, "group": 32, "offsets": False, "method": "feedback"} | SMALL,
    ),
    "greedy, head, skipped layer": (
        "llama-tied",
        {"bits": 3, "lowest_bits": 2, "group": 0, "method": "greedy", "head_bits": 3}
        | {"overrides": {"layers\\.1\\..*o_proj": {"skip": True}, "down_proj": {"group": 32}}},
    ),
}


@pytest.fixture(scope="module", params=FILES)
def file(request, tiny, tmp_path_factory):
    """(directory, report) of an any-precision checkpoint in several shards. Shared: do not write into it."""
    family, settings = FILES[request.param]
    out = tmp_path_factory.mktemp("nested") / "many"
    text, source = calib.calibration_text("books")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calib, "calibration_text", lambda _: (text[:6000], source))
        return out, quantize_checkpoint(tiny(family), out, QuantConfig(**settings), device="cpu", shard_bytes=100_000)


def read(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def logits(model):
    tokens = torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(tokens).logits


def precisions(report):
    return range(report.config.lowest_bits, report.config.bits + 1)


def test_every_precision_is_what_the_file_holds(file, tmp_path):
    out, report = file
    stored = read(out)
    for bits in precisions(report):
        model = lutq.load(out, device="cpu", bits=bits)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LutLinear)}
        assert set(layers) == {layer.name for layer in report.layers}, f"{bits=}"
        for name, module in layers.items():
            suffix = "" if bits == report.config.bits else f"_{bits}bit"
            about = f"{bits=} {name=}"
            assert module.codes.untyped_storage().nbytes() == 4 * module.codes.numel(), f"{about}: more than its planes are kept"
            assert torch.equal(module.codes, stored[f"{name}.codes"][:bits]), about
            assert torch.equal(module.scales, stored[f"{name}.scales{suffix}"]), about
            assert module.layer.bits == bits, about
            if module.offsets is not None:
                assert torch.equal(module.offsets, stored[f"{name}.offsets{suffix}"]), about
        again = tmp_path / f"{bits}"
        model.save_pretrained(again)
        assert not [key for key in read(again) if key.rpartition(".")[2] in LOWER], f"{bits=}: not an ordinary checkpoint"
        config = json.loads((again / "config.json").read_text())["quantization_config"]
        assert "lowest_bits" not in config, f"{bits=}"
        assert {fields["bits"] for fields in config["modules"].values()} == {bits}, f"{bits=}"
        assert torch.equal(logits(lutq.load(again, device="cpu")), logits(model)), f"{bits=}"
        assert model.generation_config.to_dict() == lutq.load(out, device="cpu").generation_config.to_dict(), f"{bits=}"


def test_the_highest_is_the_default(file):
    out, report = file
    expected = logits(lutq.load(out, device="cpu", bits=report.config.bits))
    assert torch.equal(logits(lutq.load(out, device="cpu")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()), expected)


def test_more_bits_are_nearer_to_the_weights(file, tiny):
    out, report = file
    stored = read(out)
    original = lutq.load(tiny(report.source), device="cpu")
    for layer in report.layers:
        parts = {part: stored[f"{layer.name}.{part}"] for part in PARTS if f"{layer.name}.{part}" in stored}
        nested_form, W = from_tensors(parts), original.get_submodule(layer.name).weight
        assert to_tensors(nested_form).keys() == parts.keys(), layer.name
        errors = []
        for bits in precisions(report):
            values = dequantize(*nested_form.at(bits), layer.layer.group, "bcq", layer.K)
            errors.append((values - W).square().sum().item())
        if report.config.method != "feedback":  # that one counts errors of the outputs
            assert all(after < before for before, after in itertools.pairwise(errors)), f"{layer.name=} {errors=}"
        assert errors[-1] == pytest.approx(layer.error, rel=1e-4), f"{layer.name=}"


def nbytes(tensors):
    """Bytes of tensors, tied ones once."""
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in tensors if tensor.numel()}.values())


def test_everything_stored_and_loaded_is_counted(file):
    out, report = file
    names, weights = {layer.name for layer in report.layers}, sum(layer.N * layer.K for layer in report.layers)
    parts = [f"{name}.{part}" for name in names for part in PARTS]
    stored = 8 * sum(tensor.nbytes for key, tensor in read(out).items() if key in parts) / weights
    described, card = describe(out, "cpu"), (out / "README.md").read_text()
    assert f"{stored:.3f} bits per weight in" in described, f"{stored=} {described}"
    assert f"with {stored:.3f} bits per weight" in report.summary(), f"{stored=} {report.summary()}"
    layers = lutq.hf.check_checkpoint(out).layers()
    for bits in precisions(report):
        model = lutq.load(out, device="cpu", bits=bits)
        loaded = 8 * nbytes(t for name in names for t in model.get_submodule(name).buffers()) / weights
        for text in (report.summary(), described, card):
            line = next(line for line in text.splitlines() if "with --bits at load" in line)
            assert f"{loaded:.3f}" in line, f"{bits=} {loaded=} {line}"
        counted = lutq.hf.model_bytes(out, torch.float32, layers, None if bits == report.config.bits else bits)
        assert counted == nbytes(model.state_dict().values()), f"{bits=} {counted=}"


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("sound") / "opt"
    quantize_checkpoint(tiny("opt"), out, QuantConfig(bits=3, lowest_bits=2, group=64, iterations=1), device="cpu")
    return out


def test_what_a_file_does_not_serve(sound, tiny, tmp_path, monkeypatch):
    with pytest.raises(LutqError, match="serves 2 and 3 bits and --bits asks for 4: give --bits 2 or 3"):
        lutq.load(sound, device="cpu", bits=4)
    quantize_checkpoint(tiny("opt"), tmp_path / "two", QuantConfig(bits=2, method="greedy"), device="cpu")
    assert lutq.load(tmp_path / "two", device="cpu", bits=2) is not None
    with pytest.raises(LutqError, match="serves 2 bits and --bits asks for 3: leave it out"):
        lutq.load(tmp_path / "two", device="cpu", bits=3)
    mixed = QuantConfig(bits=2, method="greedy", overrides={"fc1": {"bits": 3}})
    quantize_checkpoint(tiny("opt"), tmp_path / "mixed", mixed, device="cpu")
    with pytest.raises(LutqError, match="layers of different bits and --bits asks for 2: leave it out"):
        lutq.load(tmp_path / "mixed", device="cpu", bits=2)
    with pytest.raises(LutqError, match=r"precisions of a lutq checkpoint .* is none: leave it out"):
        lutq.load(tiny("opt"), device="cpu", bits=2)
    monkeypatch.setattr(lutq.hf, "current", lambda: Ranks(0, 2))
    with pytest.raises(LutqError, match="each of several processes loads its part: leave out --bits"):
        lutq.load(sound, device="cpu", bits=2)


def test_commands_take_a_precision(sound, lutq_command, tmp_path):
    (tmp_path / "text.txt").write_text("The old man walked out of the wood. " * 60)
    results = []
    for bits in ("2", "3", None):
        flags = [] if bits is None else ["--bits", bits]
        done = lutq_command("eval-ppl", "text.txt", "--model", sound, "--json", "ppl.json", *flags)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / "ppl.json").read_text())[0]["perplexity"])
    assert results[0] != results[1] == results[2], f"{results=}"
    done = lutq_command("generate", "The", "--model", sound, "--bits", "2", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    done = lutq_command("generate", "The", "--model", sound, "--bits", "1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "serves 2 and 3 bits" in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, c: t.pop("model.decoder.layers.0.fc1.scales_2bit"), "fc1.scales_2bit .*missing"),
        (lambda t, c: t.update({"model.decoder.layers.0.fc1.offsets_2bit": torch.zeros(3).half()}), "fc1.offsets_2bit"),
        (lambda t, c: c.pop("lowest_bits"), "_2bit is not a tensor"),
        (lambda t, c: c.update(lowest_bits=3), "lowest_bits is 3"),
        (lambda t, c: c.update(lowest_bits="2"), "lowest_bits is '2'"),
    ],
    ids=["missing", "wrong shape", "not said", "too high", "no number"],
)
def test_damaged_files_are_refused(sound, tmp_path, damage, message):
    tensors, config = read(sound), json.loads((sound / "config.json").read_text())
    damage(tensors, config["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (lambda: lutq.load(tmp_path, device="cpu", bits=2), lambda: AutoModelForCausalLM.from_pretrained(tmp_path)):
        with pytest.raises(LutqError, match=message):
            load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lowest_bits": 4}, "lowest_bits must be at least 1 and less than bits"),
        ({"lowest_bits": -1}, "lowest_bits must be"),
        ({"method": "rtn"}, "method is 'rtn'"),
        ({"distill": 1, "flips": True}, "flips learns codes, which the precisions of lowest_bits share"),
        ({"target_bpw": 3.0}, "needs 4 bits in every layer: leave out target_bpw"),
        ({"target_ms": 3.0}, "needs 4 bits in every layer: leave out target_ms"),
        ({"head_bits": 3}, "needs 4 bits in every layer"),
        ({"overrides": {"fc1": {"bits": 3}}}, "needs 4 bits in every layer"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(LutqError, match=message):
        QuantConfig(**{"bits": 4, "lowest_bits": 2} | settings)


TUNED = {"bits": 3, "lowest_bits": 1, "group": 32} | SMALL | {"rounds": 1, "sweeps": 1}


@pytest.fixture
def short_books(monkeypatch):
    text, source = calib.calibration_text("books")
    monkeypatch.setattr(calib, "calibration_text", lambda _: (text[:6000], source))


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("opt", {"distill": 2}),
        ("llama", {"method": "feedback", "rounds": 0, "refine": 1, "distill": 1, "offsets": False}),
        ("opt", {"refine": 1, "scaling": True}),
    ],
)
def test_every_precision_is_tuned_and_stored(tiny, tmp_path, monkeypatch, short_books, family, more):
    about, walks, start = f"{family=} {more=}", [], Blocks.__init__

    def keep(self, *arguments):
        walks.append(self)
        start(self, *arguments)

    monkeypatch.setattr(Blocks, "__init__", keep)
    report = quantize_checkpoint(tiny(family), tmp_path / "out", QuantConfig(**TUNED | more), device="cpu")
    distilled = report.calibration.distilled
    assert list(distilled) == ([1, 2, 3] if "distill" in more else []), about
    for bits in (1, 2, 3):
        run_at(walks[0].model, bits)
        model = lutq.load(tmp_path / "out", device="cpu", bits=bits, dtype="float32")
        one, other = logits(model), logits(walks[0].model)
        assert torch.allclose(one, other, atol=2e-2 * other.abs().max().item()), f"{about} {bits=} {(one - other).abs().max()=}"
    for key, tensor in read(tmp_path / "out").items():
        if ".scales" in key:
            assert (tensor >= 0).all(), f"{about} {key}"
    if distilled:
        for bits, (before, after) in distilled.items():
            assert after < before, f"{about} {bits=} {before=} {after=}: nothing was learned"
            assert f"{before:.4f} -> {after:.4f} at {bits} bits" in report.summary(), f"{about} {report.summary()}"


def test_tuning_leaves_what_precisions_share(tiny, tmp_path, short_books):
    settings = TUNED | {"overrides": {"layers\\.0\\.": {"skip": True}}}  # a block without anything to tune
    quantize_checkpoint(tiny("opt"), tmp_path / "plain", QuantConfig(**settings), device="cpu")
    quantize_checkpoint(tiny("opt"), tmp_path / "tuned", QuantConfig(**settings | {"refine": 1, "distill": 1}), device="cpu")
    plain, tuned = read(tmp_path / "plain"), read(tmp_path / "tuned")
    assert plain.keys() == tuned.keys()
    for key, tensor in plain.items():
        same, is_grid = torch.equal(tensor, tuned[key]), key.rpartition(".")[2].startswith(("scales", "offsets"))
        assert same != is_grid, f"{key}: {same=}"


def test_worse_tuning_is_thrown_away_at_every_precision(tiny, tmp_path, monkeypatch, short_books):
    quantize_checkpoint(tiny("llama"), tmp_path / "plain", QuantConfig(**TUNED), device="cpu")
    monkeypatch.setattr(refine, "rate_of", lambda p, rate: 100.0)
    quantize_checkpoint(tiny("llama"), tmp_path / "tuned", QuantConfig(**TUNED | {"refine": 1, "distill": 1}), device="cpu")
    one, other = read(tmp_path / "plain"), read(tmp_path / "tuned")
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("more", [{"method": "feedback", "lowest_bits": 2, "rounds": 0}, {"refine": 1, "distill": 2}])
def test_an_interrupted_run_goes_on_bit_for_bit(tiny, tmp_path, short_books, more):
    """The run dies after every block and every pass of every precision."""
    config = QuantConfig(**TUNED | more)
    quantize_checkpoint(tiny("opt"), tmp_path / "whole", config, device="cpu")
    finish, save, done = Store.finish_block, Store.save, []

    def stop_after_block(self, *arguments):
        finish(self, *arguments)
        raise KeyboardInterrupt

    def stop_after_pass(self, name, state):
        save(self, name, state)
        if name.startswith("distill"):
            done.append(name)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "finish_block", stop_after_block)
        patch.setattr(Store, "save", stop_after_pass)
        for _ in range(20):
            with contextlib.suppress(KeyboardInterrupt):
                quantize_checkpoint(tiny("opt"), tmp_path / "parts", config, device="cpu")
                break
    assert done == [f"distill-{bits}" for bits in config.precisions for _ in range(config.distill)]
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole), f"{more=}: an interrupted run ends in other bits"
