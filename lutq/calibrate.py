"""The calibrated stages of `lutq quantize`: every block is solved and refined in turn, on the outputs of the quantized blocks
before it; then the whole is distilled.

Results stay in memory for the writer and, block by block, in `calibration/` inside the unfinished output, now and then with the
hidden states that the next block needs; an interrupted run goes on after its last block, or its last epoch of distilling, and
ends in the same bits.
"""

import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from lutq.blocks import Blocks, input_stages
from lutq.calib import Calibration
from lutq.config import LayerConfig, QuantConfig
from lutq.diagonal import learn_block
from lutq.distill import distill
from lutq.endloss import hessians, token_weights
from lutq.fit import solve_layers
from lutq.hessian import damp
from lutq.journal import Journal, fingerprint
from lutq.pack import PARTS, Stored, from_tensors, to_tensors
from lutq.refine import Tuner, block_error
from lutq.report import CalibrationReport
from lutq.runtime import out_of_memory, progress_interval
from lutq.store import FOLDER, Store
from lutq.transform import scale_block, scaled
from lutq.tunable import Tunable, run_at, store_rounded, tunables

HESSIAN_TOKENS = 1 << 17  # of the calibration text that Hessians are made from; more is for tuning
ORIGINAL = 16  # bits of the hidden states that the original blocks give


@dataclasses.dataclass
class Calibrated:
    """What calibration made of a model. packed: quantized layers. vectors: tensors tuned on the way, by name, fp32.

    scales: what was folded into layers before their fit, as `lutq.transform.scaled` takes it. errors: layer -> relative output
    error on the calibration text of the plain fit and of this one. distilled, weighted: see `CalibrationReport`. text: the
    calibration text in words.
    """

    packed: dict[str, Stored] = dataclasses.field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    scales: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    distilled: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    text: str = ""
    weighted: bool = False

    def add(self, module: torch.nn.Module, prefix: str = "") -> None:
        """Take over the quantized layers of a module, and its norms and biases; prefix: what its names lack."""
        self.packed |= {f"{prefix}{name}": layer.packed() for name, layer in tunables(module)}
        self.vectors |= {f"{prefix}{name}": p.detach().clone().cpu() for name, p in module.named_parameters() if p.dim() == 1}

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
        return CalibrationReport(self.text, before, after, self.distilled, self.weighted)


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

    The model lies in host memory, its current block in fp32 on `device`; for end_loss it was there as a whole before. Raises
    LutqError.
    """
    store = Store(partial / FOLDER, journal)
    weights, digests = end_loss_weights(path, layers, config, calibration.windows, device, store)
    walk = Blocks(load_host(path, device), device)
    result = Calibrated(text=calibration.describe(), weighted=config.end_loss)
    hidden = walk.embed(calibration.windows)
    streams = {bits: hidden.clone() for bits in (*config.precisions, *([ORIGINAL] if config.tuned else []))}
    del hidden
    done = store.blocks()
    known, kept = store.hidden()
    if kept:
        streams = {bits: tensor.to(device) for bits, tensor in kept.items()}
    with tqdm(total=len(walk), unit="block", mininterval=progress_interval()) as bar:
        for i in range(len(walk)):
            digest = block_digest(walk.blocks[i])
            if digests:
                store.check(i, digest, digests[i])
            walk.blocks[i].to(device, torch.float32)
            if i < done:
                figures = store.figures(i, digest)
                if i >= known and config.tuned:
                    walk.advance(walk.blocks[i], i, streams[ORIGINAL])
                state = store.load(f"block-{i}")
                install(walk, i, layers, state["block"])
                scales = state["scales"]
                for bits in config.precisions if i >= known else ():
                    run_at(walk.blocks[i], bits)
                    walk.advance(walk.blocks[i], i, streams[bits])
            else:
                figures, scales = calibrate_block(walk, i, streams, layers, weights, config, bar)
                store.finish_block(i, digest, figures, {"block": walk.blocks[i].state_dict(), "scales": scales}, streams)
            result.errors |= {name: tuple(pair) for name, pair in figures.items()}
            result.add(walk.blocks[i], f"{walk.name(i)}.")
            result.scales |= scales
            walk.blocks[i].to(device if config.distill else "cpu")
            bar.update()
    if config.distill:
        result.distilled = distill(walk, calibration.windows, streams[ORIGINAL], config, store)
        result.add(walk.model)
    return result


def load_host(path: Path, device: torch.device) -> torch.nn.Module:
    """The model in `path` in host memory: fp32 to be used there, else in its own dtype."""
    from lutq.hf import load
    from lutq.source import load_config

    return load(path, device="cpu", dtype=torch.float32 if device.type == "cpu" else load_config(path).dtype or torch.float16)


def block_digest(block: torch.nn.Module) -> str:
    """A hash of everything a block holds."""
    digest = hashlib.sha256()
    for name, tensor in block.state_dict().items():
        digest.update(f"{name} {fingerprint(tensor)}".encode())
    return digest.hexdigest()


def end_loss_weights(
    path: Path, layers: dict[str, LayerConfig], config: QuantConfig, windows: torch.Tensor, device: torch.device, store: Store
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights [n, L] of the tokens that Hessians are made from, for each of `layers`, and the digests of the blocks behind them;
    nothing where the settings do not ask for weights. Those of an interrupted run are kept, since a GPU may not repeat the bits.
    """
    if not config.end_loss:
        return {}, []
    state = store.load("end-loss")
    if state is None:
        walk = Blocks(load_host(path, device), device)
        digests = [block_digest(block) for block in walk.blocks]
        with out_of_memory(lambda: f"end_loss needs the whole model on {device}: use --device cpu or leave it out"):
            walk.model.to(device, torch.float32)
            state = {"weights": token_weights(walk, hessian_part(windows), layers, config.seed), "digests": digests}
        store.save("end-loss", state)
    return state["weights"], state["digests"]


