"""Scales of input channels learned by gradient. Places and folding are those of lutq/transform.py, so they cost nothing when the
model runs either.

All scales of a block are learned together, by the error of the block's outputs with every layer W [N, K] replaced by

    Q(W t) / t      t_nk = s_k / r_n: s_k scales input k, and r_n divides output n where the layer is a source itself

which is what the folded and quantized layer amounts to between neighbours that are not folded. Learning equivalent
transformations is OmniQuant's idea (arXiv 2308.13137); of AffineQuant's matrices (arXiv 2403.12544) this is the diagonal. Q
stands for the fit to come: the nearest levels of a uniform grid with a searched clipping range. Gradients pass straight through
the rounding; the size of a step follows the range of its group, so widening a channel has its price.

One window in eight is held out. The best state on those is taken, the start included, and is kept only if the fit itself, a
quick one, has no larger error on them than without.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lutq import uniform
from lutq.blocks import Blocks, input_stages, visit_inputs
from lutq.config import LayerConfig, QuantConfig
from lutq.hessian import accumulate
from lutq.pack import group_size
from lutq.refine import Tuner, block_error, split_windows
from lutq.transform import LARGEST, Place, by_name, fold, places, quantized, scale_block

STRIDE = 10.0  # log s is learned in this unit: it moves so many times as far as a norm does in `refine`


class Diagonal(torch.nn.Module):
    """The logarithms of the scales of some places, in units of STRIDE, and a block's quantized weights as a function of them.

    start: scales fp32 [outputs of the source] of each place. weights: name in the block -> W fp32 [N, K] of every layer that is
    to be quantized, as `layers` says.
    """

    def __init__(
        self, found: list[Place], start: list[torch.Tensor], weights: dict[str, torch.Tensor], layers: dict[str, LayerConfig]
    ) -> None:
        super().__init__()
        self.places, self.original, self.layers = found, weights, layers
        self.logs = torch.nn.ParameterList(s.log() / STRIDE for s in start)

    def scales(self) -> list[torch.Tensor]:
        """Scales s [outputs of the source] of each place, between 1 / LARGEST and LARGEST; a common factor would do nothing."""
        most = math.log(LARGEST)
        return [(STRIDE * (log - log.mean())).clamp(-most, most).exp() for log in self.logs]

    def weights(self) -> dict[str, torch.Tensor]:
        """Q(W t) / t of every layer, by the name of its weight."""
        inputs, outputs = {}, {}
        for place, s in zip(self.places, self.scales(), strict=True):
            outputs[place.source] = s
            inputs |= dict.fromkeys(place.readers, s[place.channels])
        result = {}
        for name, W in self.original.items():
            t = torch.ones_like(W)
            if name in inputs:
                t = t * inputs[name]
            if name in outputs:
                t = t / outputs[name][:, None]
            result[f"{name}.weight"] = rounded(W * t, self.layers[name]) / t
        return result


def rounded(W: torch.Tensor, layer: LayerConfig) -> torch.Tensor:
    """W fp32 [N, K] on the uniform grid of a layer's bits and groups; the gradient is that of an error that keeps its share of a
    step inside the grid, and of the outermost level beyond it.
    """
    N, K = W.shape
    g, steps = group_size(layer.group, K), 2**layer.bits - 1
    w = F.pad(W, (0, -K % g)).unflatten(1, (-1, g)).flatten(0, 1)
    symmetric = not layer.offsets
    fit = uniform.rtn(w.detach(), layer.bits, symmetric)
    size = w.abs().amax(1) if symmetric else w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)
    scales = fit.scales * (1 + (size - size.detach()) / size.detach().clamp(min=1e-30))  # a group of zeros has size 0
    center = torch.full_like(scales, steps / 2) if fit.zero_points is None else fit.zero_points
    x = w / scales[:, None] + center[:, None]
    u = (x + (x.round() - x).detach()).clamp(0, steps)
    return (scales[:, None] * (u - center[:, None])).unflatten(0, (N, -1)).flatten(1)[:, :K]


def outputs_with(walk: Blocks, i: int, weights: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Block i with `weights` in place of its own."""
    return lambda hidden, **extras: torch.func.functional_call(walk.blocks[i], weights, (hidden,), extras)


