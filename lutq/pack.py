"""The canonical packed form of a weight matrix, and back.

    W [N, K]  ->  Packed(codes int32 [b, N, ceil(K/32)], scales fp16, offsets fp16 or zero_points uint8)

Bit t of word w in `codes[i, n, w]` is the sign of plane i for input k = 32 w + t: 1 is +1 and 0 is -1. Bits past K are 0.
With G = ceil(K/g) groups of g inputs (the last may be short):

    bcq grid       W[n,k] = offsets[n,G] + sum_i scales[i,n,G] * s_i[n,k]          scales [b, N, G], offsets [N, G] or None
    uniform grid   W[n,k] = scales[0,n,G] * (u[n,k] - zero_points[n,G])            scales [1, N, G], zero_points [N, G]
                   u = sum_i 2^(b-1-i) (s_i + 1)/2; without zero_points, (2^b - 1)/2 takes their place

An any-precision checkpoint serves several precisions with the same codes: the first b planes are the model of b bits, whose
grid is `scales_{b}bit` [b, N, G] and `offsets_{b}bit` [N, G]; that of all planes has the ordinary names.

With scales in 8 bits a checkpoint stores `scales` as uint8 and `offsets` as int8 codes of the same shapes, and in fp16 their
units `scale_units` [b or 1, ceil(N G / 256)] and `offset_units` [ceil(N G / 256)], see lutq/scales.py.

Corrections beside the planes (lutq/residual.py) add `outlier_values`, `outlier_columns`, `low_rank_left` and `low_rank_right`.

The form knows no kernel: kernels reorder it at load. All arithmetic here is fp32, and the uniform grid is exact in it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.residual import NOTHING, Residual, add_to, residual_shapes
from lutq.scales import OFFSETS, SCALES, blocks, decode, encode, spread, units_of

CHUNK = 1 << 22  # weights unpacked at a time: bounds the temporary memory to about 50 MB


class Packed(NamedTuple):
    """See the module docstring. `offsets` belong to the bcq grid, `zero_points` to the uniform grid."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None


class Nested(NamedTuple):
    """W at several precisions: `highest` holds all planes, `lower` the grids of fewer, by the names of the module docstring."""

    highest: Packed
    lower: dict[str, torch.Tensor]

    def at(self, bits: int) -> Packed:
        """W at `bits` bits. Raises KeyError for a precision that is not there."""
        if bits == len(self.highest.codes):
            return self.highest
        return Packed(
            self.highest.codes[:bits], self.lower[lower_name("scales", bits)], self.lower.get(lower_name("offsets", bits))
        )


class EightBit(NamedTuple):
    """W with scales and offsets in 8 bits: `values` holds what their codes stand for, in fp16, beside the units."""

    values: Packed
    scale_units: torch.Tensor
    offset_units: torch.Tensor | None


class Corrected(NamedTuple):
    """W as planes and what corrects them."""

    planes: Packed | EightBit
    residual: Residual


Planes = Packed | Nested | EightBit
Stored = Planes | Corrected  # what a checkpoint can hold of a matrix
EIGHT_BIT = {"scales": ("scale_units", SCALES), "offsets": ("offset_units", OFFSETS)}  # part -> its units, dtype of its codes


def bare(packed: Stored) -> Planes:
    """W without its corrections."""
    return packed.planes if isinstance(packed, Corrected) else packed


def residual_of(packed: Stored) -> Residual:
    """The corrections of W; without any tensor where it has none."""
    return packed.residual if isinstance(packed, Corrected) else NOTHING


def highest(packed: Stored) -> Packed:
    """The planes of W, all of them, with scales and offsets in fp16."""
    planes = bare(packed)
    if isinstance(planes, EightBit):
        return planes.values
    return planes.highest if isinstance(planes, Nested) else planes


def in_eight_bits(packed: Packed) -> EightBit:
    """`packed` with its scales and offsets rounded to 8 bits."""
    units: dict[str, torch.Tensor | None] = {"scale_units": None, "offset_units": None}
    for part, (name, dtype) in EIGHT_BIT.items():
        values = getattr(packed, part)
        if values is not None:
            units[name] = units_of(values, dtype)
            unit = spread(units[name], *values.shape[-2:])
            packed = packed._replace(**{part: decode(encode(values, unit, dtype), unit)})
    return EightBit(packed, **units)


def lower_name(part: str, bits: int) -> str:
    """Name of `scales` or `offsets` of the first `bits` planes of more."""
    return f"{part}_{bits}bit"


LOWER = tuple(lower_name(part, bits) for bits in (1, 2, 3) for part in ("scales", "offsets"))
UNITS = EightBit._fields[1:]
OWN = Packed._fields + UNITS + Residual._fields  # the tensors that a loaded layer holds; they keep their dtypes
PARTS = OWN + LOWER  # every tensor that can belong to a packed matrix


def to_tensors(packed: Stored) -> dict[str, torch.Tensor]:
    """Name -> tensor of everything that a checkpoint stores of a matrix."""
    planes, parts = bare(packed), highest(packed)._asdict() | residual_of(packed)._asdict()
    tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
    if isinstance(planes, EightBit):
        for part, (name, dtype) in EIGHT_BIT.items():
            units = getattr(planes, name)
            if units is not None:
                tensors |= {part: encode(tensors[part], spread(units, *tensors[part].shape[-2:]), dtype), name: units}
    return tensors | planes.lower if isinstance(planes, Nested) else tensors


