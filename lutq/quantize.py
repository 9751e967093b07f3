"""`lutq quantize`: stream a checkpoint through `lutq.fit`, one tensor at a time, into packed shards.

Work happens in `OUT.partial`, which becomes `OUT` when everything is in it; what a crash leaves there is picked up by the
same command. The order of work is the order of the model's tensors, planned before the first weight is read.
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from lutq import __version__
from lutq.card import model_card
from lutq.config import FORMAT_VERSION, LayerConfig, QuantConfig
from lutq.errors import LutqError
from lutq.fit import CHUNK, fit
from lutq.journal import Journal, fingerprint
from lutq.pack import Packed, dequantize, packed_shapes
from lutq.report import LayerReport, Report
from lutq.runtime import free_memory, out_of_memory, peak_memory, resolve_device, resolve_dtype, size
from lutq.shards import SHARD_BYTES, ShardWriter, Spec, disk_error
from lutq.source import Source
from lutq.structure import Structure, match_tensors, read_structure

TOKENIZER_FILES = (
    "token*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.tiktoken",
)
TOKENIZER_FILES += ("sentencepiece*", "spiece.model", "preprocessor_config.json", "generation_config.json", "LICENSE*", "NOTICE*")
RESUME_OR_OVERWRITE = "run it with those settings to go on, or add --overwrite to start again"


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
            for part, (part_shape, part_dtype) in packed_shapes(*shape, chosen[module]).items():
                specs[f"{module}.{part}"] = Spec(part_shape, part_dtype)
        elif key in structure.tied and structure.tied[key].removesuffix(".weight") not in chosen:
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
            chosen[name] = layer
        else:
            kept.append(name)
    if not any(linear.place == "block" and name in chosen for name, linear in structure.linears.items()):
        raise LutqError("the overrides skip every Linear layer: leave some to quantize")
    return chosen, kept


def quantize_checkpoint(
    model: str | Path | None = None,
    out: str | Path = "lutq-out",
    config: QuantConfig | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Report:
    """Quantize `model` (hub id, directory, or None for the embedded model) into the directory `out`.

    dtype: of the tensors that are kept; auto is the source's own if it has 16 bits, else float16. shard_bytes: size limit
    of one output file. Raises LutqError for bad input; an interrupted run goes on when it is called again.
    """
    begin = time.perf_counter()
    config = config or QuantConfig()
    source, target = Source(model), resolve_device(device)
    out = Path(out)
    check_out(out, overwrite)
    kept_dtype = resolve_dtype(
        dtype, source.config.dtype if source.config.dtype in (torch.float16, torch.bfloat16) else torch.float16
    )
    structure = read_structure(source.config)
    todo = plan(source, structure, config, kept_dtype)
    identity = {
        "lutq": __version__,
        "torch": torch.__version__,
        "device": target.type,
        "dtype": str(kept_dtype).removeprefix("torch."),
        "shard_bytes": shard_bytes,
        "source_config": source.raw_config,
        **config.to_dict(),
    }
    partial = out.with_name(out.name + ".partial")
    if overwrite and partial.exists():
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(partial, identity, RESUME_OR_OVERWRITE)
    except OSError as error:
        raise LutqError(f"cannot write to {partial} ({error.strerror}): give another --out") from error
    try:
        done = {record["unit"]: record for record in journal.records}
        layers = run(source, todo, config, target, partial, journal, done, shard_bytes)
        parameters = sum(torch.Size(shape).numel() for key, shape in structure.tensors.items() if key not in structure.tied)
        report = Report(
            source=source.name,
            out=out,
            config=config,
            layers=layers,
            kept=todo.kept,
            ignored=todo.ignored,
            bytes_before=source.nbytes,
            bytes_after=sum(path.stat().st_size for path in partial.glob("*.safetensors")),
            parameters=parameters,
            seconds=time.perf_counter() - begin,
            peak=peak_memory(target),
        )
        finish(source, structure, todo, report, partial)
    except OSError as error:
        raise disk_error(error, partial) from error
    finally:
        journal.close()
    publish(partial, out)
    return report


def check_out(out: Path, overwrite: bool) -> None:
    """Raise LutqError unless `out` is free, or is an earlier output that may be overwritten."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not is_output(out)):
        raise LutqError(f"{out} exists and is not an output of lutq quantize: give another --out")
    if any(out.iterdir()) and not overwrite:
        raise LutqError(f"{out} already holds a quantized model: add --overwrite, or give another --out")


