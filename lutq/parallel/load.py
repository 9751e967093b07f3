"""A rank's part of a checkpoint, lutq's or a plain one, in the modules of the transformers model.

What results has the names of the whole model, with smaller Linear layers: it is for the fast engine (lutq/decode), which sums
over the ranks, and its own forward is of no use. Of a tensor that is split a rank copies its part alone, out of a mapped file
(pytorch_model.bin files from before torch 1.6 cannot be mapped). The checkpoint is the same for every N.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lutq.config import LayerConfig
from lutq.decode.shape import RefusedError, shape_of
from lutq.errors import LutqError
from lutq.linear import LutLinear
from lutq.pack import EIGHT_BIT, Packed, group_size, words
from lutq.parallel.ranks import Ranks
from lutq.parallel.split import WORD, Part, check_split, split_linears, tie_head
from lutq.runtime import dtype_name, out_of_memory
from lutq.scales import BLOCK, decode
from lutq.source import Source, load_bin, load_config, open_safetensors, read_json, tensor_specs
from lutq.structure import match_tensors, read_structure, skeleton

ALL = slice(None)
Read = Callable[[str, tuple[slice, ...]], torch.Tensor]  # a part of a tensor by its state-dict name


def read_part(file: Path, key: str, index: tuple[slice, ...]) -> torch.Tensor:
    """A part of a tensor, contiguous and on the CPU, in the dtype of the file. Raises LutqError if it cannot be read."""
    try:
        whole = load_bin(file)[key] if file.suffix == ".bin" else open_safetensors(file).get_slice(key)
        return whole[index].clone(memory_format=torch.contiguous_format)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise LutqError(f"{file} is damaged at {key} ({error}): copy or download it again") from error


def places(path: Path, quantized: bool) -> dict[str, tuple[Path, str]]:
    """State-dict name -> file and name there. Raises LutqError for files that are missing or damaged."""
    from lutq.hf import weight_files

    if quantized:
        return {key: (file, key) for file in weight_files(path) for key in tensor_specs(file)}
    source = Source(path)
    names, _ = match_tensors(read_structure(source.config), source)
    return {key: (source.file(name), name) for key, name in names.items()}


def packed_index(part: Part, name: str, layer: LayerConfig, K: int) -> tuple[slice, ...]:
    """Where a part is in the canonical tensor `name` of a layer of K inputs (lutq/pack.py); whole groups."""
    rows, (begin, end) = slice(*part.rows), part.columns
    if name == "codes":
        return ALL, rows, slice(begin // WORD, words(end))
    groups = slice(begin // layer.group, -(-end // layer.group)) if layer.group else ALL
    return (ALL, rows, groups) if name == "scales" else (rows, groups)


def regroup(tensor: torch.Tensor, part: Part, old: int, new: int) -> torch.Tensor:
    """Numbers [..., G] of the whole groups of `old` inputs that hold a part -> those of its groups of `new` inputs."""
    if old == new:
        return tensor
    first = part.columns[0] % old // new
    return tensor.repeat_interleave(old // new, -1)[..., first : first + -(-part.inputs // new)].contiguous()


def part_units(units: torch.Tensor, index: tuple[slice, ...], G: int) -> torch.Tensor:
    """The units of a part's scales or offsets, in their shape, of all units of a layer with G groups (lutq/scales.py)."""
    *_, rows, groups = index
    each = units.repeat_interleave(BLOCK, -1)
    return each[..., rows.start * G : rows.stop * G].unflatten(-1, (-1, G))[..., groups]


def fill_packed(module: LutLinear, owner: str, part: Part, layer: LayerConfig, K: int, read: Read, device: torch.device) -> None:
    """Give a layer the canonical tensors of a part of the layer `owner`, which has these settings and K inputs."""
    for name in Packed._fields:
        if module._buffers[name] is not None:
            index = packed_index(part, name, layer, K)
            tensor = read(f"{owner}.{name}", index)
            if layer.scale_bits == 8 and name in EIGHT_BIT:  # the share of a block of scales has no units of its own
                units = read(f"{owner}.{EIGHT_BIT[name][0]}", (ALL,))
                tensor = decode(tensor, part_units(units, index, -(-K // group_size(layer.group, K))))
            if name != "codes":
                tensor = regroup(tensor, part, layer.group, module.layer.group)
            module._buffers[name] = tensor.to(device)


def fill_parameters(model: Any, parts: dict[str, Part], read: Read, device: torch.device, dtype: torch.dtype) -> None:
    """Give the parameters on the meta device what is theirs, in `dtype`, but for tied ones (`tie_head`)."""
    tied = set(model.all_tied_weights_keys)
    for owner, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            key = f"{owner}.{name}"
            if parameter is None or not parameter.is_meta or key in tied:
                continue
            index = (ALL,) * parameter.dim()
            if owner in parts:
                index = (slice(*parts[owner].rows), slice(*parts[owner].columns))[: parameter.dim()]
            module._parameters[name] = torch.nn.Parameter(read(key, index).to(device, dtype), requires_grad=False)


def load_part(path: Path, ranks: Ranks, device: torch.device, dtype: torch.dtype, backend: str = "auto") -> Any:
    """The part of one rank of the model in a directory, on a device; `model.ranks` are the ranks.

    dtype: of activations and unquantized weights. Raises LutqError for a model that cannot be split among so many, with the
    numbers that would do, and for whatever keeps it from being complete.
    """
    from transformers import GenerationConfig

    from lutq.hf import check_checkpoint

    quantization = check_checkpoint(path)
    config = load_config(path)
    foreign = None if quantization else read_json(path / "config.json", "needs a config.json").get("quantization_config")
    if foreign:
        method = foreign.get("quant_method")
        raise LutqError(f"{path} was quantized by {method!r}: several processes take lutq's checkpoints and plain ones")
    layers = quantization.layers() if quantization else {}
    if quantization and quantization.ordered:
        name = quantization.ordered[0]
        raise LutqError(f"{name} has inputs in an order of their own, which processes cannot share: use one, without torchrun")
    corrected = next((name for name, layer in layers.items() if layer.corrected), None)
    if corrected:
        raise LutqError(f"{corrected} has corrections beside its planes, which processes cannot share: use one, without torchrun")
    try:
        shape = dataclasses.replace(shape_of(config), world=ranks.world)
    except RefusedError as error:
        raise LutqError(f"several processes cannot share this model: {error.reason}; use one, without torchrun") from error
    model: Any = skeleton(config)
    inside = {name: layer for name, layer in layers.items() if model.get_submodule(name) is not model.get_output_embeddings()}
    check_split(shape, ranks.world, bool(inside))
    inputs = {name: module.in_features for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    parts = split_linears(model, shape, ranks.rank, layers)
    where = places(path, quantization is not None)
    advice = f"part {ranks.rank + 1} of {ranks.world} of {path} in {dtype_name(dtype)}: use more GPUs or fewer bits"
    with out_of_memory(lambda: advice), torch.no_grad():

        def read(key: str, index: tuple[slice, ...]) -> torch.Tensor:
            return read_part(*where[key], index)

        for name, layer in layers.items():
            module = model.get_submodule(name)
            fill_packed(module, name, parts[name], layer, inputs[name], read, device)
            module.backend = backend
            module.prepack()  # one layer at a time is there twice
        fill_parameters(model, parts, read, device, dtype)
        for module in model.modules():
            if hasattr(module, "original_inv_freq"):  # a rotary embedding, which computes what it holds
                module._buffers.update(type(module)(config).to(device)._buffers)
        tie_head(model, parts)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    model.ranks = ranks
    return model.eval()