def from_tensors(tensors: dict[str, torch.Tensor]) -> Stored:
    """The inverse of `to_tensors`; other names are ignored. Scales and offsets beside units may be values instead of codes."""
    residual = {name: tensors[name] for name in Residual._fields if name in tensors}
    if residual:
        others = {name: tensor for name, tensor in tensors.items() if name not in residual}
        return Corrected(from_tensors(others), Residual(**residual))
    packed = Packed(**{name: tensors[name] for name in Packed._fields if name in tensors})
    if "scale_units" in tensors:
        for part, (name, _) in EIGHT_BIT.items():
            codes = getattr(packed, part)
            if codes is not None and not codes.is_floating_point():
                packed = packed._replace(**{part: decode(codes, spread(tensors[name], *codes.shape[-2:]))})
        return EightBit(packed, tensors["scale_units"], tensors.get("offset_units"))
    lower = {name: tensors[name] for name in LOWER if name in tensors}
    return Nested(packed, lower) if lower else packed


def weight(packed: Stored, layer: LayerConfig, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W as `dtype` [N, K] with everything that belongs to it, corrections included; rounded once."""
    if not isinstance(packed, Corrected):
        return dequantize(*highest(packed), layer.group, layer.grid, K, dtype)
    return add_to(dequantize(*highest(packed), layer.group, layer.grid, K), packed.residual).to(dtype)


def words(K: int) -> int:
    """Words of 32 codes in a row of K inputs."""
    return -(-K // 32)


def group_size(group: int, K: int) -> int:
    """Inputs per group: `group`, or for 0 (one group per row) K rounded up to whole words."""
    return group or 32 * words(K)


def packed_shapes(N: int, K: int, layer: LayerConfig) -> dict[str, tuple]:
    """Tensor name -> (shape, dtype) of the planes of W [N, K] in memory, a `Packed`; `stored_shapes` says what files hold."""
    G = -(-K // group_size(layer.group, K))
    bcq = layer.grid == "bcq"
    shapes = {
        "codes": ((layer.bits, N, words(K)), torch.int32),
        "scales": ((layer.bits if bcq else 1, N, G), torch.float16),
    }
    if layer.offsets:
        shapes |= {"offsets": ((N, G), torch.float16)} if bcq else {"zero_points": ((N, G), torch.uint8)}
    return shapes


def stored_shapes(N: int, K: int, layer: LayerConfig) -> dict[str, tuple]:
    """Tensor name -> (shape, dtype) of what a checkpoint stores of W [N, K], but for `lower_shapes`."""
    shapes = packed_shapes(N, K, layer)
    if layer.scale_bits == 8:
        for part, (name, dtype) in EIGHT_BIT.items():
            if part in shapes:
                shape, units_dtype = shapes[part]
                shapes |= {part: (shape, dtype), name: ((*shape[:-2], blocks(*shape[-2:])), units_dtype)}
    return shapes | residual_shapes(N, K, layer)


def lower_shapes(N: int, K: int, layer: LayerConfig, lowest_bits: int) -> dict[str, tuple]:
    """Tensor name -> (shape, dtype) of what an any-precision form holds besides `packed_shapes`; lowest_bits 0: nothing."""
    return {
        lower_name(name, bits): spec
        for bits in range(lowest_bits or layer.bits, layer.bits)
        for name, spec in packed_shapes(N, K, layer._replace(bits=bits)).items()
        if name != "codes"
    }


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bool [..., K] -> int32 [..., ceil(K/32)], little-endian: bit t of word w is input 32 w + t."""
    K = bits.shape[-1]
    padded = F.pad(bits.to(torch.uint8), (0, 32 * words(K) - K))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    as_bytes = (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return as_bytes.contiguous().view(torch.int32)


def unpack_bits(codes: torch.Tensor, K: int) -> torch.Tensor:
    """Int32 [..., ceil(K/32)] -> bool [..., K]; the inverse of `pack_bits`."""
    as_bytes = codes.contiguous().view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((as_bytes[..., None] >> shifts) & 1).flatten(-2)[..., :K].bool()


def signs(codes: torch.Tensor, K: int, one: float = 1.0, zero: float = -1.0) -> torch.Tensor:
    """Int32 [..., ceil(K/32)] -> fp32 [..., K] with `one` for set bits and `zero` for the others."""
    byte = torch.arange(256, dtype=torch.uint8, device=codes.device)
    bit = (byte[:, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)) & 1
    table = torch.where(bit.bool(), one, zero)
    return F.embedding(codes.contiguous().view(torch.uint8).int(), table).flatten(-2)[..., :K]


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    group: int,
    grid: str,
    K: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The packed matrix as `dtype` [N, K], computed in fp32 and rounded once. `group` in inputs, 0 for one per row."""
    bits, N, _ = codes.shape
    g = group_size(group, K)
    out = torch.empty(N, K, dtype=dtype, device=codes.device)
    rows = max(1, CHUNK // max(K, 1))
    for begin in range(0, N, rows):
        part = slice(begin, begin + rows)

        def plane(i: int, *values: float, part: slice = part) -> torch.Tensor:  # fp32 [rows, G, g], the last group filled up
            whole = signs(codes[i, part], K, *values)
            return (F.pad(whole, (0, -K % g)) if K % g else whole).unflatten(1, (-1, g))

        def each(per_group: torch.Tensor, part: slice = part) -> torch.Tensor:  # [N, G] -> fp32 [rows, G, 1]
            return per_group[part].float()[:, :, None]

        if grid == "uniform":
            w = plane(0, 2.0 ** (bits - 1), 0.0)
            for i in range(1, bits):
                w += plane(i, 2.0 ** (bits - 1 - i), 0.0)
            w -= each(zero_points) if zero_points is not None else (2**bits - 1) / 2
            w *= each(scales[0])
        else:
            w = plane(0).mul_(each(scales[0]))
            for i in range(1, bits):
                w += plane(i).mul_(each(scales[i]))
            if offsets is not None:
                w += each(offsets)
        out[part] = w.flatten(1)[:, :K]
    return out
