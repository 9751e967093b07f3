"""Bits per layer: the integer programme against all possibilities, and budgets that hold in what is written."""

import itertools
import json

import numpy as np
import pytest

from lutq.allocate import CHOICES, Unit, allocate, choose
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.quantize import quantize_checkpoint
from lutq.report import bits_per_weight


@pytest.mark.parametrize("seed", range(8))
def test_choice_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    units = 5
    losses = [tuple(sorted(random.exponential(size=4), reverse=True)) for _ in range(units)]
    sizes = [tuple(int(n) * bits for bits in CHOICES) for n in random.integers(100, 1000, units)]
    budget = int(sum(size[0] for size in sizes) * random.uniform(1, 4.2))

    def total(table, choice):
        return sum(row[c] for row, c in zip(table, choice, strict=True))

    possible = [c for c in itertools.product(range(4), repeat=units) if total(sizes, c) <= budget]
    best = min(total(losses, c) for c in possible)
    chosen = choose(losses, sizes, budget)
    assert total(sizes, chosen) <= budget, f"{seed=}"
    assert total(losses, chosen) == pytest.approx(best, rel=1e-9), f"{seed=}"


def test_budget_out_of_reach():
    units = [Unit(("a",), 100, (150, 250, 350, 450), (4.0, 3.0, 2.0, 1.0))]
    with pytest.raises(LutqError, match=r"target_bpw 1\.4 is out of reach: groups of 128 need 1\.500"):
        allocate(units, QuantConfig(target_bpw=1.4))


@pytest.mark.parametrize(("family", "target"), [("opt", 3.2), ("llama", 4.0)])
def test_target_holds_in_the_checkpoint(tiny, tmp_path, family, target):
    config = QuantConfig(
        method="feedback", group=64, iterations=1, rounds=1, sweeps=1, calib_windows=4, calib_length=32, target_bpw=target
    )
    report = quantize_checkpoint(tiny(family), tmp_path / "out", config, device="cpu")
    used = bits_per_weight(report.layers)
    assert target - 0.5 < used <= target, f"{family=} {target=} {used=}"
    bits = {layer.name: layer.layer.bits for layer in report.layers}
    assert len(set(bits.values())) > 1, f"{family=} {bits=}"
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for block in ("layers.0.", "layers.1."):
            members = {b for name, b in bits.items() if block in name and name.endswith(fused)}
            assert len(members) <= 1, f"{family=} {fused=} {bits=}"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["settings"]
    assert settings["target_bpw"] == 0, "the settings of the checkpoint say what was chosen"
    again = QuantConfig(**{key: value for key, value in settings.items() if key != "calibration"})
    assert {name: again.layer(name).bits for name in bits} == bits
