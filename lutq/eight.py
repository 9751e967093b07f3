"""Uniform grids of 8 bits on kernels that know 4: W [N, K] as a matrix of 4 bits and twice as many inputs.

    u = 16 a + c, z = 16 p + q:    s (u - z) x  =  [16 s (a - p)  s (c - q)] [x; x]

with u the integers, z the zero points and s the scales; a, c, p and q take 4 bits. The left half has K rounded up to whole
groups, so that the right one begins with a group; a single group for the row becomes one for each half, of K rounded up to
words. Nothing is rounded: 16 s is s with another exponent.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.pack import Packed, words

BITS, HALF = 8, 4


class Halves(NamedTuple):
    """The layer of 4 bits that stands for one of 8 bits and K inputs, and its inputs before the right half."""

    layer: LayerConfig
    left: int


def halves(layer: LayerConfig, K: int) -> Halves:
    """Of a layer of 8 bits."""
    g = layer.group or 32 * words(K)
    return Halves(layer._replace(bits=HALF, group=g), -(-K // g) * g)


def halve(packed: Packed, layer: LayerConfig) -> tuple[Packed, LayerConfig]:
    """W [N, K] of 8 bits as [N, left + K] of 4. Raises LutqError for scales that fp16 does not hold 16 times over."""
    width = packed.codes.shape[2]
    layer, left = halves(layer, 32 * width)
    high = packed.scales * 2**HALF
    if not high.isfinite().all():
        raise LutqError(f"the CUDA kernels take scales of 8 bits below 4095, not {packed.scales.max()}: use --backend reference")
    parts = packed.codes.split(HALF)
    codes = torch.cat([F.pad(parts[0], (0, left // 32 - width)), parts[1]], 2)
    zeros = packed.zero_points
    zeros = torch.cat([zeros >> HALF, zeros & (2**HALF - 1)], 1)
    return Packed(codes, torch.cat([high, packed.scales], 2), None, zeros), layer


def unite(packed: Packed, layer: LayerConfig, K: int) -> Packed:
    """The inverse of `halve`."""
    left, G = halves(layer, K).left, packed.scales.shape[2] // 2
    codes = torch.cat([packed.codes[:, :, : words(K)], packed.codes[:, :, left // 32 :]])
    high, low = packed.zero_points.split(G, 1)
    return Packed(codes, packed.scales[:, :, G:].contiguous(), None, (high << HALF) + low)


def twice(x: torch.Tensor, left: int) -> torch.Tensor:
    """The inputs [..., left + K] of the halves, from x [..., K]."""
    return torch.cat([F.pad(x, (0, left - x.shape[-1])), x], -1)
