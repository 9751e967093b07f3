"""Which precisions a checkpoint serves, and what has to be read for one of them.

An any-precision checkpoint (lutq/nested.py) is loaded at its highest precision like any other. At b bits the model takes the
first b planes of the codes and the grid called `_{b}bit` (lutq/pack.py), and is an ordinary model of b bits from then on.
"""

from pathlib import Path

import torch

from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.pack import OWN, PARTS, lower_name, packed_shapes
from lutq.shards import Spec
from lutq.source import open_safetensors, tensor_specs


def served(layers: dict[str, LayerConfig], lowest_bits: int) -> list[int]:
    """Bits at which a checkpoint can be loaded; none where its layers differ, which is loaded as it is."""
    found = {layer.bits for layer in layers.values()}
    if len(found) > 1:
        return []
    highest = found.pop()
    return list(range(lowest_bits or highest, highest + 1))


def choose(bits: int | None, layers: dict[str, LayerConfig], lowest_bits: int, name: str) -> int | None:
    """The bits at which to load the checkpoint called `name` when --bits asks for `bits`; None: every layer as it is stored.

    Raises LutqError for a precision that it does not serve.
    """
    if bits is None:
        return None
    if not layers:
        raise LutqError(f"--bits chooses among the precisions of a lutq checkpoint and {name} is none: leave it out")
    precisions = served(layers, lowest_bits)
    if bits not in precisions:
        have = f"serves {in_words(precisions)} bits" if precisions else "has layers of different bits"
        remedy = f"give --bits {in_words(precisions, 'or')}" if len(precisions) > 1 else "leave it out"
        raise LutqError(f"{name} {have} and --bits asks for {bits}: {remedy}")
    return None if bits == precisions[-1] else bits


def in_words(figures: list[int] | list[str], last: str = "and") -> str:
    """2, 3 and 4."""
    *first, final = map(str, figures)
    return f"{', '.join(first)} {last} {final}" if first else final


def serving(shapes: list[tuple[int, int, LayerConfig]], lowest_bits: int) -> str:
    """What quantized layers (N, K, settings) serve, and the bits per weight that a model of each precision takes."""
    weights = sum(N * K for N, K, _ in shapes)
    precisions = served({str(i): layer for i, (_, _, layer) in enumerate(shapes)}, lowest_bits)
    sizes = []
    for bits in precisions:
        parts = [spec for N, K, layer in shapes for spec in packed_shapes(N, K, layer._replace(bits=bits)).values()]
        sizes.append(f"{8 * sum(Spec(*spec).nbytes for spec in parts) / weights:.3f}")
    return f"{in_words(precisions)} bits with --bits at load, then {in_words(sizes)} bits per weight"


def stored_names(bits: int | None) -> dict[str, str]:
    """Name in the file -> name in the model of what a layer needs at `bits` bits, or None for all that it has."""
    if bits is None:
        return {part: part for part in OWN}
    return {"codes": "codes"} | {lower_name(part, bits): part for part in ("scales", "offsets")}


def contents(specs: dict[str, Spec], layers: dict[str, LayerConfig], bits: int | None) -> dict[str, tuple[str, Spec]]:
    """Name in a model of `bits` bits (None: as stored) -> name in the file, and Spec of what it takes of that tensor.

    specs: the tensors of a file.
    """
    found, names = {}, stored_names(bits)
    for key, spec in specs.items():
        owner, _, part = key.rpartition(".")
        if owner not in layers or part not in PARTS:
            found[key] = key, spec
        elif part in names:
            shape = (bits, *spec.shape[1:]) if bits and part == "codes" else spec.shape
            found[f"{owner}.{names[part]}"] = key, Spec(shape, spec.dtype)
    return found


def state_dict(files: list[Path], layers: dict[str, LayerConfig], bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a model of `bits` bits, on the CPU; of the codes only its planes are read.

    Raises LutqError for files that are damaged.
    """
    state = {}
    for file in files:
        handle, specs = open_safetensors(file), tensor_specs(file)
        for name, (key, spec) in contents(specs, layers, bits).items():
            # a slice is a view of the whole tensor in the mapped file, all of which would be kept and saved
            sliced = spec != specs[key]
            state[name] = handle.get_slice(key)[: spec.shape[0]].clone() if sliced else handle.get_tensor(key)
    return state
