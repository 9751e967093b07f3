"""`lutq info`: what a checkpoint is, in plain words, from its headers alone."""

from pathlib import Path

import torch

from lutq.hf import check_checkpoint, existing, load_dtype
from lutq.latency import words
from lutq.ops import choose_backend
from lutq.pack import lower_shapes, stored_shapes
from lutq.precisions import serving
from lutq.report import LayerReport, bits_per_weight, by_kind, eight_bit, table
from lutq.residual import costs
from lutq.runtime import device_name, dtype_name, resolve_device, size
from lutq.source import load_config, locate
from lutq.structure import read_structure


def describe(model: str | Path, device: str | None = None, dtype: str = "auto", backend: str = "auto") -> str:
    """The text of `lutq info`. Raises LutqError for what is no complete checkpoint."""
    path, name = locate(existing(model))
    quantization = check_checkpoint(path)
    config = load_config(path)
    structure = read_structure(config)
    place = resolve_device(device)
    activations = load_dtype(dtype, place, config)
    parameters = structure.parameters
    stored = sum(file.stat().st_size for pattern in ("*.safetensors", "pytorch_model*.bin") for file in path.glob(pattern))
    architecture = config.architectures[0] if config.architectures else config.model_type
    lines = [
        f"{name}: {architecture}, {parameters / 1e6:,.1f} M parameters, {getattr(config, 'num_hidden_layers', '?')} blocks, "
        f"context {getattr(config, 'max_position_embeddings', 'unlimited')}, {size(stored)} on disk"
    ]
    if quantization is None:
        linear = [layer for layer in structure.linears.values() if layer.place == "block"]
        share = sum(layer.N * layer.K for layer in linear) / parameters
        lines += [
            f"not quantized by lutq; {len(linear)} Linear layers inside its blocks ({share:.0%} of the parameters) can be",
            f"to quantize: lutq quantize {model} --bits 3 --group 128",
        ]
        return "\n".join(lines)
    layers = []
    for module, layer in quantization.layers().items():
        N, K = structure.linears[module].N, structure.linears[module].K
        parts = stored_shapes(N, K, layer) | lower_shapes(N, K, layer, quantization.lowest_bits)
        nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts.values())
        nbytes += 4 * K if module in quantization.ordered else 0
        layers.append(LayerReport(module, N, K, layer, nbytes, 0.0, 0.0))
    body = [
        (
            kind,
            str(len(members)),
            str(bits),
            str(group or "row"),
            grid,
            "yes" if offsets else "no",
            f"{bits_per_weight(members):.3f}",
        )
        for (kind, bits, group, grid, offsets, *_), members in by_kind(layers).items()
    ]
    shapes = [(layer.N, layer.K, layer.layer) for layer in layers]
    backend_name, why = choose_backend(backend, place)
    method = quantization.settings.get("method", "?")
    lines += [
        f"quantized by lutq {quantization.lutq_version} (format {quantization.format_version}), method {method}, "
        f"{bits_per_weight(layers):.3f} bits per weight in {len(layers)} layers, {8 * stored / parameters:.3f} in all",
        *(f"{title}: {words}" for title, words in costs(shapes).items()),
        *([f"serves {serving(shapes, quantization.lowest_bits)}"] if quantization.lowest_bits else []),
        *([words(quantization.settings["latency"])] if "latency" in quantization.settings else []),
        *(f"{title} {found}" for title, found in eight_bit(layers).items()),
        "",
        table(("layer", "count", "bits", "group", "grid", "offsets", "bits/weight"), body),
        "",
        f"would run here on {device_name(place)} in {dtype_name(activations)} with backend {backend_name}: {why}",
    ]
    return "\n".join(lines)
