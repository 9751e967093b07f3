"""What mixed precision chooses for: layers that are stored alike, and the ways in which they may be stored."""

import math
from typing import NamedTuple

from lutq.config import LayerConfig, QuantConfig
from lutq.latency import Product, Times
from lutq.pack import stored_shapes
from lutq.prepack import PANEL


class Choice(NamedTuple):
    """Bits and group. size: stored bits of the unit, everything counted. ns: nanoseconds of its products with one row of x, 0
    where there is no budget of time. loss: nats per token; 0 until it is measured, and where there is nothing to choose.
    """

    bits: int
    group: int
    size: int
    ns: int = 0
    loss: float = 0.0

    def words(self) -> str:
        """Such as `2 bits, g 64`."""
        return f"{self.bits} bits, g {self.group or 'row'}"

    def costs(self, config: QuantConfig) -> tuple[int, ...]:
        """What it takes of each budget of the settings, size before time."""
        return (self.size,) * (config.target_bpw > 0) + (self.ns,) * (config.target_ms > 0)


class Unit(NamedTuple):
    """Linear layers with equal bits and group, by name. shapes: (N, K) of each. layer: their settings but for bits and group.
    fused: their products run as one where the kernels can join them (lutq/decode/products.py).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    layer: LayerConfig
    choices: tuple[Choice, ...]
    fused: bool = False

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(N * K for N, K in self.shapes)

    def products(self, choice: Choice) -> list[Product]:
        """What multiplies one row of x: one product for all layers, or one each."""
        # kernels see scales of 16 bits whatever is stored
        layer, shapes = self.layer._replace(bits=choice.bits, group=choice.group, scale_bits=16), self.shapes
        if self.fused and all(N % PANEL == 0 for N, _ in shapes[:-1]):
            shapes = ((sum(N for N, _ in shapes), shapes[0][1]),)
        return [Product(N, K, layer) for N, K in shapes]

    def timed(self, times: Times) -> "Unit":
        """With the times of its choices."""
        return self._replace(choices=tuple(c._replace(ns=sum(times.ns[p] for p in self.products(c))) for c in self.choices))


def make_unit(
    names: list[str], shapes: list[tuple[int, int]], layer: LayerConfig, pairs: list[tuple[int, int]], fused: bool = False
) -> Unit:
    """A unit that may have any of some pairs of bits and group."""

    def size(bits: int, group: int) -> int:
        parts = [stored_shapes(N, K, layer._replace(bits=bits, group=group)).values() for N, K in shapes]
        return sum(8 * math.prod(shape) * dtype.itemsize for part in parts for shape, dtype in part)

    return Unit(tuple(names), tuple(shapes), layer, tuple(Choice(*pair, size(*pair)) for pair in pairs), fused)
