"""Gradient tuning of what a checkpoint stores in 16 bits anyway, scales, offsets, norms and biases, and of codes if wanted.

`refine` fits one quantized block to the outputs of the original block; `distill` fits the whole quantized model to the
original's distribution of the next token (Kullback-Leibler divergence). The latter needs no labels. Block by block, then end
to end is the order of EfficientQAT (arXiv 2407.11062); learning only the scales of binary codes end to end, that of AnyBCQ
(arXiv 2510.10467).

Some windows are held out. What counts is the loss on them: the best state is kept, the first one included, so that no stage
ends worse than it began.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lutq.errors import LutqError
from lutq.tunable import tunables

TOKENS = 2048  # of an optimizer step
BETAS = (0.9, 0.95)
WARMUP = 10  # steps
HELD_OUT = 8  # one window in so many
VECTORS = 0.3  # rate of norms and biases, absolute; that of scales and offsets counts in multiples of their own size

Loss = Callable[[torch.Tensor], torch.Tensor]  # numbers of some windows [B] -> mean loss over them


def tunable_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What the `Tunable` layers of a module learn, and every vector (norms, biases), by name.

    Without the vectors where layers have several precisions, which share them and are tuned one after the other.
    """
    layers = dict(tunables(module))
    grids = {f"{name}.{part}".lstrip(".") for name, layer in layers.items() for part in layer.learned()}
    shared = any(layer.lower for layer in layers.values())
    return {name: p for name, p in module.named_parameters() if name in grids or (p.dim() == 1 and not shared)}


def split_windows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the windows to learn from and of those held out, of `count`; of a single one, the same twice."""
    numbers = torch.arange(count)
    held_out = numbers % HELD_OUT == HELD_OUT - 1
    held_out[-1] = True
    return (numbers[~held_out] if count > 1 else numbers), numbers[held_out]


@torch.no_grad()
def mean_loss(loss: Loss, windows: torch.Tensor, batch: int) -> float:
    """Mean loss over numbered windows."""
    total = sum(loss(part).double().item() * len(part) for part in windows.split(batch))
    return total / len(windows)


class Tuner:
    """An optimization of the tunable parameters of `module` by `loss`, one epoch at a time.

    count windows of `length` tokens; rate: a scale's largest step, relative to the root mean square of its layer's scales,
    falling along a cosine over `epochs`. `state` and `restore` let it go on elsewhere bit for bit. Raises LutqError for a loss
    that is NaN or infinite before the first step.
    """

    def __init__(self, module: torch.nn.Module, loss: Loss, count: int, length: int, epochs: int, rate: float, seed: int) -> None:
        self.loss, self.epochs, self.seed, self.epoch = loss, epochs, seed, 0
        self.parameters = tunable_parameters(module)
        self.layers = [layer for _, layer in tunables(module)]
        self.batch = max(1, TOKENS // length)
        self.learned, self.held_out = split_windows(count)
        self.rates = [rate_of(p, rate) for p in self.parameters.values()]
        self.optimizer = torch.optim.Adam([{"params": [p]} for p in self.parameters.values()], lr=0.0, betas=BETAS)
        self.first = self.best_loss = mean_loss(loss, self.held_out, self.batch)
        if not math.isfinite(self.first):
            raise LutqError("the loss before tuning is NaN or infinite on the calibration text: give an undamaged model")
        self.best = self.snapshot()

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of the parameters."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def run_epoch(self) -> Iterator[float]:
        """Go over the windows once, in an order of its own; yields the loss of each step."""
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = self.learned[torch.randperm(len(self.learned), generator=random)].split(self.batch)
        for p in self.parameters.values():
            p.requires_grad_(requires_grad=True)
        for number, windows in enumerate(batches):
            step = self.epoch * len(batches) + number
            factor = min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / (self.epochs * len(batches)))) / 2
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad()
            loss = self.loss(windows)
            loss.backward()
            self.optimizer.step()
            for layer in self.layers:
                layer.bound()
            yield loss.item()
        for p in self.parameters.values():
            p.requires_grad_(requires_grad=False)
            p.grad = None
        self.epoch += 1
        now = mean_loss(self.loss, self.held_out, self.batch)
        if now < self.best_loss:
            self.best_loss, self.best = now, self.snapshot()

    def finish(self) -> None:
        """Put the best state into the module."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.best[name])

    def state(self) -> dict[str, Any]:
        """Everything that the next epochs depend on."""
        return {
            "epoch": self.epoch,
            "parameters": self.snapshot(),
            "optimizer": self.optimizer.state_dict(),
            "losses": (self.first, self.best_loss),
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.epoch, self.best = state["epoch"], state["best"]
        self.first, self.best_loss = state["losses"]
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["parameters"][name])


def rate_of(p: torch.nn.Parameter, rate: float) -> float:
    """Step size of one parameter: vectors have theirs, scales and offsets count in multiples of their root mean square."""
    return VECTORS * rate if p.dim() == 1 else rate * max(p.detach().square().mean().sqrt().item(), 1e-6)


def divergence(logits: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the distribution of `logits` [..., V] from that of `original`, nats per token."""
    student, teacher = (values.flatten(0, -2).float().log_softmax(-1) for values in (logits, original))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def block_error(outputs: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Squared error of a block's outputs, relative to the size of the original ones."""
    return (outputs - original).square().mean() / original.square().mean()
