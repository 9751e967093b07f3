"""Scales of input channels that make a block easier to quantize and cost nothing when it runs.

Input k of a Linear layer may be divided by s_k where its weights W[:, k] are multiplied by s_k: y = (W diag(s)) (x / s). What is
fitted then is W diag(s), so inputs with a larger s_k get a smaller error. The division is folded into the layer that makes x, its
`source`: a norm, or another Linear layer where only functions that commute with positive factors lie between (v and o, up and
down, fc1 and fc2 through ReLU).

    s = |x|^alpha / |w|^beta      mean absolute input and root mean square weight of a channel, geometric mean of s 1

is the family of AWQ (arXiv 2306.00978). Its exponents are searched per place by the error of the block's outputs when the layers
there are quantized, no scaling being the first try. The layers' own output errors mislead for q, k and v, whose effects differ:
chosen by them, scales lowered the errors and raised the perplexity of the embedded model, at 2 bits by half.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from lutq.blocks import Blocks, batch_size, input_stages, visit_inputs
from lutq.config import LayerConfig, QuantConfig
from lutq.fit import solve_layers
from lutq.hessian import accumulate, damp
from lutq.pack import weight
from lutq.refine import block_error

ALPHAS = (0.15, 0.3, 0.5, 0.75, 1.0)
BETAS = (0.0, 0.5)  # the first is no scaling
SMALLEST = 1e-4  # of their mean that inputs and weights count as at least
LARGEST = 64.0  # factor between a scale and their mean, so that folded norms and biases stay well inside fp16


class Place(NamedTuple):
    """Where scales can be folded in a block. readers: Linear layers that take the same x [..., K]. channels: int64 [K], the
    output of `source` that each input comes from; shared where query heads share a key-value head.
    """

    source: str
    readers: tuple[str, ...]
    channels: torch.Tensor


@torch.no_grad()
def fold(block: torch.nn.Module, place: Place, s: torch.Tensor) -> None:
    """Divide the outputs of the source by s [outputs], positive, and multiply the readers' inputs by it, in place."""
    source = block.get_submodule(place.source)
    source.weight.div_(s if source.weight.dim() == 1 else s[:, None])
    if getattr(source, "bias", None) is not None:
        source.bias.div_(s)
    for name in place.readers:
        block.get_submodule(name).weight.mul_(s[place.channels])


