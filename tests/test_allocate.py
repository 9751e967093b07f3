"""Bits and groups per layer: budgets that hold in what is written, overrides, budgets out of reach, and interruptions."""

import json
import math
import re

import pytest
from conftest import CPU_BACKEND, Crash
from safetensors.torch import load_file

from lutq import allocate, calib, latency, sensitivity
from lutq.config import LayerConfig, QuantConfig
from lutq.errors import LutqError
from lutq.info import describe
from lutq.latency import from_json
from lutq.pack import PARTS
from lutq.quantize import quantize_checkpoint
from lutq.report import bits_per_weight
from lutq.tokens import load_tokenizer

QUICK = {"iterations": 1, "calib_windows": 2, "calib_length": 32, "group": 64}


@pytest.fixture(autouse=True)
def short_books(monkeypatch):
    """The first pages only, which take 1/100 of the time to cut into tokens."""
    text, source = calib.calibration_text("books")
    monkeypatch.setattr(calib, "calibration_text", lambda _: (text[:6000], source))


def steady(product, *_):
    """A time in us that depends on the product alone, more for more bits and for more groups."""
    return product.N * product.K * (product.layer.bits + 20 / (product.layer.group or product.K)) / 1e3


@pytest.fixture
def clock(monkeypatch):
    """`steady` instead of a clock."""
    monkeypatch.setattr(latency, "time_plain", steady)


def run(folder, out, **settings):
    return quantize_checkpoint(folder, out, QuantConfig(**QUICK | settings), device="cpu")


def stored_bits(report):
    """Bits per weight of the quantized layers, counted in the file."""
    tensors = load_file(report.out / "model.safetensors")
    of_layer = {f"{layer.name}.{part}" for layer in report.layers for part in PARTS}
    stored = sum(8 * tensor.nbytes for name, tensor in tensors.items() if name in of_layer)
    return stored / sum(layer.N * layer.K for layer in report.layers)


def predicted_ms(report, record):
    """The sum of the times that a checkpoint records, over its layers."""
    ns = from_json(record).ns
    return sum(ns[latency.Product(layer.N, layer.K, layer.layer)] for layer in report.layers) / 1e6


def settings_of(report):
    return json.loads((report.out / "config.json").read_text())["quantization_config"]["settings"]


