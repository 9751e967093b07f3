"""`lutq quantize`: stream a checkpoint through `lutq.fit`, one tensor at a time, into packed shards.

Work happens in `OUT.partial`, which becomes `OUT` when everything is in it; what a crash leaves there is picked up by the
same command. The order of work is the order of the model's tensors, planned before the first weight is read.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lutq import __version__
from lutq.allocate import BudgetError, allocate
from lutq.calib import Calibration, calibration_for, own_calibration
from lutq.calibrate import Calibrated, calibrate
from lutq.card import model_card
from lutq.config import LayerConfig, QuantConfig
from lutq.errors import LutqError
from lutq.fit import CHUNK, fit
from lutq.journal import NAME, Journal, StaleRunError, fingerprint
from lutq.latency import Product
from lutq.output import check_out, publish, write_beside
from lutq.pack import to_tensors, weight
from lutq.plan import Plan, Unit, outputs, plan
from lutq.report import LayerReport, Report, relative_error
from lutq.runtime import (
    dtype_name,
    free_memory,
    out_of_memory,
    peak_memory,
    progress_interval,
    resolve_device,
    resolve_dtype,
    size,
)
from lutq.shards import SHARD_BYTES, ShardWriter, disk_error
from lutq.source import Source
from lutq.store import FOLDER
from lutq.structure import Structure, read_structure
from lutq.uniform import LARGEST_SCALE

RESUME_OR_OVERWRITE = "run it with those settings to go on, or add --overwrite to start again"


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything about one run; `partial` is the directory that becomes `out`, which the user called `shown`.

    latency: what a checkpoint says about the times that a budget was kept with, see lutq/latency.py.
    """

    source: Source
    structure: Structure
    todo: Plan
    config: QuantConfig
    device: torch.device
    shard_bytes: int
    out: Path
    partial: Path
    shown: Path
    calibration: Calibration | None = None
    latency: dict[str, Any] | None = None

    def identity(self) -> dict[str, Any]:
        """What must be equal for an unfinished run to be continued."""
        return {
            "lutq": __version__,
            "torch": torch.__version__,
            "device": self.device.type,
            "dtype": dtype_name(self.todo.dtype),
            "shard_bytes": self.shard_bytes,
            "source_config": self.source.raw_config,
            **self.config.to_dict(),
            **({"calibration": self.calibration.record()} if self.calibration else {}),
        }


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

    dtype: of the tensors that are kept; auto is the source's own if it has 16 bits, else float16. overwrite: replace an
    earlier output, and drop an unfinished run of other settings. shard_bytes: size limit of one output file.
    Raises LutqError for bad input; an interrupted run goes on when it is called again.
    """
    if Path(out).name in ("", ".."):
        raise LutqError(f"--out {str(out)!r} has no name of its own: give a directory to create, such as lutq-out")
    source, config, shown, out = Source(model), config or QuantConfig(), Path(out), Path(out).resolve()
    check_out(out, overwrite)
    own = source.config.dtype
    kept_dtype = resolve_dtype(dtype, own if own in (torch.float16, torch.bfloat16) else torch.float16)
    structure = read_structure(source.config)
    todo, place = plan(source, structure, config, kept_dtype), resolve_device(device)
    partial = out.with_name(out.name + ".partial")
    calibration = calibration_for(source.path, source.config, config) if config.calibrated or config.mixed else None
    job = Job(source, structure, todo, config, place, shard_bytes, out, partial, shown, calibration)
    try:
        return complete(job)
    except StaleRunError:
        if not overwrite:
            raise
        shutil.rmtree(partial)
        return complete(job)


def complete(job: Job) -> Report:
    """Do what is left of a job, and give the result its name. Raises StaleRunError when what there is belongs to another job."""
    begin = time.perf_counter()
    try:
        if job.partial.exists() and any(job.partial.iterdir()) and not (job.partial / NAME).exists():
            raise LutqError(f"{job.partial} is not an unfinished run of lutq quantize: move it away, or give another --out")
        job.partial.mkdir(parents=True, exist_ok=True)
        journal = Journal(job.partial, job.identity(), RESUME_OR_OVERWRITE)
    except OSError as error:
        raise LutqError(f"cannot write to {job.partial} ({error.strerror}): give another --out") from error
    try:
        target_bpw = job.config.target_bpw  # choosing the bits clears it
        job = allocate_job(write_calibration(job, journal), journal)
        calibrated = calibrate_job(job, journal)
        layers = run(job, journal, calibrated)
        report = Report(
            source=job.source.name,
            out=job.shown,
            config=job.config,
            layers=layers,
            kept=job.todo.kept,
            ignored=job.todo.ignored,
            bytes_before=job.source.nbytes,
            bytes_after=sum(path.stat().st_size for path in job.partial.glob("*.safetensors")),
            parameters=job.structure.parameters,
            seconds=time.perf_counter() - begin,
            peak=peak_memory(job.device),
            calibration=calibrated.figures(),
            latency=job.latency,
            target_bpw=target_bpw,
        )
        finish(job, report)
        publish(job.partial, job.out)
        (job.out / NAME).unlink()
        shutil.rmtree(job.out / FOLDER, ignore_errors=True)
    except BudgetError:
        shutil.rmtree(job.partial)
        raise
    except OSError as error:
        raise disk_error(error, job.partial) from error
    finally:
        journal.close()
    return report


def block_layers(todo: Plan, structure: Structure) -> dict[str, LayerConfig]:
    """Name -> settings of the Linear layers inside decoder blocks that a plan quantizes."""
    return {unit.name: unit.layer for unit in todo.units if unit.layer and structure.linears[unit.name].place == "block"}


def write_calibration(job: Job, journal: Journal) -> Job:
    """The job with the calibration text that the model writes itself; the same where it has another, or needs none."""
    if job.calibration or not (job.config.calibrated or job.config.mixed):
        return job
    calibration = own_calibration(job.source.path, job.source.config, job.config, job.device, job.partial, journal)
    return dataclasses.replace(job, calibration=calibration)


def allocate_job(job: Job, journal: Journal) -> Job:
    """The job with bits and groups chosen under the budgets of its settings; the same where it has none."""
    if not job.config.mixed:
        return job
    layers = block_layers(job.todo, job.structure)
    outside = {unit.name: Product(*unit.shape, unit.layer) for unit in job.todo.units if unit.layer and unit.name not in layers}
    with out_of_memory(lambda: f"choosing bits per layer needs the whole model on {job.device}: use --device cpu or --bits"):
        config, latency = allocate(job.source.path, layers, outside, job.config, job.calibration, job.device, journal)
    todo = plan(job.source, job.structure, config, job.todo.dtype)
    return dataclasses.replace(job, config=config, todo=todo, latency=latency)


def calibrate_job(job: Job, journal: Journal) -> Calibrated:
    """The calibrated stages of a job; where it has none, only the text that its bits were chosen by, if any."""
    if not job.config.calibrated:
        return Calibrated(text=job.calibration.describe() if job.calibration else "")
    layers = block_layers(job.todo, job.structure)
    with out_of_memory(lambda: "calibrating needs the whole model in host memory: use fewer --calib-windows or another machine"):
        return calibrate(job.source.path, layers, job.config, job.calibration, job.device, job.partial, journal)


def run(job: Job, journal: Journal, calibrated: Calibrated) -> list[LayerReport]:
    """Do every unit that is not done yet and write its tensors; figures of all quantized layers, in model order."""
    units, specs = job.todo.units, job.todo.specs
    done = {record["unit"]: record for record in journal.records}
    written = {name for unit in units if unit.name in done for name in outputs(unit, specs)}
    try:
        writer = ShardWriter(job.partial, specs, written, job.shard_bytes)
    except FileNotFoundError as error:
        raise StaleRunError(f"{error.filename} is gone from the unfinished run: {RESUME_OR_OVERWRITE}") from error
    needed, free = sum(spec.nbytes for name, spec in specs.items() if name not in written), shutil.disk_usage(job.partial).free
    if needed > free:
        raise LutqError(
            f"{job.partial} needs {size(needed)} and the disk has {size(free)} free: make room, or give another --out"
        )
    layers = []
    total = sum(torch.Size(unit.shape).numel() for unit in units)
    with tqdm(total=total, unit="w", unit_scale=True, smoothing=0.1, mininterval=progress_interval()) as bar:
        try:
            for unit in units:
                bar.set_description(unit.name, refresh=False)
                tensor = job.source.tensor(unit.key)
                record = done.get(unit.name)
                if record:
                    journal.check(record, tensor)
                else:
                    record = {"unit": unit.name, "sha256": fingerprint(tensor), **process(unit, tensor, job, writer, calibrated)}
                    writer.flush()
                    journal.add(record)
                if unit.layer:
                    nbytes = sum(specs[name].nbytes for name in outputs(unit, specs))
                    layers.append(LayerReport(unit.name, *unit.shape, unit.layer, nbytes, record["error"], record["norm"]))
                    bar.set_postfix(error=f"{relative_error(layers[-1:]):.4f}", refresh=False)
                bar.update(tensor.numel())
            writer.write(job.todo.guard, torch.empty(0, dtype=job.todo.dtype))
            writer.flush()
        finally:
            writer.close()
    writer.write_index()
    return layers


def process(unit: Unit, tensor: torch.Tensor, job: Job, writer: ShardWriter, calibrated: Calibrated) -> dict[str, float]:
    """Quantize or convert one tensor, or take what calibration made of it, and write it.

    Returns squared norms of a quantized weight and of its error.
    """
    if not tensor.is_floating_point():
        raise LutqError(f"{unit.key} has dtype {tensor.dtype}, which is no plain weight: give an unquantized checkpoint")
    if not torch.isfinite(tensor).all():
        raise LutqError(f"{unit.key} holds NaN or infinite values: give an undamaged checkpoint")
    if unit.layer is None:
        kept = calibrated.vectors.get(unit.name, tensor).to(job.todo.dtype)
        if not torch.isfinite(kept).all():
            raise LutqError(f"{unit.key} does not fit into {job.todo.dtype}: use --dtype bfloat16")
        writer.write(unit.name, kept)
        return {}
    with out_of_memory(lambda: memory_advice(unit, job.device)):
        W = tensor.to(job.device)
        if W.abs().max() > LARGEST_SCALE:
            raise LutqError(f"{unit.key} has weights beyond the {LARGEST_SCALE:.0f} of fp16 scales: skip it with an override")
        packed = calibrated.layer(unit.name, job.device) or fit(W, unit.layer, job.config)
        values = weight(packed, unit.layer, W.shape[1])
        W = calibrated.fitted(unit.name, W)
        figures = {"error": squared_norm(W - values), "norm": squared_norm(W)}
    for part, content in to_tensors(packed).items():
        writer.write(f"{unit.name}.{part}", content)
    return figures


def squared_norm(values: torch.Tensor) -> float:
    """Sum of squares, in float64 over fp32 row sums (the same on every run)."""
    return values.square().sum(1).double().sum().item()


def memory_advice(unit: Unit, device: torch.device) -> str:
    """What quantizing one layer takes, against what there is."""
    bytes_each = 40 if unit.layer.corrected else 16  # corrections are fitted to a layer as a whole
    needed = bytes_each * unit.shape[0] * unit.shape[1] + 100 * CHUNK[device.type]
    words = f"{unit.name} needs about {size(needed)} on {device.type}, where {size(free_memory(device))} is free"
    return (
        f"{words}; close other programs"
        + (" or leave corrections out" if unit.layer.corrected else "")
        + (" or use --device cpu" if device.type == "cuda" else "")
        + " and run the command again"
    )


def finish(job: Job, report: Report) -> None:
    """Everything beside the weights."""
    modules = {figures.name: figures.layer.to_dict() for figures in report.layers}
    quantization = {
        "guard": job.todo.guard,
        **({"lowest_bits": job.config.lowest_bits} if job.config.lowest_bits else {}),
        "modules": modules,
        "settings": job.config.to_dict()
        | ({"calibration": job.calibration.record()} if job.calibration else {})
        | ({"latency": job.latency} if job.latency else {}),
    }
    write_beside(job.partial, job.source, job.structure, model_card(report), dtype_name(job.todo.dtype), quantization)
