"""What `lutq quantize` will do to every tensor of a model, decided before the first weight is read."""

import re
from typing import NamedTuple

import torch

from lutq.config import LayerConfig, QuantConfig
from lutq.errors import LutqError
from lutq.pack import PARTS, lower_shapes, stored_shapes
from lutq.shards import Spec
from lutq.source import Source
from lutq.structure import Structure, match_tensors


class Unit(NamedTuple):
    """One step of the work: the weight of a Linear layer to quantize, or (layer None) a tensor to keep.

    name: module name of the Linear layer, or state-dict name of the tensor. key: its name in the source.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    layer: LayerConfig | None


class Plan(NamedTuple):
    """All work of a run. specs: every tensor to be written. guard: see `plan`."""

    units: list[Unit]
    specs: dict[str, Spec]
    guard: str
    kept: list[str]
    ignored: list[str]
    dtype: torch.dtype


def plan(source: Source, structure: Structure, config: QuantConfig, dtype: torch.dtype) -> Plan:
    """Decide what happens to every tensor. Raises LutqError for settings that fit no layer of this model.

    The guard is an empty tensor with the name of the first quantized layer's ordinary weight. A program that reads the
    checkpoint without lutq finds a weight of the wrong size and stops, instead of running on random weights.
    """
    names, ignored = match_tensors(structure, source)
    chosen, kept = choose_layers(structure, config)
    units, specs = [], {}
    for key, shape in structure.tensors.items():
        module = key.removesuffix(".weight")
        if module in chosen and key != module:
            unit = Unit(module, names[key], shape, chosen[module])
            parts = stored_shapes(*shape, chosen[module]) | lower_shapes(*shape, chosen[module], config.lowest_bits)
            for part, (part_shape, part_dtype) in parts.items():
                specs[f"{module}.{part}"] = Spec(part_shape, part_dtype)
        elif key in structure.tied:
            continue
        else:
            unit = Unit(key, names[key], shape, None)
            specs[key] = Spec(shape, dtype)
        units.append(unit)
    guard = next(iter(chosen)) + ".weight"
    specs[guard] = Spec((0,), dtype)
    return Plan(units, specs, guard, kept, ignored, dtype)


def choose_layers(structure: Structure, config: QuantConfig) -> tuple[dict[str, LayerConfig], list[str]]:
    """Module name -> settings of every Linear layer to quantize, and the names of those that are kept."""
    for pattern in config.overrides:
        if not any(re.search(pattern, name) for name in structure.linears):
            raise LutqError(
                f"overrides.{pattern!r} matches no Linear layer: correct it (a name is {next(iter(structure.linears))})"
            )
    chosen, kept = {}, []
    for name, linear in structure.linears.items():
        layer = None if linear.place == "outside" else config.layer(name, linear.place == "head")
        if layer:
            chosen[name] = layer._replace(**config.corrections(name, linear.N, linear.K))
        else:
            kept.append(name)
    if not any(linear.place == "block" and name in chosen for name, linear in structure.linears.items()):
        raise LutqError("the overrides skip every Linear layer: leave some to quantize")
    return chosen, kept


def outputs(unit: Unit, specs: dict[str, Spec]) -> list[str]:
    """Names of the tensors that a unit writes."""
    return [f"{unit.name}.{part}" for part in PARTS if f"{unit.name}.{part}" in specs] if unit.layer else [unit.name]
