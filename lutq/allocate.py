"""Mixed precision: bits and group per layer under budgets of size and of time, chosen by what they do to the predictions.

Losses of the units (lutq/sensitivity.py) are taken to add up, as stored bits and the times of products (lutq/latency.py) do;
which choice to give to which unit is then a knapsack, solved exactly (lutq/knapsack.py). What an override says of a layer is not
up for choice. The journal keeps all that is measured, so an interrupted run makes the same choices.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lutq import latency, sensitivity
from lutq.blocks import Blocks, input_stages
from lutq.calib import Calibration
from lutq.calibrate import load_host
from lutq.config import LayerConfig, QuantConfig
from lutq.errors import LutqError
from lutq.journal import Journal
from lutq.knapsack import choose, total
from lutq.latency import Product, Times
from lutq.ops import working_backend
from lutq.unit import Unit, make_unit

TOKENS = 8192  # of the calibration text: a ranking needs fewer than a fit
BITS = (1, 2, 3, 4)


class BudgetError(LutqError):
    """A budget that no choice meets, found before anything is measured that is worth keeping."""


@torch.no_grad()
def allocate(
    path: Path,
    inside: dict[str, LayerConfig],
    outside: dict[str, Product],
    config: QuantConfig,
    calibration: Calibration,
    device: torch.device,
    journal: Journal,
) -> tuple[QuantConfig, dict[str, Any] | None]:
    """Choose bits and group of the Linear layers `inside` the blocks of the model in `path`; those `outside` count as they are.

    Returns the settings with an override for every unit in place of the budgets, and where time was one of these, what a
    checkpoint says about it. Raises LutqError, BudgetError for budgets out of reach.
    """
    walk = Blocks(load_host(path, device), device)
    hidden = walk.embed(calibration.windows[: max(1, TOKENS // calibration.windows.shape[1])])
    walk.model.to(device, torch.float32)
    units = list(units_of(walk, hidden, inside, config))
    units += [make_unit([name], [(N, K)], layer, [layer[:2]]) for name, (N, K, layer) in outside.items()]
    times = None
    if config.target_ms:
        times = latency.measure((p for unit in units for c in unit.choices for p in unit.products(c)), device, journal)
        units = [unit.timed(times) for unit in units]
    budgets = budgets_of(units, config)
    fallback = meet(units, budgets, config, times)
    units = sensitivity.measure(walk, hidden, units, fallback, config, journal)
    chosen = choose([[choice.loss for choice in unit.choices] for unit in units], tables(units, config), budgets)
    picked = [unit.choices[number] for unit, number in zip(units, chosen, strict=True)]
    overrides = dict(config.overrides)
    for unit, choice in zip(units, picked, strict=True):
        if unit.names[0] in inside:
            pattern = "^(" + "|".join(re.escape(name) for name in unit.names) + ")$"
            table = {"bits": choice.bits} | ({"group": choice.group} if config.groups else {})
            overrides[pattern] = overrides.pop(pattern, {}) | table
            print(f"{', '.join(unit.names)}  chosen: {choice.words()}", file=sys.stderr)
    record = times and latency.record(times, config.target_ms, sum(choice.ns for choice in picked))
    return dataclasses.replace(config, groups="", target_bpw=0.0, target_ms=0.0, overrides=overrides), record


def units_of(walk: Blocks, hidden: torch.Tensor, inside: dict[str, LayerConfig], config: QuantConfig) -> Iterator[Unit]:
    """The layers `inside` the blocks as units, in order of use: those with the same input that may be stored in the same ways."""
    joins = config.target_ms > 0 and working_backend("auto", walk.device) == "cuda"
    for i in range(len(walk)):
        for stage in input_stages(walk, i, hidden):
            names = [f"{walk.name(i)}.{name}" for name in stage]
            alike: dict[tuple[tuple[tuple[int, int], ...], int], list[str]] = {}
            for name in names:
                if name in inside:
                    alike.setdefault((pairs_of(name, inside[name], config), inside[name].scale_bits), []).append(name)
            for (pairs, _), members in alike.items():
                shapes = [tuple(walk.model.get_submodule(name).weight.shape) for name in members]
                yield make_unit(members, shapes, inside[members[0]], pairs, joins and members == names)


def pairs_of(name: str, layer: LayerConfig, config: QuantConfig) -> tuple[tuple[int, int], ...]:
    """(bits, group) that a layer may have: all that the settings allow, but for what an override decides."""
    decided = {key for pattern, table in config.overrides.items() if re.search(pattern, name) for key in table}
    bits = (layer.bits,) if "bits" in decided else BITS
    groups = (layer.group,) if "group" in decided or not config.groups else config.group_choices
    return tuple((b, g) for b in bits for g in groups)


def budgets_of(units: list[Unit], config: QuantConfig) -> list[int]:
    """Stored bits and nanoseconds of all units together, as far as the settings limit them."""
    size = int(config.target_bpw * sum(unit.weights for unit in units))
    ns = int(1e6 * config.target_ms + 1e-3)  # 0.0523 ms are 52300 ns, not 52299.999...
    return [size] * (config.target_bpw > 0) + [ns] * (config.target_ms > 0)


def tables(units: list[Unit], config: QuantConfig) -> list[list[list[int]]]:
    """For each budget, what it takes of it: a row per unit, an entry per choice."""
    rows = [[choice.costs(config) for choice in unit.choices] for unit in units]
    return [[[costs[n] for costs in row] for row in rows] for n in range(len(rows[0][0]))]


def meet(units: list[Unit], budgets: list[int], config: QuantConfig, times: Times | None) -> list[int]:
    """A choice for each unit that meets all budgets. Raises BudgetError, with the least that is possible, where there is none."""
    every, chosen = tables(units, config), []
    for n, budget in enumerate(budgets):
        chosen = choose(every[n], every[:n], budgets[:n])
        least = total(every[n], chosen)
        if least <= budget:
            continue
        if config.target_bpw and n == 0:
            bits = round_up(least / sum(unit.weights for unit in units), 3)
            raise BudgetError(f"target_bpw {config.target_bpw:g} is out of reach: the smallest choices need {bits:.3f}")
        within = f" of those within target_bpw {config.target_bpw:g}" if n else ""
        raise BudgetError(
            f"target_ms {config.target_ms:g} is out of reach: the fastest choices{within} need {round_up(least / 1e6, 4):.4f} "
            f"on {times.device} (backend {times.backend})"
        )
    return chosen


def round_up(value: float, digits: int) -> float:
    """The next number with so many decimals."""
    return math.ceil(value * 10**digits) / 10**digits