@torch.no_grad()
def fitted_error(
    walk: Blocks, i: int, hidden: torch.Tensor, original: torch.Tensor, layers: dict[str, LayerConfig], config: QuantConfig
) -> float:
    """Error of block i as it is, against its `original` outputs [n, L, d] for hidden [n, L, d], on the windows held out, when all
    its `layers` are fitted as `quantized` does it on the other windows.
    """
    block, weights = walk.blocks[i], {}
    learned, held_out = split_windows(len(hidden))
    for stage in input_stages(walk, i, hidden):
        names = [name for name in stage if name in layers]
        if not names:
            continue
        K = block.get_submodule(names[0]).in_features
        H = torch.zeros(K, K, device=walk.device)
        visit_inputs(walk, i, hidden[learned], names[0], lambda x, H=H: accumulate(H, x))
        H /= len(learned) * hidden.shape[1]
        Ws, settings = [block.get_submodule(name).weight for name in names], [layers[name] for name in names]
        fits = quantized(Ws, H, torch.ones(K, device=walk.device), settings, config)
        weights |= {f"{name}.weight": Q for name, Q in zip(names, fits, strict=True)}
    return block_error(walk.through(outputs_with(walk, i, weights), i, hidden[held_out]), original[held_out]).item()


def learn(
    walk: Blocks, i: int, hidden: torch.Tensor, original: torch.Tensor, starts: list[Diagonal], config: QuantConfig
) -> tuple[list[torch.Tensor], float, float]:
    """Scales learned from the best of some starts for block i, whose outputs for hidden [n, L, d] are `original`.

    Returned are those of the least error of the rounded block on the windows held out, that error of the first start, and theirs.
    """

    def tuner_of(diagonal: Diagonal) -> Tuner:
        def loss(windows: torch.Tensor) -> torch.Tensor:
            outputs = walk.run(outputs_with(walk, i, diagonal.weights()), i, hidden[windows])
            return block_error(outputs, original[windows])

        return Tuner(diagonal, loss, *hidden.shape[:2], config.learned_scaling, config.rate, config.seed)

    tuners = [tuner_of(diagonal) for diagonal in starts]
    tuner, diagonal = min(zip(tuners, starts, strict=True), key=lambda pair: pair[0].first)
    for _ in range(config.learned_scaling):
        for _ in tuner.run_epoch():
            pass
    tuner.finish()
    return [s.detach() for s in diagonal.scales()], tuners[0].first, tuner.best_loss


def learn_block(
    walk: Blocks,
    i: int,
    hidden: torch.Tensor,
    layers: dict[str, LayerConfig],
    config: QuantConfig,
    say: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """Learn and fold the scales of block i, whose layers are not quantized yet; arguments and result are those of `scale_block`.

    With `scaling` the searched scales are another start. Of no scales, these and those learned, the ones of the least
    `fitted_error` are taken, in this order where errors are equal.
    """
    block, prefix = walk.blocks[i], walk.name(i)
    found = places(walk, i, hidden[:1], layers)
    if not found:
        say(f"{prefix}  no place where scales can be folded")
        return {}
    original = walk.through(block, i, hidden)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    tries = {"no scales": [torch.ones(len(state[f"{place.source}.weight"]), device=walk.device) for place in found]}
    if config.scaling:
        searched = scale_block(walk, i, hidden, layers, config, say)
        tries["searched"] = [searched[f"{prefix}.{place.source}.outputs"].to(walk.device) for place in found]
        block.load_state_dict(state)
    inside = {name.removeprefix(f"{prefix}."): layer for name, layer in layers.items() if name.startswith(f"{prefix}.")}
    weights = {name: state[f"{name}.weight"] for name in inside}
    starts = [Diagonal(found, start, weights, inside) for start in tries.values()]
    tries["learned"], before, after = learn(walk, i, hidden, original, starts, config)
    errors = {}
    for name, scales in tries.items():
        for place, s in zip(found, scales, strict=True):
            fold(block, place, s)
        errors[name] = fitted_error(walk, i, hidden, original, inside, config)
        block.load_state_dict(state)
    best, kept = min(errors, key=errors.get), {}
    for place, s in zip(found, tries[best], strict=True):
        fold(block, place, s)
        kept |= by_name(prefix, place, s)
    fits = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
    say(f"{prefix}  learned scales: rounded block error {before:.4f} -> {after:.4f}; fitted: {fits}; kept: {best}")
    return kept
