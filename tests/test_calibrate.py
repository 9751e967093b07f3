"""Calibrated runs from checkpoint to checkpoint: every family, every stage, and an interruption anywhere."""

import itertools
import json
import shutil

import pytest
import torch
from conftest import Crash
from safetensors.torch import load_file, save_file

import lutq
from lutq import calib, calibrate, refine, store
from lutq.blocks import Blocks, input_stages
from lutq.calib import read_calibration
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.fit import solve_layer
from lutq.hf import load
from lutq.pack import dequantize
from lutq.quantize import quantize_checkpoint
from lutq.store import Store
from lutq.tokens import load_tokenizer

SMALL = {"bits": 2, "group": 32, "method": "feedback", "calib_windows": 6, "calib_length": 48, "rounds": 2, "sweeps": 2}
SMALL |= {"iterations": 2}
STAGES = {
    "solve": {},
    "solve, no offsets, 3 bits": {"bits": 3, "offsets": False},
    "solve, refine": {"refine": 2},
    "solve, distill": {"distill": 2},
    "solve, distill with flips": {"refine": 1, "distill": 1, "flips": True},
    "all": {
        "refine": 1,
        "distill": 1,
        "overrides": {"layers\\.0\\..*[qk]_proj$": {"skip": True}, "(fc2|down_proj)$": {"bits": 4, "group": 0}},
    },
    "weighted by the end loss": {"end_loss": True, "refine": 1},
    "scales in 8 bits": {"refine": 1, "scale_bits": 8},
    "scales in 8 bits, distill with flips": {"distill": 1, "flips": True, "scale_bits": 8, "offsets": False},
    "corrected, distill with flips": {"distill": 1, "flips": True, "outliers": 2.0, "low_rank": 2},
    "alternating, distill": {"method": "alternating", "distill": 1, "head_bits": 4},
}

OTHERS = ("opt-postnorm", "llama-tied", "qwen2", "qwen3", "mistral")
CASES = [*itertools.product(("opt", "llama"), STAGES), *((family, "all") for family in OTHERS)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def short_books(monkeypatch):
    """The first pages only, which take 1/100 of the time to cut into tokens."""
    text, source = calib.calibration_text("books")
    monkeypatch.setattr(calib, "calibration_text", lambda _: (text[:6000], source))


def windows(folder):
    return read_calibration("books", load_tokenizer(folder), 6, 48, 0).windows


@pytest.mark.parametrize(("family", "stages"), CASES)
def test_what_is_written_is_what_was_tuned(tiny, family, stages, tmp_path, monkeypatch):
    walks = []
    start = Blocks.__init__

    def keep(self, *arguments):
        walks.append(self)
        start(self, *arguments)

    monkeypatch.setattr(Blocks, "__init__", keep)
    config = QuantConfig(**SMALL | STAGES[stages])
    report = quantize_checkpoint(tiny(family), tmp_path / "out", config, device="cpu", dtype="float32")
    model = load(tmp_path / "out", device="cpu", dtype="float32")
    about = f"{family=} {stages=}"
    walk = walks[-1]  # end_loss has one of its own before
    for block in walk.blocks:
        block.to("cpu")
    tokens = windows(tiny(family))[:2]
    if config.head_bits == 16:
        with torch.inference_mode():
            expected, got = (m(tokens, use_cache=False).logits for m in (walk.model, model))
        assert torch.allclose(got, expected, atol=1e-3 * expected.std().item()), f"{about} {(got - expected).abs().max()=}"
    quantized = {layer.name for layer in report.layers}
    assert all(torch.isfinite(p).all() for p in model.parameters()), about
    assert report.calibration.after <= report.calibration.before, f"{about} {report.calibration=}"
    if config.method == "feedback":
        assert report.calibration.after < 0.9 * report.calibration.before, f"{about} {report.calibration=}"
    if config.distill:
        before, after = report.calibration.distilled[config.bits]
        assert after <= before, f"{about} {report.calibration=}"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["settings"]
    assert settings.pop("calibration")["windows"] == 6, about
    assert settings == config.to_dict(), about
    assert quantized, about
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], f"{about}: something was left behind"
    assert not (tmp_path / "out" / "calibration").exists(), about


def test_inputs_shared(tiny):
    for family, expected in (
        ("opt", [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]]),
        (
            "llama",
            [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        ),
    ):
        walk = Blocks(load(tiny(family), device="cpu", dtype="float32"), torch.device("cpu"))
        hidden = walk.embed(windows(tiny(family)))
        assert [sorted(names) for names in input_stages(walk, 0, hidden)] == [sorted(names) for names in expected], family


def test_blocks_are_the_model(tiny, family):
    model, tokens = load(tiny(family), device="cpu", dtype="float32"), windows(tiny(family))
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
    walk = Blocks(model, torch.device("cpu"))
    hidden = walk.embed(tokens)
    for i, block in enumerate(walk.blocks):
        hidden = walk.through(block, i, hidden)
    got = walk.logits(hidden, {})
    assert torch.allclose(got, expected, atol=1e-4), f"{family=} {(got - expected).abs().max()=}"


