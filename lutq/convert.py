"""`lutq convert`: a GPTQ, AWQ, AutoRound or compressed-tensors checkpoint becomes lutq's, one layer in memory at a time.

Integers become bit-planes of the uniform grid, scales and zero points are copied: no weight changes (lutq/pack.py is computed in
fp32, which holds s (u - z) exactly). What cannot be kept exactly is an error. Everything that the source did not quantize is
copied bit for bit, in the dtype it has. The output appears as a whole when it is complete; an interrupted run leaves nothing.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lutq.card import converted_card
from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.foreign import (
    Layout,
    Shapes,
    check_parts,
    check_zeros,
    grids_of,
    grouping,
    groups_of,
    integers_of,
    layout_of,
    shapes_of,
)
from lutq.output import check_out, publish, write_beside
from lutq.pack import CHUNK, pack_bits, packed_shapes, words
from lutq.report import Conversion, LayerReport
from lutq.runtime import dtype_name, progress_interval
from lutq.shards import SHARD_BYTES, ShardWriter, Spec, disk_error
from lutq.source import Source, read_json
from lutq.structure import Structure, match_tensors, read_structure


class Layer(NamedTuple):
    """A quantized Linear layer W [N, K] of the source: its tensors by part, and how lutq stores it.

    picked: the source's group of each of lutq's, int64 [G]. order: its inputs sorted by group, int64 [K], or None.
    """

    name: str
    keys: dict[str, str]
    N: int
    K: int
    found: Shapes
    layer: LayerConfig
    picked: torch.Tensor
    order: torch.Tensor | None

    def specs(self) -> dict[str, Spec]:
        """Every tensor that lutq stores of the layer."""
        specs = {f"{self.name}.{part}": Spec(*spec) for part, spec in packed_shapes(self.N, self.K, self.layer).items()}
        return specs | ({} if self.order is None else {f"{self.name}.input_order": Spec((self.K,), torch.int32)})


def convert_checkpoint(
    model: str | Path, out: str | Path = "lutq-out", *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES
) -> Conversion:
    """Convert the quantized checkpoint `model` (hub id or directory) into the directory `out`.

    overwrite: replace an earlier output. shard_bytes: size limit of one output file. Raises LutqError for bad input and for
    a layer that lutq cannot store exactly, naming it.
    """
    begin = time.perf_counter()
    if Path(out).name in ("", ".."):
        raise LutqError(f"--out {str(out)!r} has no name of its own: give a directory to create, such as lutq-out")
    shown, out = Path(out), Path(out).resolve()
    check_out(out, overwrite)
    source = Source(model, quantized=True)
    quantization = quantization_of(source)
    layout, structure = layout_of(quantization), read_structure(source.config)
    layers = find_layers(source, layout, structure)
    names, ignored = match_kept(source, structure, layers)
    specs = {name: spec for key in structure.tensors for name, spec in specs_of(key, source, layers, names).items()}
    guard = next(iter(layers))
    dtype = source.config.dtype or torch.float16
    specs[guard] = Spec((0,), dtype)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as parent:
            folder = Path(parent) / out.name
            folder.mkdir()
            writer = ShardWriter(folder, specs, set(), shard_bytes)
            try:
                write_tensors(source, layout, layers, names, list(structure.tensors), writer)
                writer.write(guard, torch.empty(0, dtype=dtype))
                writer.flush()
            finally:
                writer.close()
            writer.write_index()
            report = Conversion(
                source=source.name,
                out=shown,
                kind=str(quantization["quant_method"]),
                layers=[report_of(layer) for layer in layers.values()],
                ordered=[layer.name for layer in layers.values() if layer.order is not None],
                kept=[name for name in structure.linears if f"{name}.weight" not in layers],
                ignored=ignored,
                bytes_before=source.nbytes,
                bytes_after=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
                parameters=structure.parameters,
                seconds=time.perf_counter() - begin,
            )
            beside = {
                "guard": guard,
                "modules": {figures.name: figures.layer.to_dict() for figures in report.layers},
                "settings": {"method": "convert", "converted": quantization},
            }
            beside |= {"ordered": report.ordered} if report.ordered else {}
            write_beside(folder, source, structure, converted_card(report), dtype_name(dtype), beside)
            publish(folder, out)
    except OSError as error:
        found = disk_error(error, out)
        raise found if isinstance(found, LutqError) else LutqError(f"cannot write {out} ({error}): give another --out") from error
    return report


def quantization_of(source: Source) -> dict[str, Any]:
    """The source's quantization_config, or what AutoGPTQ kept in a file of its own. Raises LutqError where there is none."""
    config = source.raw_config.get("quantization_config") or source.raw_config.get("compression_config")
    if config is None and (source.path / "quantize_config.json").is_file():
        config = {"quant_method": "gptq"} | read_json(source.path / "quantize_config.json", "")
    if not isinstance(config, dict):
        raise LutqError(f"{source.path} is not quantized (its config.json has no quantization_config): see lutq quantize")
    if config.get("quant_method") == "lutq":
        raise LutqError(f"{source.path} is lutq's own already: use it as it is")
    return {"quant_method": "compressed-tensors"} | config if "config_groups" in config else config


