"""Mixed precision: bits per layer under a size budget, chosen by what they do to the model's predictions.

A unit is one Linear layer, or the layers that read the same input and run fused (q/k/v, gate/up), which get equal bits. Its
sensitivity at b bits is the divergence of the next-token distribution from the original model's when this unit alone has b
bits. Sensitivities are taken to add up; which bits to give to which unit is then a knapsack, solved exactly as an integer
programme.
"""

import dataclasses
import re
from typing import NamedTuple

import torch
from tqdm import tqdm

from lutq.blocks import Blocks, input_stages, visit_inputs
from lutq.calib import Calibration
from lutq.calibrate import load_host
from lutq.config import LayerConfig, QuantConfig
from lutq.errors import LutqError
from lutq.fit import solve_layer
from lutq.hessian import accumulate, damp
from lutq.pack import packed_shapes, weight
from lutq.refine import divergence
from lutq.runtime import progress_interval
from lutq.source import Source

TOKENS = 8192  # of the calibration text: a ranking needs fewer than a fit
BATCH = 2048  # tokens that go through the model at a time
CHOICES = (1, 2, 3, 4)  # bits


class Unit(NamedTuple):
    """Layers with equal bits. sizes: stored bits, losses: nats per token, for each of `CHOICES`; weights: their number."""

    names: tuple[str, ...]
    weights: int
    sizes: tuple[int, ...]
    losses: tuple[float, ...]


def choose(losses: list[tuple[float, ...]], sizes: list[tuple[int, ...]], budget: int) -> list[int]:
    """The choice for each unit that makes the sum of losses least while that of sizes is at most `budget`.

    losses, sizes: a row per unit, an entry per choice. Raises LutqError where not even the smallest sizes fit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(map(min, sizes))
    if least > budget:
        raise LutqError(f"the smallest layers take {least} bits and the budget is {budget}: raise the target")
    units, choices = np.shape(losses)
    once = np.kron(np.eye(units), np.ones(choices))  # every unit gets one choice
    size = np.ravel(sizes) / budget
    constraints = [LinearConstraint(once, 1, 1), LinearConstraint(size[None], 0, 1)]
    result = milp(
        np.ravel(losses),
        integrality=np.ones(units * choices),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    if not result.success:
        raise LutqError(f"no allocation of bits was found ({result.message}): give another target")
    return result.x.reshape(units, choices).argmax(1).tolist()


@torch.no_grad()
def measure(
    source: Source, layers: dict[str, LayerConfig], config: QuantConfig, calibration: Calibration, device: torch.device
) -> list[Unit]:
    """Sizes and sensitivities of all units, in model order; layers names every Linear layer that takes part."""
    walk = Blocks(load_host(source.path, device), device)
    length = calibration.windows.shape[1]
    hidden, units = walk.embed(calibration.windows[: max(1, TOKENS // length)]), []
    walk.model.to(device, torch.float32)
    final = hidden
    for i, block in enumerate(walk.blocks):
        final = walk.through(block, i, final)
    with tqdm(total=len(layers), unit="layer", mininterval=progress_interval()) as bar:
        for i, block in enumerate(walk.blocks):
            for names in input_stages(walk, i, hidden):
                full = [f"{walk.name(i)}.{name}" for name in names]
                taken = [(name, layers[long]) for name, long in zip(names, full, strict=True) if long in layers]
                if taken:
                    units.append(measure_unit(walk, i, hidden, taken, config, final))
                    bar.update(len(taken))
            hidden = walk.through(block, i, hidden)
    return units


def measure_unit(
    walk: Blocks,
    i: int,
    hidden: torch.Tensor,
    taken: list[tuple[str, LayerConfig]],
    config: QuantConfig,
    final: torch.Tensor,
) -> Unit:
    """Try every bits on the layers `taken` of block i.

    hidden: what enters the block, final: what the original model's last block gives, [n, L, d].
    """
    block, prefix = walk.blocks[i], walk.name(i)
    linears = [block.get_submodule(name) for name, _ in taken]
    K = linears[0].in_features
    H = torch.zeros(K, K, device=walk.device)
    visit_inputs(walk, i, hidden, taken[0][0], lambda x: accumulate(H, x))
    H = damp(H / hidden.shape[:2].numel(), config.damping, f"{prefix}.{taken[0][0]}").H
    originals, sizes, losses = [linear.weight.data for linear in linears], [], []
    for bits in CHOICES:
        size = 0
        for linear, W, (_, layer) in zip(linears, originals, taken, strict=True):
            tried = layer._replace(bits=bits)
            packed, _, _ = solve_layer(W, H, tried, config)
            linear.weight.data = weight(packed, tried, K)
            size += sum(
                8 * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in packed_shapes(*W.shape, tried).values()
            )
        loss = 0.0
        batch = max(1, BATCH // hidden.shape[1])
        for state, original in zip(hidden.split(batch), final.split(batch), strict=True):
            for j in range(i, len(walk)):
                state = walk.run(walk.blocks[j], j, state)
            loss += divergence(walk.logits(state, {}), walk.logits(original, {})).item() * len(state) / len(hidden)
        sizes.append(size)
        losses.append(loss)
    for linear, W in zip(linears, originals, strict=True):
        linear.weight.data = W
    names = tuple(f"{prefix}.{name}" for name, _ in taken)
    return Unit(names, sum(W.numel() for W in originals), tuple(sizes), tuple(losses))


def allocate(units: list[Unit], config: QuantConfig) -> QuantConfig:
    """The settings with `target_bpw` replaced by an override for every unit. Raises LutqError for a target out of reach."""
    budget = int(config.target_bpw * sum(unit.weights for unit in units))
    try:
        chosen = choose([unit.losses for unit in units], [unit.sizes for unit in units], budget)
    except LutqError as error:
        least = sum(min(unit.sizes) for unit in units) / sum(unit.weights for unit in units)
        raise LutqError(f"target_bpw {config.target_bpw} is out of reach: groups of {config.group} need {least:.3f}") from error
    overrides = {
        "^(" + "|".join(re.escape(name) for name in unit.names) + ")$": {"bits": CHOICES[choice]}
        for unit, choice in zip(units, chosen, strict=True)
    }
    return dataclasses.replace(config, target_bpw=0.0, overrides=config.overrides | overrides)