def check_units(report, about):
    """Raise unless q/k/v and gate/up have equal settings."""
    stored = {layer.name: layer.layer for layer in report.layers}
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for block in ("layers.0.", "layers.1."):
            members = {layer for name, layer in stored.items() if block in name and name.endswith(fused)}
            assert len(members) <= 1, f"{about} {fused=} {members=}"


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("opt", {"target_bpw": 3.2, "method": "feedback", "rounds": 1, "sweeps": 1}),
        ("llama", {"target_bpw": 4.0, "groups": "32,64,0"}),
        ("opt", {"target_bpw": 3.0, "groups": "32,96", "head_bits": 2}),
        ("qwen3", {"target_bpw": 2.5, "method": "rtn", "groups": "32,64"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(map(str, value.values())),
)
def test_size_holds_in_the_checkpoint(tiny, tmp_path, family, settings):
    report = run(tiny(family), tmp_path / "out", **settings)
    about, used, target = f"{family=} {settings=}", bits_per_weight(report.layers), settings["target_bpw"]
    assert stored_bits(report) == pytest.approx(used, rel=1e-12), about
    assert target - 0.5 < used <= target, f"{about} {used=}"
    stored = {layer.name: layer.layer for layer in report.layers}
    assert len({layer.bits for layer in stored.values()}) > 1, about
    allowed = {int(group) for group in settings.get("groups", "64").split(",")}
    assert {layer.group for name, layer in stored.items() if name != "lm_head"} <= allowed, f"{about} {stored=}"
    if "head_bits" in settings:
        assert stored["lm_head"][:2] == (2, 64), "what is outside the blocks counts and is not changed"
    check_units(report, about)
    saved = settings_of(report)
    assert (saved["target_bpw"], saved["groups"]) == (0, ""), "the settings of the checkpoint say what was chosen"
    calibration = calib.read_calibration("books", load_tokenizer(tiny(family)), 2, 32, 0)
    assert saved["calibration"] == calibration.record(), f"{about}: the text chose the bits"
    for words in (calibration.describe(), f" included, of {target:g} allowed;"):
        for text in (report.summary(), (report.out / "README.md").read_text()):
            assert words in text, f"{about} {text}"
    calibrated = settings.get("method") == "feedback"
    assert ("output error" in report.summary()) == calibrated, f"{about}: there is none where the text only chose bits"
    again = QuantConfig(**{key: value for key, value in saved.items() if key not in ("calibration", "latency")})
    assert {name: again.layer(name, name == "lm_head") for name in stored} == stored, about


@pytest.mark.parametrize(("family", "size"), [("opt", 0), ("llama", 3.5)])
def test_time_holds_in_the_checkpoint(tiny, tmp_path, clock, family, size):
    settings = {"groups": "32,64", "target_bpw": size, "head_bits": 1}
    with pytest.raises(LutqError, match=r"^target_ms 1e-05 is out of reach: the fastest choices") as caught:
        run(tiny(family), tmp_path / "out", target_ms=1e-5, **settings)
    assert ("within target_bpw 3.5" in str(caught.value)) == (size > 0), str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing was worth keeping"
    least = float(re.search(r"need ([\d.]+) on CPU", str(caught.value))[1])
    for factor in (1.0, 1.2):
        report = run(tiny(family), tmp_path / f"out-{factor}", target_ms=least * factor, **settings)
        about, saved = f"{family=} {size=} {factor=}", settings_of(report)
        record = saved["latency"]
        assert record["target_ms"] == least * factor, about
        assert record["predicted_ms"] <= least * factor, about
        assert record["predicted_ms"] == pytest.approx(predicted_ms(report, record), rel=1e-9), about
        assert record["predicted_ms"] > 0.97 * least * factor or factor > 1, about
        assert {name: saved[name] for name in ("target_bpw", "target_ms", "groups")} == {
            "target_bpw": 0,
            "target_ms": 0,
            "groups": "",
        }, about
        check_units(report, about)
        if size:
            assert stored_bits(report) <= size, about
        words = f"predicted {record['predicted_ms']:.4g} ms per token in the quantized layers, of {least * factor:g} allowed"
        for text in (report.summary(), describe(report.out, device="cpu"), (report.out / "README.md").read_text()):
            assert words in text, f"{about} {text}"


def test_more_time_is_used_for_less_loss(tiny, tmp_path, clock):
    """All that is allowed is 4 bits everywhere when there is time for it."""
    report = run(tiny("opt"), tmp_path / "out", target_ms=1e6)
    assert {layer.layer.bits for layer in report.layers} == {4}


def test_times_of_this_processor(tiny, tmp_path):
    report = run(tiny("opt"), tmp_path / "out", target_ms=1e6)
    record = settings_of(report)["latency"]
    assert record["backend"] == CPU_BACKEND
    assert record["device"].startswith("CPU, ")
    sizes = {(layer.N, layer.K) for layer in report.layers}
    assert {(product["n"], product["k"]) for product in record["products"]} == sizes
    assert len(record["products"]) == 4 * len(sizes), "each product at each number of bits, once"
    assert 0 < record["predicted_ms"] < 1e4


@pytest.mark.parametrize(
    ("settings", "bits", "group"),
    [
        ({"target_bpw": 1.2}, 1, 64),
        ({"target_bpw": 1.5, "groups": "32,64"}, 1, 64),
        ({"target_bpw": 4.0, "overrides": {"layers": {"bits": 4}}}, 4, 64),
        ({"target_bpw": 4.0, "overrides": {"layers": {"bits": 3, "group": 32}}}, 3, 32),
    ],
    ids=str,
)
def test_size_out_of_reach(tiny, tmp_path, monkeypatch, settings, bits, group):
    monkeypatch.delattr(sensitivity, "measure_unit")
    with pytest.raises(LutqError, match=r"^target_bpw [\d.]+ is out of reach: the smallest choices need [\d.]+$") as caught:
        run(tiny("llama"), tmp_path / "out", **settings)
    shapes = [(96, 96), (32, 96), (32, 96), (96, 96), (172, 96), (172, 96), (96, 172)]  # whole words, whole groups
    stored = sum(N * (bits * 32 * math.ceil(K / 32) + 16 * (bits + 1) * math.ceil(K / group)) for N, K in shapes)
    least = stored / sum(N * K for N, K in shapes)
    said = float(str(caught.value).split()[-1])
    assert least <= said < least + 0.001, f"{settings=} {said=} {least=}"
    assert not list(tmp_path.iterdir())


def test_overrides_are_not_up_for_choice(tiny, tmp_path):
    overrides = {
        "layers.0.*q_proj$": {"bits": 4},
        "layers.1.*(q|k|v)_proj$": {"group": 96},
        "layers.0.*fc1$": {"bits": 1, "group": 0},
        "layers.1.*fc2$": {"skip": True},
    }
    report = run(tiny("opt"), tmp_path / "out", target_bpw=3.0, groups="32,64", overrides=overrides)
    stored = {layer.name.removeprefix("model.decoder."): layer.layer for layer in report.layers}
    assert stored["layers.0.self_attn.q_proj"].bits == 4
    assert stored["layers.0.self_attn.k_proj"] == stored["layers.0.self_attn.v_proj"], "the others stay together"
    assert {stored[f"layers.1.self_attn.{name}_proj"].group for name in "qkv"} == {96}
    assert len({stored[f"layers.1.self_attn.{name}_proj"].bits for name in "qkv"}) == 1
    assert stored["layers.0.fc1"] == LayerConfig(1, 0)
    assert "layers.1.fc2" not in stored
    assert stored_bits(report) <= 3.0


def test_interrupted_anywhere_goes_on_with_the_same_choices(tiny, tmp_path, monkeypatch):
    """Times are others after each interruption; those of the first run count, and no sensitivity is measured twice."""
    settings = {"target_ms": 0.35, "groups": "32,64", "target_bpw": 3.3}
    measured, add, measure_unit = [], allocate.Journal.add, sensitivity.measure_unit
    monkeypatch.setattr(latency, "time_plain", steady)
    whole = run(tiny("opt"), tmp_path / "whole", **settings).out

    def note(walk, i, hidden, unit, *rest):
        measured.append(unit.names)
        return measure_unit(walk, i, hidden, unit, *rest)

    monkeypatch.setattr(sensitivity, "measure_unit", note)
    crashes, out = 0, None
    for number in range(60):
        added = 0

        def dying(self, record, limit=2 + number % 3):
            nonlocal added
            if added == limit:
                raise Crash
            added += 1
            add(self, record)

        with monkeypatch.context() as patch:
            patch.setattr("lutq.journal.Journal.add", dying)
            try:
                out = run(tiny("opt"), tmp_path / "out", **settings).out
                break
            except Crash:
                crashes += 1
                if crashes > 1:  # the times are on record by now
                    monkeypatch.setattr(latency, "time_plain", lambda *_: 1e9)
    assert crashes > 5, f"{crashes=}"
    assert len(measured) <= 8 + crashes, "at most what was not on record yet was measured again"
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in out.iterdir()}
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in names), f"{crashes=}"