def candidates(block: torch.nn.Module, stages: list[list[str]], head_dim: int) -> Iterator[Place]:
    """Places that agree in size, in order of use; whether the function survives is not known yet.

    stages: as `input_stages` returns them. A source has as many outputs as its readers have inputs, or is a layer of whole
    heads of which every one serves an equal number of heads that follow one another.
    """
    norms = [name for name, module in block.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 1]
    for number, readers in enumerate(stages):
        K = block.get_submodule(readers[0]).in_features
        for source in (*norms, *itertools.chain(*stages[:number])):
            N = len(block.get_submodule(source).weight)
            if N == K:
                yield Place(source, tuple(readers), torch.arange(K))
            elif source not in norms and K % N == 0 and N % head_dim == 0:
                heads = torch.arange(N).view(-1, 1, head_dim).expand(-1, K // N, -1)
                yield Place(source, tuple(readers), heads.flatten())


@torch.no_grad()
def places(walk: Blocks, i: int, hidden: torch.Tensor, layers: dict[str, LayerConfig]) -> list[Place]:
    """Where scales can be folded in block i: every candidate that leaves the block's output for hidden [1, L, d] as it is.

    Each is tried with powers of two, which rounding does not touch, so the output must stay the same bit for bit. Only layers
    that are quantized, the keys of `layers`, change.
    """
    block, prefix, config = walk.blocks[i], walk.name(i), walk.model.config
    stages = input_stages(walk, i, hidden)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    before, random, found = walk.run(block, i, hidden), torch.Generator().manual_seed(0), []
    for place in candidates(block, stages, head_dim):
        linears = [n for n in (place.source, *place.readers) if isinstance(block.get_submodule(n), torch.nn.Linear)]
        taken = any(place.readers == other.readers or place.source == other.source for other in found)
        if taken or any(f"{prefix}.{name}" not in layers for name in linears):
            continue
        place = place._replace(channels=place.channels.to(walk.device))
        N = len(block.get_submodule(place.source).weight)
        s = (2.0 ** torch.randint(0, 2, (N,), generator=random)).to(walk.device)
        fold(block, place, s)
        if torch.equal(walk.run(block, i, hidden), before):
            found.append(place)
        fold(block, place, 1 / s)
    return found


def scales_of(x: torch.Tensor, w: torch.Tensor, channels: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Scales s fp32 [outputs of the source] for mean absolute inputs x [K] and root mean square weights w [K] of its readers."""
    same = channels.argsort(stable=True).view(int(channels.max()) + 1, -1)  # inputs of each output
    x, w = (value[same].mean(1) for value in (x, w))
    x, w = (value.clamp(min=max(SMALLEST * value.mean().item(), 1e-30)).log() for value in (x, w))
    log = alpha * x - beta * w
    return (log - log.mean()).exp().clamp(1 / LARGEST, LARGEST)


@torch.no_grad()
def search(
    walk: Blocks, i: int, hidden: torch.Tensor, place: Place, layers: dict[str, LayerConfig], config: QuantConfig
) -> tuple[torch.Tensor, float, float]:
    """The best scales s [outputs of the source] for a place in block i, and the block's output error without and with them.

    hidden: what enters the block [n, L, d]. First beta is chosen with alpha = 0, then alpha rises while the error falls.
    """
    block, prefix = walk.blocks[i], walk.name(i)
    linears = [block.get_submodule(name) for name in place.readers]
    settings = [layers[f"{prefix}.{name}"] for name in place.readers]
    weights, K = [linear.weight.data for linear in linears], linears[0].in_features
    H, x = torch.zeros(K, K, device=walk.device), torch.zeros(K, device=walk.device)

    def visit(inputs: torch.Tensor) -> None:
        accumulate(H, inputs)
        x.add_(inputs.reshape(-1, K).abs().sum(0))

    visit_inputs(walk, i, hidden, place.readers[0], visit)
    tokens = hidden.shape[:2].numel()
    w = torch.cat(weights).square().mean(0).sqrt()
    hidden = hidden[: batch_size(hidden)]
    original = walk.through(block, i, hidden)

    def attempt(alpha: float, beta: float) -> tuple[float, torch.Tensor]:
        s = scales_of(x / tokens, w, place.channels, alpha, beta)
        inputs = s[place.channels]
        for linear, Q in zip(linears, quantized(weights, H / tokens, inputs, settings, config), strict=True):
            linear.weight.data = Q
        error = block_error(walk.through(block, i, hidden), original).item()
        for linear, W in zip(linears, weights, strict=True):
            linear.weight.data = W
        return error, s

    tries = [(*attempt(0.0, beta), beta) for beta in BETAS]
    error, s, beta = min(tries, key=lambda trial: trial[0])
    for alpha in ALPHAS:
        tried, other = attempt(alpha, beta)
        if tried >= error:
            break
        error, s = tried, other
    return s, tries[0][0], error


def quantized(
    weights: list[torch.Tensor], H: torch.Tensor, s: torch.Tensor, layers: list[LayerConfig], config: QuantConfig
) -> list[torch.Tensor]:
    """What layers W [N, K] become when W diag(s) is quantized, divided by s again; H, s: second moments [K, K] and scales [K] of
    the inputs. The fit is without corrections and, with `feedback`, a quick one: the choice of s needs no more. Where H needs
    more damping than was asked for, that is not told here: it touches this choice alone, and the fit of the layer tells its own.
    """
    config = dataclasses.replace(config, lowest_bits=0, rounds=min(config.rounds, 1), sweeps=0)
    H = damp(H / (s[:, None] * s), config.damping).H
    bare = [layer.bare() for layer in layers]
    fits = solve_layers([W * s for W in weights], H, bare, config)
    return [weight(fit, layer, len(s)) / s for (fit, _, _), layer in zip(fits, bare, strict=True)]


@torch.no_grad()
def scale_block(
    walk: Blocks,
    i: int,
    hidden: torch.Tensor,
    layers: dict[str, LayerConfig],
    config: QuantConfig,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Search and fold the scales of block i, whose layers are not quantized yet; returns them as `scaled` takes them.

    hidden: what enters the block [n, L, d]. Every place is told to `say`, with the errors of `search`.
    """
    block, prefix, scales = walk.blocks[i], walk.name(i), {}
    for place in places(walk, i, hidden[:1], layers):
        s, before, after = search(walk, i, hidden, place, layers, config)
        fold(block, place, s)
        scales |= by_name(prefix, place, s)
        say(f"{prefix}.{place.source}  scales for {', '.join(place.readers)}: block error {before:.4f} -> {after:.4f}")
    if not scales:
        say(f"{prefix}  no place where scales can be folded")
    return scales


def by_name(prefix: str, place: Place, s: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scales s [outputs of the source] of a place in the block `prefix`, as `scaled` takes them."""
    inputs = {f"{prefix}.{name}.inputs": s[place.channels].cpu() for name in place.readers}
    return {f"{prefix}.{place.source}.outputs": s.cpu()} | inputs


def scaled(W: torch.Tensor, name: str, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """W [N, K] of the layer `name` with its scales folded into it: NAME.outputs [N], which divide, and NAME.inputs [K]."""
    if f"{name}.outputs" in scales:
        W = W / scales[f"{name}.outputs"].to(W.device)[:, None]
    return W * scales[f"{name}.inputs"].to(W.device) if f"{name}.inputs" in scales else W
