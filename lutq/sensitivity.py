"""How much the predictions of a model suffer when one part of it is stored with so many bits in such groups.

A unit is one Linear layer, or the layers that read the same input and run fused (q/k/v, gate/up), which get equal settings. Its
loss with some bits and group is the divergence of the next-token distribution from the original model's when this unit alone has
them. Where there are several groups to choose from, quick fits say first which choices are worth that: see `worth_trying`.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from lutq import solve
from lutq.blocks import Blocks, visit_inputs
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.fit import solve_layers
from lutq.hessian import accumulate, damp
from lutq.journal import Journal, fingerprint
from lutq.pack import weight
from lutq.refine import divergence
from lutq.runtime import progress_interval
from lutq.unit import Choice, Unit

BATCH = 2048  # tokens that go through the model at a time


def worth_trying(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Numbers of the points that no other point, and no mixture of two others, equals or beats in every coordinate.

    A mixture counts because there are many units: some with the one choice and some with the other cost as much and lose less.
    """
    kept = list(range(len(points)))
    for number in range(len(points)):
        others = [points[other] for other in kept if other != number]
        if any(beaten(points[number], a, b) for i, a in enumerate(others) for b in others[i:]):
            kept.remove(number)
    return kept


def beaten(point: tuple[float, ...], a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether some mixture t a + (1 - t) b, 0 <= t <= 1, is at most `point` in every coordinate."""
    low, high = 0.0, 1.0
    for p, x, y in zip(point, a, b, strict=True):
        if x == y:
            high = high if y <= p else -1.0
        elif x > y:
            high = min(high, (p - y) / (x - y))
        else:
            low = max(low, (p - y) / (x - y))
    return low <= high


@torch.no_grad()
def measure(
    walk: Blocks, hidden: torch.Tensor, units: list[Unit], keep: list[int], config: QuantConfig, journal: Journal
) -> list[Unit]:
    """The units with the losses of those choices that are worth trying; that of number `keep` always is.

    hidden: what enters the first block, [n, L, d]. What the journal has is not measured again. Raises StaleRunError where that
    was measured on other weights.
    """
    records, units = {record["unit"]: record for record in journal.records}, list(units)
    open_ = [number for number, unit in enumerate(units) if len(unit.choices) > 1]
    left = any(title(units[number]) not in records for number in open_)
    final = hidden
    for i, block in enumerate(walk.blocks):
        final = walk.through(block, i, final) if left else final
    with tqdm(total=len(open_), unit="unit", mininterval=progress_interval()) as bar:
        for i, block in enumerate(walk.blocks):
            for number in open_:
                unit = units[number]
                if not unit.names[0].startswith(f"{walk.name(i)}."):
                    continue
                weights = torch.cat([walk.model.get_submodule(name).weight.flatten() for name in unit.names])
                record = records.get(title(unit))
                if record:
                    journal.check(record, weights)
                else:
                    tried = measure_unit(walk, i, hidden, unit, unit.choices[keep[number]], config, final)
                    losses = [[choice.bits, choice.group, choice.loss] for choice in tried]
                    record = {"unit": title(unit), "sha256": fingerprint(weights), "losses": losses}
                    journal.add(record)
                    words = "; ".join(f"{choice.words()}: {choice.loss:.4f}" for choice in tried)
                    bar.write(f"{', '.join(unit.names)}  {words}", file=sys.stderr)
                losses = {(bits, group): loss for bits, group, loss in record["losses"]}
                tried = (choice._replace(loss=losses[choice[:2]]) for choice in unit.choices if choice[:2] in losses)
                units[number] = unit._replace(choices=tuple(tried))
                bar.update()
            hidden = walk.through(block, i, hidden) if left else hidden
    return units


def title(unit: Unit) -> str:
    """Of a unit's record in the journal."""
    return f"sensitivity of {', '.join(unit.names)}"


def measure_unit(
    walk: Blocks, i: int, hidden: torch.Tensor, unit: Unit, keep: Choice, config: QuantConfig, final: torch.Tensor
) -> list[Choice]:
    """The choices of a unit in block i that are worth trying, with losses: all of them where only the bits differ.

    hidden: what enters the block, final: what the original model's last block gives, [n, L, d]. Raises LutqError for predictions
    that are NaN or infinite.
    """
    block, local = walk.blocks[i], [name.removeprefix(f"{walk.name(i)}.") for name in unit.names]
    linears = [block.get_submodule(name) for name in local]
    K = linears[0].in_features
    H = torch.zeros(K, K, device=walk.device)
    visit_inputs(walk, i, hidden, local[0], lambda x: accumulate(H, x))
    H = damp(H / hidden.shape[:2].numel(), config.damping, unit.names[0]).H
    originals = [linear.weight.data for linear in linears]

    def fitted(choice: Choice, config: QuantConfig) -> list[torch.Tensor]:
        layer = unit.layer._replace(bits=choice.bits, group=choice.group)
        return [weight(fit, layer, K) for fit, _, _ in solve_layers(originals, H, [layer] * len(originals), config)]

    tried = unit.choices
    if len({choice.group for choice in tried}) > 1:
        quick, points = dataclasses.replace(config, rounds=min(config.rounds, 1), sweeps=0), []
        for choice in tried:
            errors = [solve.loss(W, Q, H).sum().item() for W, Q in zip(originals, fitted(choice, quick), strict=True)]
            points.append((*choice.costs(config), sum(errors)))
        worth = {*worth_trying(points), tried.index(keep)}
        for bits in {choice.bits for choice in tried}:  # the least of each, so that there are steps between the bits
            worth.add(min((n for n, choice in enumerate(tried) if choice.bits == bits), key=lambda n: tried[n].costs(config)))
        tried = [tried[number] for number in sorted(worth)]
    found = []
    for choice in tried:
        for linear, Q in zip(linears, fitted(choice, config), strict=True):
            linear.weight.data = Q
        loss = 0.0
        batch = max(1, BATCH // hidden.shape[1])
        for state, original in zip(hidden.split(batch), final.split(batch), strict=True):
            for j in range(i, len(walk)):
                state = walk.run(walk.blocks[j], j, state)
            loss += divergence(walk.logits(state, {}), walk.logits(original, {})).item() * len(state) / len(hidden)
        if not math.isfinite(loss):
            raise LutqError("the model's predictions are NaN or infinite on the calibration text: give an undamaged model")
        found.append(choice._replace(loss=loss))
    for linear, W in zip(linears, originals, strict=True):
        linear.weight.data = W
    return found