def test_an_unfinished_run_of_another_budget_is_not_continued(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "measure_unit", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        run(tiny("opt"), tmp_path / "out", target_bpw=3.0)
    with pytest.raises(LutqError, match=r"unfinished run with other settings \(target_bpw: 3.0 -> 3.1\)"):
        run(tiny("opt"), tmp_path / "out", target_bpw=3.1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target-ms", "1e-7"], "target_ms 1e-07 is out of reach: the fastest choices need"),
        (["--target-bpw", "1.1", "--groups", "32,64"], "target_bpw 1.1 is out of reach: the smallest choices need"),
        (["--groups", "32,64"], "groups '32,64' are for target_bpw and target_ms"),
    ],
    ids=str,
)
def test_bad_budgets_are_one_sentence(tiny, tmp_path, lutq_command, flags, words):
    (tmp_path / "text.txt").write_text("Once upon a time there was a king. " * 200)
    calibration = ("--calib", "text.txt", "--calib-windows", 2, "--calib-length", 32, "--iterations", 1)
    result = lutq_command("quantize", tiny("opt"), *calibration, *flags, "--device", "cpu")
    assert result.returncode == 2, f"{flags=} {result}"
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lutq: "), f"{flags=} {result.stderr}"
    assert words in last, f"{flags=} {result.stderr}"
    assert not list(tmp_path.glob("lutq-out*")), f"{flags=}"


def test_command_says_what_was_chosen_and_predicted(tiny, tmp_path, lutq_command):
    (tmp_path / "text.txt").write_text("Once upon a time there was a king. " * 200)
    flags = ("--calib", "text.txt", "--calib-windows", 2, "--calib-length", 32, "--iterations", 1, "--group", 32)
    result = lutq_command("quantize", tiny("llama"), *flags, "--target-ms", 1000, "--groups", "32,64", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj  chosen: 4 bits, g " in result.stderr, result.stderr
    assert re.search(r"time of products +predicted [\d.]+ ms per token .* of 1000 allowed", result.stdout), result.stdout
    result = lutq_command("info")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"predicted [\d.]+ ms per token .* CPU, \d+ threads, backend {CPU_BACKEND}", result.stdout), result.stdout