def hessian_part(windows: torch.Tensor) -> torch.Tensor:
    """Those of some windows [n, L, ...] that Hessians are made from."""
    return windows[: max(1, HESSIAN_TOKENS // windows.shape[1])]


def calibrate_block(
    walk: Blocks,
    i: int,
    streams: dict[int, torch.Tensor],
    layers: dict[str, LayerConfig],
    weights: dict[str, torch.Tensor],
    config: QuantConfig,
    bar: tqdm,
) -> tuple[dict[str, tuple[float, float]], dict[str, torch.Tensor]]:
    """Solve and refine block i, which afterwards holds `Tunable` layers.

    streams: the hidden states [n, L, d] before it at each precision, of the quantized blocks, and, where anything is tuned, at
    `ORIGINAL` of the original ones; they become those behind it. weights: see `hessians`. Returns the figures of its layers
    and the scales that were folded into it.
    """
    block, prefix = walk.blocks[i], walk.name(i)
    if config.tuned:
        walk.advance(block, i, streams[ORIGINAL])
    figures: dict[str, tuple[float, float]] = {}
    hidden = streams[config.bits]
    inputs = {bits: hessian_part(streams[bits]) for bits in config.precisions}
    say = functools.partial(bar.write, file=sys.stderr)
    scale = learn_block if config.learned_scaling else scale_block
    scales = scale(walk, i, inputs[config.bits], layers, config, say) if config.scaling or config.learned_scaling else {}
    for names in input_stages(walk, i, hidden):
        wanted = [name for name in names if f"{prefix}.{name}" in layers]
        if not wanted:
            continue
        for alike, Hs in damped_hessians(walk, i, inputs, wanted, weights, config, say).items():
            linears = [block.get_submodule(name) for name in alike]
            settings = [layers[f"{prefix}.{name}"] for name in alike]
            Ws = [linear.weight.detach() for linear in linears]
            solved = solve_layers(Ws, Hs[config.bits], settings, config, Hs)
            for name, linear, layer, W, (packed, before, after) in zip(alike, linears, settings, Ws, solved, strict=True):
                figures[f"{prefix}.{name}"] = before, after
                say(f"{prefix}.{name}  output error {before:.4f} -> {after:.4f}")
                tunable = Tunable(packed, W.shape[1], layer, linear.bias, W if config.flips and config.tuned else None)
                block.set_submodule(name, tunable.requires_grad_(requires_grad=False))
    for bits in config.precisions:
        run_at(block, bits)
        if config.refine and (any(tunables(block)) or not config.lowest_bits):  # vectors alone are of all precisions
            first, best = refine_block(walk, i, streams[bits], streams[ORIGINAL], config)
            say(f"{prefix}  block error {first:.4f} -> {best:.4f}{config.at(bits)}")
        store_rounded(block)
        walk.advance(block, i, streams[bits])
    return figures, scales


def damped_hessians(
    walk: Blocks,
    i: int,
    inputs: dict[int, torch.Tensor],
    names: list[str],
    weights: dict[str, torch.Tensor],
    config: QuantConfig,
    say: Callable[[str], None],
) -> dict[tuple[str, ...], dict[int, torch.Tensor]]:
    """Damped Hessians fp32 [K, K] of the Linear layers `names` of block i, which read the same inputs, at each precision of
    `inputs` [n, L, d], by the layers that they are for. weights: see `hessians`.
    """
    found: dict[tuple[str, ...], dict[int, torch.Tensor]] = {}
    for bits, hidden in inputs.items():
        run_at(walk.blocks[i], bits)
        for alike, H in hessians(walk, i, hidden, names, weights):
            damped = damp(H, config.damping, f"{walk.name(i)}.{alike[0]}")
            if damped.reason:
                say(f"lutq: {damped.reason}")
            found.setdefault(tuple(alike), {})[bits] = damped.H
    return found


def refine_block(walk: Blocks, i: int, hidden: torch.Tensor, original: torch.Tensor, config: QuantConfig) -> tuple[float, float]:
    """Tune block i, at the precision at which it runs, to `original` [n, L, d], what its original makes of the original hidden
    states; hidden: what enters it. Returns the errors on held-out windows before and after.
    """
    block = walk.blocks[i]

    def loss(windows: torch.Tensor) -> torch.Tensor:
        return block_error(walk.run(block, i, hidden[windows]), original[windows])

    tuner = Tuner(block, loss, len(hidden), hidden.shape[1], config.refine, config.rate, config.seed)
    for _ in range(config.refine):
        for _ in tuner.run_epoch():
            pass
    tuner.finish()
    return tuner.first, tuner.best_loss


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