def is_output(out: Path) -> bool:
    """Whether a directory holds a checkpoint that lutq wrote."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == "lutq"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run(
    source: Source,
    todo: Plan,
    config: QuantConfig,
    device: torch.device,
    folder: Path,
    journal: Journal,
    done: dict[str, dict[str, Any]],
    shard_bytes: int,
) -> list[LayerReport]:
    """Do every unit that is not done yet and write its tensors; figures of all quantized layers, in model order."""
    written = {name for unit in todo.units if unit.name in done for name in outputs(unit, todo.specs)}
    writer = ShardWriter(folder, todo.specs, written, shard_bytes)
    needed = sum(spec.nbytes for name, spec in todo.specs.items() if name not in written)
    if needed > shutil.disk_usage(folder).free:
        raise LutqError(f"{folder} needs {size(needed)} and the disk has {size(shutil.disk_usage(folder).free)} free: make room")
    layers = []
    total = sum(torch.Size(unit.shape).numel() for unit in todo.units)
    interval = 0.1 if sys.stderr.isatty() else 10  # a log file wants few lines
    with tqdm(total=total, unit="w", unit_scale=True, smoothing=0.1, mininterval=interval) as bar:
        try:
            for unit in todo.units:
                tensor = source.tensor(unit.key)
                record = done.get(unit.name)
                if record:
                    journal.check(record, tensor)
                else:
                    record = {"unit": unit.name, "sha256": fingerprint(tensor)}
                    bar.set_description(unit.name, refresh=False)
                    record |= process(unit, tensor, todo, config, device, writer)
                    writer.flush()
                    journal.add(record)
                if unit.layer:
                    nbytes = sum(todo.specs[name].nbytes for name in outputs(unit, todo.specs))
                    layers.append(LayerReport(unit.name, *unit.shape, unit.layer, nbytes, record["error"], record["norm"]))
                    bar.set_postfix(error=f"{(record['error'] / (record['norm'] or 1)) ** 0.5:.4f}", refresh=False)
                bar.update(tensor.numel())
            writer.write(todo.guard, torch.empty(0, dtype=todo.dtype))
            writer.flush()
        finally:
            writer.close()
    writer.write_index()
    return layers


def outputs(unit: Unit, specs: dict[str, Spec]) -> list[str]:
    """Names of the tensors that a unit writes."""
    return [f"{unit.name}.{part}" for part in Packed._fields if f"{unit.name}.{part}" in specs] if unit.layer else [unit.name]


def process(
    unit: Unit, tensor: torch.Tensor, todo: Plan, config: QuantConfig, device: torch.device, writer: ShardWriter
) -> dict[str, float]:
    """Quantize or convert one tensor and write it; squared norms of a quantized weight and of its error."""
    if not tensor.is_floating_point():
        raise LutqError(f"{unit.key} has dtype {tensor.dtype}, which is no plain weight: give an unquantized checkpoint")
    if not torch.isfinite(tensor).all():
        raise LutqError(f"{unit.key} holds NaN or infinite values: give an undamaged checkpoint")
    if unit.layer is None:
        kept = tensor.to(todo.dtype)
        if not torch.isfinite(kept).all():
            raise LutqError(f"{unit.key} does not fit into {todo.dtype}: use --dtype bfloat16")
        writer.write(unit.name, kept)
        return {}
    with out_of_memory(lambda: memory_advice(unit, device)):
        W = tensor.to(device)
        packed = fit(W, unit.layer, config)
        if not torch.isfinite(packed.scales).all():
            raise LutqError(f"{unit.key} has weights too large for fp16 scales: scale the checkpoint down, or skip this layer")
        values = dequantize(*packed, unit.layer.group, unit.layer.grid, W.shape[1])
        figures = {"error": squared_norm(W.float() - values), "norm": squared_norm(W.float())}
    for part, content in packed._asdict().items():
        if content is not None:
            writer.write(f"{unit.name}.{part}", content)
    return figures


def squared_norm(values: torch.Tensor) -> float:
    """Sum of squares, in float64 over fp32 row sums (the same on every run)."""
    return values.square().sum(1).double().sum().item()


def memory_advice(unit: Unit, device: torch.device) -> str:
    """What quantizing one layer takes, against what there is."""
    needed = 16 * unit.shape[0] * unit.shape[1] + 100 * CHUNK[device.type]
    words = f"{unit.name} needs about {size(needed)} on {device.type}, where {size(free_memory(device))} is free"
    return (
        f"{words}; close other programs"
        + (" or use --device cpu" if device.type == "cuda" else "")
        + " and run the command again"
    )


def finish(source: Source, structure: Structure, todo: Plan, report: Report, folder: Path) -> None:
    """Everything beside the weights: tokenizer files, model card, and config.json last."""
    for pattern in TOKENIZER_FILES:
        for path in source.path.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
            else:
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    modules = {figures.name: figures.layer._asdict() for figures in report.layers}
    config = source.raw_config | {
        "dtype": str(todo.dtype).removeprefix("torch."),
        "quantization_config": {
            "quant_method": "lutq",
            "format_version": FORMAT_VERSION,
            "lutq_version": __version__,
            "guard": todo.guard,
            "modules": modules,
            "settings": report.config.to_dict(),
        },
    }
    config.pop("torch_dtype", None)
    if any(structure.linears[name].place == "head" for name in modules):
        config["tie_word_embeddings"] = False  # the packed head no longer is the embedding
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def publish(partial: Path, out: Path) -> None:
    """Give the finished directory its name; an earlier output disappears only then."""
    (partial / "lutq-progress.jsonl").unlink()
    old = out.with_name(out.name + ".old")
    if out.exists():
        if old.exists():
            shutil.rmtree(old)
        out.replace(old)
    partial.replace(out)
    if old.exists():
        shutil.rmtree(old)