@pytest.mark.parametrize(
    ("family", "more", "apart"),
    [
        ("opt", {"end_loss": True}, 0),
        ("llama", {"flips": True, "scale_bits": 8, "calib": "own"}, 60),
        ("opt", {"flips": True, "scale_bits": 8, "outliers": 2.0, "low_rank": 2}, 0),
        ("opt", {"distill": 0}, 60),
        ("llama", {"distill": 0, "refine": 0}, 0),
    ],
)
def test_interrupted_anywhere_goes_on_bit_for_bit(tiny, family, more, apart, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "APART", apart)  # hidden states are kept after every block, or never
    config = QuantConfig(**SMALL | {"refine": 1, "distill": 2} | more)
    quantize_checkpoint(tiny(family), tmp_path / "whole", config, device="cpu")
    whole = contents(tmp_path / "whole")
    done = 0
    for number in range(100):  # the run dies after `number` more states are in place than the run before
        saved = 0
        save = Store.save

        def dying(self, name, state, save=save, limit=1 + number % 2):
            nonlocal saved
            if saved == limit:
                raise Crash
            saved += 1
            save(self, name, state)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "save", dying)
            try:
                quantize_checkpoint(tiny(family), tmp_path / "out", config, device="cpu")
                break
            except Crash:
                done += 1
    assert done >= (3 if config.distill else 1), f"{family=} {more=} {done=}"
    assert contents(tmp_path / "out") == whole, f"{family=} {more=} {done=}"


def test_changed_source_is_noticed(tiny, tmp_path):
    config = QuantConfig(**SMALL)
    shutil.copytree(tiny("llama"), tmp_path / "model")
    solve_layers = calibrate.solve_layers

    def dying(*arguments):
        if (tmp_path / "out.partial" / "calibration" / "block-0").exists():
            raise Crash
        return solve_layers(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "solve_layers", dying)
        with pytest.raises(Crash):
            quantize_checkpoint(tmp_path / "model", tmp_path / "out", config, device="cpu")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1e-3
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LutqError, match="the source changed since the unfinished run"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", config, device="cpu")
    with pytest.raises(LutqError, match="calib_windows: 6 -> 5"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", QuantConfig(**SMALL | {"calib_windows": 5}), device="cpu")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", config, device="cpu", overwrite=True)


@pytest.mark.parametrize("method", ["feedback", "alternating"])
def test_no_layer_is_worse_than_its_plain_fit(method):
    random = torch.Generator().manual_seed(0)
    W, x = torch.randn(24, 96, generator=random), torch.randn(300, 96, generator=random) @ torch.randn(96, 96, generator=random)
    H = x.T @ x / 300
    for bits, group, offsets in ((1, 32, True), (2, 64, False), (3, 0, True), (4, 96, True)):
        config = QuantConfig(bits=bits, group=group, method=method, offsets=offsets)
        layer = config.layer("fc1")
        packed, before, after = solve_layer(W, H, layer, config)
        e = (W - dequantize(*packed, group, "bcq", 96)).double()
        exact = ((e @ H.double() * e).sum() / (W.double() @ H.double() * W.double()).sum()).sqrt().item()
        assert after == pytest.approx(exact, rel=1e-3), f"{method=} {bits=} {group=} {after=} {exact=}"
        assert after <= before, f"{method=} {bits=} {group=}"


def test_worse_tuning_is_thrown_away(tiny, tmp_path, monkeypatch):
    # a tuner whose every step does harm leaves the checkpoint that no tuning would have made
    monkeypatch.setattr(refine, "rate_of", lambda p, rate: 100.0)
    quantize_checkpoint(tiny("opt"), tmp_path / "tuned", QuantConfig(**SMALL | {"refine": 1, "distill": 1}), device="cpu")
    quantize_checkpoint(tiny("opt"), tmp_path / "plain", QuantConfig(**SMALL), device="cpu")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "plain"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--calib", "nothing.txt"], "unknown calibration text"),
        (["--calib", "empty.txt"], "empty.txt is empty"),
        (["--calib", "short.txt"], "less than one window"),
        (["--calib", "latin.txt"], "not UTF-8"),
        (["--calib-length", "4000"], "takes 128 tokens at most"),
        (["--calib-windows", "0"], "calib_windows must be 1 or more"),
        (["--method", "rtn", "--distill", "1"], "distill tunes BCQ grids"),
    ],
    ids=str,
)
def test_bad_calibration_is_one_sentence(tiny, tmp_path, lutq_command, flags, words):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Once upon a time")
    (tmp_path / "latin.txt").write_bytes("Café".encode("latin-1"))
    result = lutq_command("quantize", tiny("opt"), "--method", "feedback", *flags, "--device", "cpu")
    assert result.returncode == 2, f"{flags=} {result}"
    assert words in result.stderr, f"{flags=} {result.stderr}"
    assert result.stderr.startswith("lutq: "), f"{flags=} {result.stderr}"
    assert result.stderr.count("\n") == 1, f"{flags=} {result.stderr}"
    assert not (tmp_path / "lutq-out.partial").exists(), f"{flags=}"


def test_nan_activations_are_one_sentence(tiny, tmp_path):
    shutil.copytree(tiny("llama"), tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.input_layernorm.weight"][:] = 3e38
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LutqError, match="are NaN or infinite on the calibration text"):
        quantize_checkpoint(tmp_path / "model", tmp_path / "out", QuantConfig(**SMALL), device="cpu", dtype="float32")


def test_summary_says_what_calibration_did(tiny, tmp_path, lutq_command):
    flags = ("--bits", 2, "--group", 32, "--method", "feedback", "--calib-windows", 6, "--calib-length", 48, "--distill", 1)
    result = lutq_command("quantize", tiny("llama"), *flags, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    for words in ("calibration text  6 windows of 48 tokens", "output error", "divergence"):
        assert words in result.stdout, result.stdout
    for layer in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        assert f"{layer}  output error 0." in result.stderr, result.stderr
    assert lutq.load(tmp_path / "lutq-out", device="cpu") is not None
