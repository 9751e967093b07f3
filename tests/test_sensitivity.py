"""Which choices are tried, and their losses against the plain model with one unit quantized."""

import numpy as np
import pytest
import torch

from lutq import calib, sensitivity
from lutq.allocate import units_of
from lutq.blocks import Blocks
from lutq.calib import read_calibration
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.fit import fit
from lutq.hf import load
from lutq.journal import Journal, StaleRunError
from lutq.pack import dequantize
from lutq.sensitivity import worth_trying
from lutq.tokens import load_tokenizer

CONFIG = QuantConfig(iterations=1, target_bpw=3.0, groups="32,96")


@pytest.fixture(autouse=True)
def short_books(monkeypatch):
    text, source = calib.calibration_text("books")
    monkeypatch.setattr(calib, "calibration_text", lambda _: (text[:6000], source))


def start(folder, config):
    """A walk through the model, what enters its first block, the windows, the units and all layers."""
    walk = Blocks(load(folder, device="cpu", dtype="float32"), torch.device("cpu"))
    windows = read_calibration("books", load_tokenizer(folder), 2, 32, 0).windows
    hidden = walk.embed(windows)
    linears = {name: module for name, module in walk.model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {name: config.layer(name) for name in linears if name.startswith(walk.prefix)}
    return walk, hidden, windows, list(units_of(walk, hidden, layers, config))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_what_is_left_out_is_beaten_and_what_is_kept_is_not(dimensions):
    t = np.linspace(0, 1, 2001)[:, None]
    dropped = 0
    for seed in range(20):
        points = np.random.default_rng([seed, dimensions]).random((10, dimensions))
        points[7] = points[2]  # of two equals one is enough
        kept = worth_trying([tuple(point) for point in points])
        dropped += 10 - len(kept)
        for number, point in enumerate(points):
            others = [points[other] for other in kept if other != number]
            if not others:
                continue
            mixtures = np.concatenate([t * a + (1 - t) * b for a in others for b in others])
            lead = (mixtures - point).max(1).min()  # how far the best mixture is from beating the point
            if number in kept:
                assert lead > 0, f"{dimensions=} {seed=} {number=}"
            else:
                assert lead < 1e-3, f"{dimensions=} {seed=} {number=} {lead=}"
    assert dropped > 20, f"{dimensions=} {dropped=}"


def test_mixtures():
    assert worth_trying([(1.0, 4.0), (2.0, 2.1), (3.0, 0.0)]) == [0, 2], "half of each of the others costs 2 and loses 2"
    assert worth_trying([(1.0, 4.0), (2.0, 1.9), (3.0, 0.0)]) == [0, 1, 2]
    assert worth_trying([(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)]) == [0]
    assert worth_trying([(1.0, 1.0), (1.0, 1.0)]) == [1]


def divergence(logits, original):
    """In float64, by its definition: nats per token."""
    p, q = (values.double().flatten(0, -2).softmax(-1) for values in (original, logits))
    return (p * (p / q).log()).sum(1).mean().item()


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_losses_are_those_of_the_model_with_one_unit_quantized(tiny, tmp_path, family):
    walk, hidden, windows, units = start(tiny(family), CONFIG)
    journal = Journal(tmp_path, {}, "")
    before = {name: p.clone() for name, p in walk.model.named_parameters()}
    measured = sensitivity.measure(walk, hidden, units, [0] * len(units), CONFIG, journal)
    journal.close()
    assert all(torch.equal(p, before[name]) for name, p in walk.model.named_parameters()), "the model is as it was"
    assert [unit.names for unit in measured] == [unit.names for unit in units]
    model = load(tiny(family), device="cpu", dtype="float32")
    with torch.inference_mode():
        original = model(windows, use_cache=False).logits
    for unit in (measured[0], measured[-1]):
        assert {choice.bits for choice in unit.choices} == {1, 2, 3, 4}, f"{family=} {unit}"
        for choice in unit.choices:
            kept = {name: model.get_submodule(name).weight.data for name in unit.names}
            layer = unit.layer._replace(bits=choice.bits, group=choice.group)
            for name, W in kept.items():
                packed = fit(W, layer, CONFIG)
                model.get_submodule(name).weight.data = dequantize(*packed, layer.group, layer.grid, W.shape[1])
            with torch.inference_mode():
                wanted = divergence(model(windows, use_cache=False).logits, original)
            for name, W in kept.items():
                model.get_submodule(name).weight.data = W
            assert choice.loss == pytest.approx(wanted, rel=2e-3, abs=1e-6), f"{family=} {unit.names=} {choice=} {wanted=}"


def test_what_is_in_the_journal_is_not_measured_again(tiny, tmp_path, monkeypatch):
    walk, hidden, _, units = start(tiny("opt"), CONFIG)
    journal = Journal(tmp_path, {}, "start again")
    first = sensitivity.measure(walk, hidden, units, [0] * len(units), CONFIG, journal)
    journal.close()
    monkeypatch.delattr(sensitivity, "measure_unit")
    journal = Journal(tmp_path, {}, "start again")
    assert sensitivity.measure(walk, hidden, units, [0] * len(units), CONFIG, journal) == first
    walk.model.get_submodule(units[3].names[0]).weight.data[0, 0] += 1
    with pytest.raises(StaleRunError, match="the source changed since the unfinished run"):
        sensitivity.measure(walk, hidden, units, [0] * len(units), CONFIG, journal)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [("llama", "norm.weight", np.inf), ("llama", "norm.weight", 3e38), ("opt", "decoder.layers.1.fc2.bias", np.inf)],
)
def test_predictions_that_are_no_numbers_are_one_sentence(tiny, tmp_path, family, name, value):
    walk, hidden, _, units = start(tiny(family), CONFIG)
    walk.model.model.get_parameter(name).fill_(value)
    journal = Journal(tmp_path, {}, "")
    with pytest.raises(LutqError, match="the model's predictions are NaN or infinite on the calibration text: give an und"):
        sensitivity.measure(walk, hidden, units, [0] * len(units), CONFIG, journal)
    journal.close()
    assert not Journal(tmp_path, {}, "").records, "nothing that a later run would go on with"


def test_only_the_bits_differ_so_all_are_tried(tiny, tmp_path):
    config = QuantConfig(iterations=1, target_bpw=3.0, group=32)
    walk, hidden, _, units = start(tiny("opt"), config)
    journal = Journal(tmp_path, {}, "")
    for unit in sensitivity.measure(walk, hidden, units, [0] * len(units), config, journal):
        assert [choice[:2] for choice in unit.choices] == [(bits, 32) for bits in (1, 2, 3, 4)], f"{unit}"
        assert all(choice.loss > 0 for choice in unit.choices), f"{unit}"
    journal.close()
