"""The calibrated stages of `lutq quantize`: every block is solved and refined in turn, on the outputs of the quantized blocks
before it; then the whole is distilled.

Results stay in memory for the writer and, block by block, in `calibration/` inside the unfinished output, with the hidden
states that the next block needs; an interrupted run goes on after its last block, or its last epoch of distilling, and ends
in the same bits.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lutq.blocks import Blocks, input_stages, visit_inputs
from lutq.calib import LONGEST, Calibration, read_calibration
from lutq.config import LayerConfig, QuantConfig
from lutq.diagonal import learn_block
from lutq.errors import LutqError
from lutq.fit import solve_layer
from lutq.hessian import accumulate, damp
from lutq.journal import Journal, fingerprint
from lutq.pack import PARTS, EightBit, Stored, bare, from_tensors, highest, to_tensors
from lutq.refine import Tuner, block_error, divergence
from lutq.report import CalibrationReport
from lutq.runtime import progress_interval
from lutq.store import FOLDER, Store
from lutq.transform import scale_block, scaled
from lutq.tunable import Tunable

HESSIAN_TOKENS = 1 << 17  # of the calibration text that Hessians are made from; more is for tuning


@dataclasses.dataclass
class Calibrated:
    """What calibration made of a model. packed: quantized layers. vectors: tensors tuned on the way, by name, fp32.

    scales: what was folded into layers before their fit, as `lutq.transform.scaled` takes it. errors: layer -> relative output
    error on the calibration text of the plain fit and of this one. distilled: see `CalibrationReport`. text: the calibration
    text in words.
    """

    packed: dict[str, Stored] = dataclasses.field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    scales: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    distilled: tuple[float, float] | None = None
    text: str = ""

    def layer(self, name: str, device: torch.device) -> Stored | None:
        """A quantized layer on `device`; None for one that calibration left to its plain fit."""
        packed = self.packed.get(name)
        return packed and from_tensors({part: tensor.to(device) for part, tensor in to_tensors(packed).items()})

    def fitted(self, name: str, W: torch.Tensor) -> torch.Tensor:
        """What a quantized layer stands for, fp32: W [N, K] of the source with all scales folded into it."""
        return scaled(W.float(), name, self.scales)

    def figures(self) -> CalibrationReport | None:
        """What the report says; None without calibration."""
        if not self.text:
            return None
        pairs = self.errors.values()
        before, after = (math.sqrt(sum(pair[i] ** 2 for pair in pairs) / max(len(pairs), 1)) for i in (0, 1))
        return CalibrationReport(self.text, before, after, self.distilled)


def calibration_for(path: Path, model_config: Any, config: QuantConfig) -> Calibration:
    """The calibration windows of a run, in the tokens of the model in `path`. Raises LutqError."""
    from lutq.tokens import load_tokenizer

    longest = getattr(model_config, "max_position_embeddings", None) or LONGEST
    if config.calib_length > longest:
        raise LutqError(f"calib_length is {config.calib_length} and the model takes {longest} tokens at most: use {longest}")
    length = config.calib_length or min(LONGEST, longest)
    return read_calibration(config.calib, load_tokenizer(path), config.calib_windows, length, config.seed)


def calibrate(
    path: Path,
    layers: dict[str, LayerConfig],
    config: QuantConfig,
    calibration: Calibration,
    device: torch.device,
    partial: Path,
    journal: Journal,
) -> Calibrated:
    """Quantize the Linear layers that `layers` names (those outside the blocks are left to the caller) of the model in `path`.

    The model lies in host memory, its current block in fp32 on `device`. Raises LutqError.
    """
    walk = Blocks(load_host(path, device), device)
    result = Calibrated(text=calibration.describe())
    store = Store(partial / FOLDER, journal)
    hidden = walk.embed(calibration.windows)
    streams = {"quantized": hidden, "original": hidden}
    done = store.blocks()
    if done:
        streams = {name: tensor.to(device) for name, tensor in store.load(f"hidden-{done}").items()}
    with tqdm(total=len(walk), unit="block", mininterval=progress_interval()) as bar:
        for i in range(len(walk)):
            digest = block_digest(walk.blocks[i])
            walk.blocks[i].to(device, torch.float32)
            if i < done:
                figures = store.figures(i, digest)
                kept = store.load(f"block-{i}")
                install(walk, i, layers, kept["block"])
                scales = kept["scales"]
            else:
                figures, streams, scales = calibrate_block(walk, i, streams, layers, config, bar)
                store.finish_block(i, digest, figures, {"block": walk.blocks[i].state_dict(), "scales": scales}, streams)
            result.errors |= {name: tuple(pair) for name, pair in figures.items()}
            result.packed |= {name: module.packed() for name, module in tunables(walk, i)}
            result.vectors |= vectors(walk, i)
            result.scales |= scales
            walk.blocks[i].to(device if config.distill else "cpu")
            bar.update()
    if config.distill:
        distill(walk, calibration.windows, streams["original"], config, result, store)
    return result


def load_host(path: Path, device: torch.device) -> torch.nn.Module:
    """The model in `path` in host memory: fp32 to be used there, else in its own dtype."""
    from lutq.hf import load
    from lutq.source import load_config

    return load(path, device="cpu", dtype=torch.float32 if device.type == "cpu" else load_config(path).dtype or torch.float16)


def tunables(walk: Blocks, i: int) -> Iterator[tuple[str, Tunable]]:
    """Full name and module of every quantized layer of block i."""
    for name, module in walk.blocks[i].named_modules():
        if isinstance(module, Tunable):
            yield f"{walk.name(i)}.{name}", module


def vectors(walk: Blocks, i: int) -> dict[str, torch.Tensor]:
    """Copies of the norms and biases of block i, by full name."""
    return {f"{walk.name(i)}.{name}": p.detach().clone().cpu() for name, p in walk.blocks[i].named_parameters() if p.dim() == 1}


def block_digest(block: torch.nn.Module) -> str:
    """A hash of everything a block holds."""
    digest = hashlib.sha256()
    for name, tensor in block.state_dict().items():
        digest.update(f"{name} {fingerprint(tensor)}".encode())
    return digest.hexdigest()


def calibrate_block(
    walk: Blocks, i: int, streams: dict[str, torch.Tensor], layers: dict[str, LayerConfig], config: QuantConfig, bar: tqdm
) -> tuple[dict[str, tuple[float, float]], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Solve and refine block i, which afterwards holds `Tunable` layers.

    Returns the figures of its layers, the hidden states [n, L, d] behind it, of the quantized blocks and of the original
    ones, and the scales that were folded into it.
    """
    block, prefix = walk.blocks[i], walk.name(i)
    original = walk.through(block, i, streams["original"]) if config.refine or config.distill else streams["original"]
    figures: dict[str, tuple[float, float]] = {}
    hidden = streams["quantized"]
    inputs = hidden[: max(1, HESSIAN_TOKENS // hidden.shape[1])]
    say = functools.partial(bar.write, file=sys.stderr)
    scale = learn_block if config.learned_scaling else scale_block
    scales = scale(walk, i, inputs, layers, config, say) if config.scaling or config.learned_scaling else {}
    for names in input_stages(walk, i, hidden):
        wanted = [name for name in names if f"{prefix}.{name}" in layers]
        if not wanted:
            continue
        K = block.get_submodule(wanted[0]).in_features
        H = torch.zeros(K, K, device=walk.device)
        visit_inputs(walk, i, inputs, wanted[0], lambda x, H=H: accumulate(H, x))
        damped = damp(H / inputs.shape[:2].numel(), config.damping, f"{prefix}.{wanted[0]}")
        if damped.reason:
            bar.write(f"lutq: {damped.reason}", file=sys.stderr)
        for name in wanted:
            linear, layer = block.get_submodule(name), layers[f"{prefix}.{name}"]
            packed, before, after = solve_layer(linear.weight.detach(), damped.H, layer, config)
            figures[f"{prefix}.{name}"] = before, after
            bar.write(f"{prefix}.{name}  output error {before:.4f} -> {after:.4f}", file=sys.stderr)
            W = linear.weight.detach() if config.flips and (config.refine or config.distill) else None
            block.set_submodule(name, Tunable(packed, K, layer, linear.bias, W).requires_grad_(requires_grad=False))
    if config.refine:

        def loss(windows: torch.Tensor) -> torch.Tensor:
            return block_error(walk.run(block, i, hidden[windows]), original[windows])

        tuner = Tuner(block, loss, len(hidden), hidden.shape[1], config.refine, config.rate, config.seed)
        for _ in range(config.refine):
            for _ in tuner.run_epoch():
                pass
        tuner.finish()
        bar.write(f"{prefix}  block error {tuner.first:.4f} -> {tuner.best_loss:.4f}", file=sys.stderr)
    store_rounded(block)
    return figures, {"quantized": walk.through(block, i, hidden), "original": original}, scales


@torch.no_grad()
def store_rounded(module: torch.nn.Module) -> None:
    """Give every `Tunable` inside the values that a checkpoint would hold."""
    for layer in module.modules():
        if isinstance(layer, Tunable):
            stored = layer.packed()
            packed, planes = highest(stored), bare(stored)
            layer.codes = packed.codes
            if isinstance(planes, EightBit):
                layer.scale_units, layer.offset_units = planes.scale_units, planes.offset_units
            layer.scales.copy_(packed.scales)
            if layer.offsets is not None:
                layer.offsets.copy_(packed.offsets)


@torch.no_grad()
def install(walk: Blocks, i: int, layers: dict[str, LayerConfig], state: dict[str, torch.Tensor]) -> None:
    """Put block i into the state that an earlier run left it in."""
    block, prefix = walk.blocks[i], walk.name(i)
    state = {name: tensor.to(walk.device) for name, tensor in state.items()}
    for name, module in list(block.named_modules()):
        if isinstance(module, torch.nn.Linear) and f"{prefix}.{name}" in layers:
            packed = from_tensors({part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state})
            W = module.weight.detach() if f"{name}.latent" in state else None
            tunable = Tunable(packed, module.in_features, layers[f"{prefix}.{name}"], module.bias, W)
            block.set_submodule(name, tunable.requires_grad_(requires_grad=False))
    block.load_state_dict(state)


def distill(
    walk: Blocks, windows: torch.Tensor, original: torch.Tensor, config: QuantConfig, result: Calibrated, store: Store
) -> None:
    """Tune the whole quantized model to the logits that follow from `original` [n, L, d], the original blocks' output."""
    kept = {name: p.detach().clone() for name, p in walk.model.named_parameters() if p.dim() == 1}

    def forward(i: int, hidden: torch.Tensor, extras: dict[str, Any]) -> torch.Tensor:
        block = walk.blocks[i]  # makes its activations anew in the backward pass
        return checkpoint(type(block).forward, block, hidden, use_reentrant=False, **extras)

    def loss(numbers: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = walk.logits(original[numbers], kept)
        with walk.replaced(forward) if walk.device.type == "cuda" else contextlib.nullcontext():
            return divergence(walk.model(windows[numbers].to(walk.device), use_cache=False).logits, wanted)

    tuner = Tuner(walk.model, loss, len(windows), windows.shape[1], config.distill, config.rate, config.seed)
    state = store.load("distill")
    if state:
        tuner.restore(state)
    with tqdm(total=config.distill * len(tuner.learned), unit="window", mininterval=progress_interval()) as bar:
        bar.update(tuner.epoch * len(tuner.learned))
        while tuner.epoch < config.distill:
            for step in tuner.run_epoch():
                bar.update(min(tuner.batch, len(tuner.learned)))
                bar.set_postfix(divergence=f"{step:.4f}", refresh=False)
            bar.set_description(f"divergence {tuner.first:.4f} -> {tuner.best_loss:.4f}", refresh=False)
            store.save("distill", tuner.state())
    tuner.finish()
    store_rounded(walk.model)
    for i in range(len(walk)):
        result.packed |= {name: module.packed() for name, module in tunables(walk, i)}
    result.vectors |= {name: p.detach().clone().cpu() for name, p in walk.model.named_parameters() if p.dim() == 1}
    result.distilled = tuner.first, tuner.best_loss
