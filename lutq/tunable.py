"""A quantized Linear layer whose scales and offsets can be learned, and its codes too.

Codes stay packed and fixed, or follow `latent` weights: each code is that of the level nearest to its latent weight, and the
gradient of the quantized weight counts as the latent one's (the straight-through estimator, arXiv 1308.3432).
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lutq import bcq, gpu_fit
from lutq.config import LayerConfig
from lutq.pack import (
    EIGHT_BIT,
    UNITS,
    Corrected,
    EightBit,
    Nested,
    Packed,
    Stored,
    bare,
    dequantize,
    from_tensors,
    group_size,
    highest,
    lower_name,
    pack_bits,
    residual_of,
    signs,
    unpack_bits,
)
from lutq.residual import Residual, add_to
from lutq.scales import grown, nearest, spread

MARGIN = 0.02  # of the distance of two levels that a latent weight keeps from the middle between them at the start


def dense(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, group: int, x: torch.Tensor) -> torch.Tensor:
    """W [N, K] of codes and a grid, in the dtype of x [..., K]."""
    K = x.shape[-1]
    if x.dtype == torch.float32 and gpu_fit.usable(scales):
        return gpu_fit.make_weights(codes, scales, offsets, K, group_size(group, K))
    return dequantize(codes, scales, offsets, None, group, "bcq", K, x.dtype)


def grid_gradients(
    codes: torch.Tensor, dW: torch.Tensor, group: int, has_offsets: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of scales [b, N, G] and offsets [N, G], None for none, from that of W, fp32 [N, K]: a scale's is the sum over its
    group of dW times its plane's signs.
    """
    K = dW.shape[1]
    g = group_size(group, K)
    if gpu_fit.usable(dW):
        return gpu_fit.grid_gradients(codes, dW, -(-K // g), g, has_offsets)
    per_group = F.pad(dW, (0, -K % g)).unflatten(1, (-1, g))
    dscales = [(per_group * F.pad(signs(plane, K), (0, -K % g)).unflatten(1, (-1, g))).sum(2) for plane in codes]
    return torch.stack(dscales), per_group.sum(2) if has_offsets else None


class Product(torch.autograd.Function):
    """y = x W^T for the W that codes, scales [b, N, G], offsets [N, G] or None and corrections, which are fixed, stand for; W is
    made anew in the backward pass, so that no layer keeps one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor | None,
        latent: torch.Tensor | None,
        group: int,
        residual: Residual,
    ) -> torch.Tensor:
        """Map x [..., K] to y [..., N]."""
        ctx.group, ctx.residual = group, residual
        ctx.save_for_backward(x, codes, scales, offsets)
        return F.linear(x, add_to(dense(codes, scales, offsets, group, x), residual))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, scales, offsets and latent."""
        x, codes, scales, offsets = ctx.saved_tensors
        dx = dy @ add_to(dense(codes, scales, offsets, ctx.group, x), ctx.residual) if ctx.needs_input_grad[0] else None
        dW = (dy.flatten(0, -2).T @ x.flatten(0, -2)).float()
        dscales, doffsets = grid_gradients(codes, dW, ctx.group, offsets is not None)
        return dx, None, dscales, doffsets, dW if ctx.needs_input_grad[4] else None, None, None


class Rounding(torch.autograd.Function):
    """Values rounded to 8 bits with the unit of each; the gradient passes as if they were not."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, unit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values of any sign: that of a scale belongs to its plane in the end."""
        return nearest(values.abs(), unit, dtype) * values.sign()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the arguments."""
        return dy, None, None


class Tunable(torch.nn.Module):
    """y = x W^T + bias with W [N, K] on the bcq grid; scales fp32 [b, N, G] and offsets fp32 [N, G] are parameters.

    W: the original weight fp32 [N, K] for codes that can be learned: `latent` starts as the weights nearest to it that have
    the codes of `packed`. Corrections stay as they are.

    A matrix at several precisions has a grid for each, under the names of lutq/pack.py, and `bits` says which of them products
    are made of and what is learned. Since the codes belong to all, its scales must not turn negative: see `bound`.

    Where the layer has scales in 8 bits, products are those of the rounded scales and offsets, so that what is tuned and
    compared is what a checkpoint will hold. Units grow with the largest value of their block and never shrink.
    """

    def __init__(
        self, packed: Stored, K: int, layer: LayerConfig, bias: torch.nn.Parameter | None, W: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.K, self.layer = K, layer
        planes, residual = bare(packed), residual_of(packed)
        lower = planes.lower if isinstance(planes, Nested) else {}
        units = {name: getattr(planes, name, None) for name in UNITS}
        for name, tensor in (units | residual._asdict()).items():
            self.register_buffer(name, tensor)
        for name, tensor in lower.items():
            self.register_parameter(name, torch.nn.Parameter(tensor.float()))
        self.lower, self.bits, packed = tuple(lower), layer.bits, highest(planes)
        self.register_buffer("codes", packed.codes)
        self.scales = torch.nn.Parameter(packed.scales.float())
        self.offsets = None if packed.offsets is None else torch.nn.Parameter(packed.offsets.float())
        self.bias = bias
        if W is not None:
            W = W - add_to(torch.zeros_like(W), residual)
        self.latent = None if W is None else torch.nn.Parameter(self._latent(W))

    @property
    def residual(self) -> Residual:
        """The corrections."""
        return Residual(*(self._buffers[name] for name in Residual._fields))

    @torch.no_grad()
    def _latent(self, W: torch.Tensor) -> torch.Tensor:
        """W fp32 [N, K] moved into the cells of its codes, and at most a level's distance beyond the outermost level."""
        q = self._groups(dequantize(self.codes, self.scales, self.offsets, None, self.layer.group, "bcq", self.K))
        scales, offsets = self._grids()
        signs = 2 * bcq.patterns(len(scales), q.device).float() - 1
        levels = signs @ scales
        levels = (levels if offsets is None else levels + offsets).sort(dim=0).values  # [2^b, R]
        low, high = torch.full_like(q, -torch.inf), torch.full_like(q, torch.inf)
        for below, above in itertools.pairwise(levels):
            middle, margin = ((below + above) / 2)[:, None], MARGIN * (above - below)[:, None]
            low = torch.where(q > middle, middle + margin, low)
            high = torch.where((q < middle) & (high == torch.inf), middle - margin, high)
        beyond = ((levels[-1] - levels[0]) / (len(levels) - 1))[:, None]
        low, high = torch.maximum(low, levels[0, :, None] - beyond), torch.minimum(high, levels[-1, :, None] + beyond)
        return self._ungroup(torch.minimum(torch.maximum(self._groups(W), low), high))

    def _groups(self, w: torch.Tensor) -> torch.Tensor:
        """[..., N, K] -> [..., N G, g], the last group of a row filled up with zeros."""
        g = group_size(self.layer.group, self.K)
        return F.pad(w, (0, -self.K % g)).unflatten(-1, (-1, g)).flatten(-3, -2)

    def _ungroup(self, w: torch.Tensor) -> torch.Tensor:
        """The inverse of `_groups`."""
        return w.unflatten(-2, (self.codes.shape[1], -1)).flatten(-2)[..., : self.K]

    def learned(self) -> list[str]:
        """Names of what may be learned: the grid of the precision that runs, and latent weights."""
        return [*(self._name(part) for part in ("scales", "offsets")), "latent"]

    @torch.no_grad()
    def bound(self) -> None:
        """Put scales that a step made negative to 0, where codes cannot turn along because other precisions share them."""
        if self.lower:
            getattr(self, self._name("scales")).clamp_(min=0)

    def _name(self, part: str) -> str:
        """Name of the `scales` or `offsets` of the precision that runs."""
        return part if self.bits == self.layer.bits else lower_name(part, self.bits)

    def _units(self, part: str) -> torch.Tensor:
        """Units of the `scales` or `offsets` as they are now: as before, or greater where a value has outgrown its unit."""
        name, dtype = EIGHT_BIT[part]
        return grown(getattr(self, name), getattr(self, part).detach(), dtype)

    def _stored(self, part: str) -> torch.Tensor | None:
        """Scales [b, N, G] or offsets [N, G] with which products are made, scales of any sign; None for no offsets."""
        values = getattr(self, self._name(part), None)
        if values is None or self.scale_units is None:
            return values
        return Rounding.apply(values, spread(self._units(part), *values.shape[-2:]), EIGHT_BIT[part][1])

    def _grids(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales [b, N G] and offsets [N G] or None, as `_stored`."""
        return self._stored("scales").flatten(1), None if self.offsets is None else self._stored("offsets").flatten()

    @torch.no_grad()
    def follow(self) -> None:
        """Give every code the level nearest to its latent weight."""
        if gpu_fit.usable(self.latent):
            grid = self._stored("scales"), None if self.offsets is None else self._stored("offsets")
            self.codes = gpu_fit.nearest_codes(self.latent, *grid, group_size(self.layer.group, self.K))
            return
        planes, _ = bcq.nearest(self._groups(self.latent), *self._grids())
        self.codes = pack_bits(self._ungroup(planes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., K] to y [..., N]."""
        if self.latent is not None:
            self.follow()
        scales, offsets = self._stored("scales"), self._stored("offsets")
        y = Product.apply(x, self.codes[: self.bits], scales, offsets, self.latent, self.layer.group, self.residual)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def packed(self) -> Stored:
        """The layer as a checkpoint holds it: scales fp16, non-negative and, with 16 bits, descending; the codes turned along."""
        if self.lower:  # planes have an order of their own
            grids = {name: p.half() for name, p in self.named_parameters() if name != "bias"}
            return from_tensors({"codes": self.codes} | grids)
        b, N, _ = self.codes.shape
        scales, offsets = self._grids()
        if self.scale_units is not None:  # planes keep their order, each having units of its own
            if self.latent is not None:
                self.follow()
            planes = self._groups(unpack_bits(self.codes, self.K)) ^ (scales < 0)[:, :, None]
            fit = bcq.Bcq(planes, scales.abs(), offsets)
        elif self.latent is None:
            fit = bcq.canonical(self._groups(unpack_bits(self.codes, self.K)), scales, offsets)
        else:
            scales, offsets = bcq.storable(scales, offsets)
            fit = bcq.Bcq(bcq.nearest(self._groups(self.latent), scales, offsets)[0], scales, offsets)
        codes = pack_bits(self._ungroup(fit.planes))
        packed = Packed(codes, fit.scales.view(b, N, -1).half(), None if offsets is None else fit.offsets.view(N, -1).half())
        if self.scale_units is not None:
            packed = EightBit(packed, self._units("scales"), None if offsets is None else self._units("offsets"))
        return Corrected(packed, self.residual) if self.layer.corrected else packed


def tunables(module: torch.nn.Module) -> Iterator[tuple[str, Tunable]]:
    """Name and module of every `Tunable` inside."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, Tunable))


def run_at(module: torch.nn.Module, bits: int) -> None:
    """Let every `Tunable` inside that has several precisions run at `bits` bits."""
    for _, layer in tunables(module):
        if layer.lower:
            layer.bits = bits


@torch.no_grad()
def store_rounded(module: torch.nn.Module) -> None:
    """Give every `Tunable` inside the values that a checkpoint would hold."""
    for _, layer in tunables(module):
        stored = layer.packed()
        packed, planes = highest(stored), bare(stored)
        layer.codes = packed.codes
        if isinstance(planes, EightBit):
            layer.scale_units, layer.offset_units = planes.scale_units, planes.offset_units
        layer.scales.copy_(packed.scales)
        if layer.offsets is not None:
            layer.offsets.copy_(packed.offsets)
        if isinstance(planes, Nested):
            for name, tensor in planes.lower.items():
                getattr(layer, name).copy_(tensor)