def find_layers(source: Source, layout: Layout, structure: Structure) -> dict[str, Layer]:
    """State-dict name of the plain model's weight -> Layer of every Linear layer that the source quantized.

    Raises LutqError for one that lutq cannot store.
    """
    layers, available = {}, set(source.keys)
    for name, linear in structure.linears.items():
        for spelled in (name, name.removeprefix(structure.prefix), structure.prefix + name):
            keys = {part: f"{spelled}.{tail}" for part, tail in layout.names.items() if f"{spelled}.{tail}" in available}
            if keys:
                with naming(spelled):
                    layers[f"{name}.weight"] = find_layer(source, layout, name, keys, linear.N, linear.K)
                break
    if not layers:
        raise LutqError(f"{source.path} has no tensor {layout.names['integers']}, although its config.json says {layout.kind}")
    return layers


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a layer in front of a LutqError."""
    try:
        yield
    except LutqError as error:
        raise LutqError(f"{name}: {error}") from error


def find_layer(source: Source, layout: Layout, name: str, keys: dict[str, str], N: int, K: int) -> Layer:
    """How lutq stores a layer, by the shapes of its tensors, the dtype of its words and the groups of its inputs."""
    check_parts(layout, keys)
    found = shapes_of(layout, {part: source.shape(key) for part, key in keys.items()}, N, K)
    check_zeros(layout, keys, found)
    for part in ("integers", "zeros"):
        dtypes = (torch.int32, torch.int8) if (part, layout.kind) == ("zeros", "compressed-tensors") else (torch.int32,)
        if part in keys and source.dtype(keys[part]) not in dtypes:
            raise LutqError(f"{layout.names[part]} is {dtype_name(source.dtype(keys[part]))}: lutq can convert words of int32")
    if "shape" in keys and source.tensor(keys["shape"]).tolist() != [N, K]:
        raise LutqError(f"weight_shape says {source.tensor(keys['shape']).tolist()}, but config.json asks for {[N, K]}")
    g_idx = source.tensor(keys["groups"]) if "groups" in keys else None
    g, picked, order = grouping(groups_of(layout, found, K, g_idx))
    return Layer(name, keys, N, K, found, LayerConfig(found.bits, g, "uniform"), picked, order)


def match_kept(source: Source, structure: Structure, layers: dict[str, Layer]) -> tuple[dict[str, str], list[str]]:
    """State-dict name -> name in the source of every tensor that is copied; and the source's tensors that are left out.

    Raises LutqError where one is missing, and where one that is left out would change what a converted layer computes.
    """
    tensors = {key: shape for key, shape in structure.tensors.items() if key not in layers}
    tied = {key: other for key, other in structure.tied.items() if key in tensors}
    names, unused = match_tensors(structure._replace(tensors=tensors, tied=tied), source)
    read = {key for layer in layers.values() for key in layer.keys.values()}
    ignored = [key for key in unused if key not in read]
    spelled = {layer.keys["integers"].rpartition(".")[0] for layer in layers.values()}
    for key in ignored:
        owner, _, part = key.rpartition(".")
        harmless = part == "bias" and not source.tensor(key).any()  # AutoGPTQ gave one of zeros to layers without
        if part == "scales" or (owner in spelled and not harmless):
            raise LutqError(f"{key} is part of the quantization and lutq does not know what it means: pip install --upgrade lutq")
    return {key: found for key, found in names.items() if key not in tied}, ignored


def specs_of(key: str, source: Source, layers: dict[str, Layer], names: dict[str, str]) -> dict[str, Spec]:
    """What lutq stores for the state-dict name `key` of the plain model; nothing for a tied tensor."""
    if key in layers:
        return layers[key].specs()
    return {key: Spec(source.shape(names[key]), source.dtype(names[key]))} if key in names else {}


def write_tensors(
    source: Source, layout: Layout, layers: dict[str, Layer], names: dict[str, str], tensors: list[str], writer: ShardWriter
) -> None:
    """Copy or convert every tensor, in the order of `tensors`, the state-dict names of the plain model."""
    with tqdm(total=len(tensors), unit="tensor", mininterval=progress_interval()) as bar:
        for key in tensors:
            bar.set_description(key, refresh=False)
            if key in layers:
                layer = layers[key]
                with naming(layer.name):
                    made = convert({part: source.tensor(name) for part, name in layer.keys.items()}, layout, layer)
                for part, tensor in made.items():
                    writer.write(f"{layer.name}.{part}", tensor)
            elif key in names:
                writer.write(key, source.tensor(names[key]))
            writer.flush()
            bar.update()


def convert(tensors: dict[str, torch.Tensor], layout: Layout, layer: Layer) -> dict[str, torch.Tensor]:
    """A layer's tensors by part -> what lutq stores of it (lutq/pack.py). Raises LutqError where that is not exact."""
    scales, zero_points = grids_of(layout, tensors, layer.found, layer.N)
    bits, step = layer.found.bits, max(32, CHUNK // layer.K // 32 * 32)
    codes = torch.empty(bits, layer.N, words(layer.K), dtype=torch.int32)
    for begin in range(0, layer.N, step):
        rows = slice(begin, min(layer.N, begin + step))
        integers = integers_of(layout, tensors["integers"], layer.found, layer.K, rows)
        for i in range(bits):
            plane = integers[..., bits - 1 - i]
            codes[i, rows] = pack_bits(plane if layer.order is None else plane[:, layer.order])
    made = {"codes": codes, "scales": exact_half(scales)[None, :, layer.picked], "zero_points": zero_points[:, layer.picked]}
    return made if layer.order is None else made | {"input_order": layer.order.int()}


def exact_half(scales: torch.Tensor) -> torch.Tensor:
    """Scales as fp16. Raises LutqError where that is another number."""
    half = scales.half()
    wrong = (half.double() != scales.double()) | ~half.isfinite()
    if wrong.any():
        example = f"{wrong.sum()} of {wrong.numel()} scales, such as {scales[wrong][0].item():.9g} in {dtype_name(scales.dtype)}"
        raise LutqError(f"{example}, are no finite float16 numbers, as lutq stores them: quantize the original model instead")
    return half


def report_of(layer: Layer) -> LayerReport:
    """Size of a converted layer; its error is 0."""
    return LayerReport(layer.name, layer.N, layer.K, layer.layer, sum(spec.nbytes for spec in layer.specs().values()), 0.0, 0.0)
