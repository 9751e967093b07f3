"""How much the end loss feels an error of a layer's outputs, token by token.

The Hessians of lutq/hessian.py count all tokens alike. An error e [N] of a layer's outputs z at one token raises the divergence
of the predictions from the original model's by e^T F e / 2 in second order, F = E[g g^T] the Fisher information: g = dL/dz, L the
cross-entropy summed over a window, its next tokens drawn from the model's own predictions (YAQA, arXiv 2505.22988). Of F one
number per token is kept, its mean diagonal as one draw tells it:

    s_t = |dL/dz_t|^2 / N          H = sum_t s_t x_t x_t^T / sum_t s_t

This is GuidedQuant (arXiv 2505.07004) with one group of outputs, which takes the text's next tokens; SqueezeLLM (arXiv
2306.07629) weighs weights in this way. On the embedded model at 2 bits the text's tokens gave four fifths of the gain of drawn
ones. A few tokens, the first of a window above all, count for very much in some layers, and are meant to: with weights of four
times the mean at most a third of the gain was lost.
"""

import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lutq.blocks import Blocks, visit_inputs
from lutq.errors import LutqError
from lutq.hessian import accumulate
from lutq.runtime import progress_interval

TOKENS = 2048  # that go through the model at a time


def token_weights(walk: Blocks, windows: torch.Tensor, names: Iterable[str], seed: int) -> dict[str, torch.Tensor]:
    """Weights fp32 [n, L], of mean 1, for each of the layers of `squared_gradients`, whose arguments these are."""
    return {name: normalized(s, name) for name, s in squared_gradients(walk, windows, names, seed).items()}


def normalized(s: torch.Tensor, name: str) -> torch.Tensor:
    """Squares fp64 [n, L] as weights fp32 of mean 1; where all are zero, ones, and lutq says so.

    Raises LutqError for NaN or infinite squares, which means such gradients of the layer called `name`.
    """
    mean = s.mean()
    if not torch.isfinite(mean):
        raise LutqError(f"the gradients of {name} are NaN or infinite on the calibration text: leave end_loss out")
    if mean == 0:
        print(f"lutq: the end loss does not feel {name} on the calibration text: its tokens count alike", file=sys.stderr)
        return torch.ones_like(s, dtype=torch.float32)
    return (s / mean).float()


def squared_gradients(walk: Blocks, windows: torch.Tensor, names: Iterable[str], seed: int) -> dict[str, torch.Tensor]:
    """The squares s fp64 [n, L] for each of the Linear layers `names` inside the blocks, on windows int64 [n, L].

    The model lies on its device in fp32, and every block makes its activations anew in the backward pass. Raises LutqError for
    predictions that are NaN or infinite, and for a layer that does not see every token once.
    """
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    random = torch.Generator(walk.device).manual_seed(seed)

    def watch(name: str) -> Callable[..., None]:
        def record(gradient: torch.Tensor) -> None:
            squares[name].append(gradient.flatten(0, -2).double().square().mean(1))

        def hook(_: torch.nn.Module, __: tuple[torch.Tensor, ...], z: torch.Tensor) -> None:
            z.register_hook(record)

        return hook

    handles = [walk.model.get_submodule(name).register_forward_hook(watch(name)) for name in squares]
    with tqdm(total=len(windows), unit="window", desc="end loss", mininterval=progress_interval()) as bar:
        for part in windows.split(max(1, TOKENS // windows.shape[1])):
            hidden = walk.embed(part).requires_grad_()
            for i, block in enumerate(walk.blocks):
                hidden = checkpoint(walk.run, block, i, hidden, use_reentrant=False)
            logits = walk.logits(hidden, {}).flatten(0, 1).float()
            F.cross_entropy(logits, draw(logits.detach(), random), reduction="sum").backward()
            bar.update(len(part))
    for handle in handles:
        handle.remove()
    for name, parts in squares.items():
        if sum(map(len, parts)) != windows.numel():
            raise LutqError(f"end_loss needs layers that see every token once, and {name} does not: leave end_loss out")
    return {name: torch.cat(parts).view(windows.shape) for name, parts in squares.items()}


def draw(logits: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Tokens int64 [M] as logits fp32 [M, V] predict them. Raises LutqError for NaN or infinite logits."""
    if not torch.isfinite(logits).all():
        raise LutqError("the model's predictions are NaN or infinite on the calibration text: give an undamaged model")
    return torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]


def hessians(
    walk: Blocks, i: int, hidden: torch.Tensor, names: list[str], weights: dict[str, torch.Tensor]
) -> list[tuple[list[str], torch.Tensor]]:
    """H fp32 [K, K] of the Linear layers `names` of block i, which read the same inputs, with the layers that it is for: one for
    all, or with weights one each.

    hidden: what enters the block [n, L, d]. weights: of its tokens [n, L], by the full name of every layer, or none at all.
    """
    K = walk.blocks[i].get_submodule(names[0]).in_features
    alike = [[name] for name in names] if weights else [names]
    chosen = [weights[f"{walk.name(i)}.{name}"].to(walk.device).flatten() if weights else None for name, *_ in alike]
    sums = [torch.zeros(K, K, device=walk.device) for _ in alike]
    begin = 0

    def visit(x: torch.Tensor) -> None:
        nonlocal begin
        end = begin + x.shape[:-1].numel()
        for H, s in zip(sums, chosen, strict=True):
            accumulate(H, x, None if s is None else s[begin:end])
        begin = end

    visit_inputs(walk, i, hidden, names[0], visit)
    return [(members, H / hidden.shape[:2].numel()) for members, H in zip(alike, sums, strict=True)]
