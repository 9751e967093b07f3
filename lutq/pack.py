"""The canonical packed form of a weight matrix, and back.

    W [N, K]  ->  Packed(codes int32 [b, N, ceil(K/32)], scales fp16, offsets fp16 or zero_points uint8)

Bit t of word w in `codes[i, n, w]` is the sign of plane i for input k = 32 w + t: 1 is +1 and 0 is -1. Bits past K are 0.
With G = ceil(K/g) groups of g inputs (the last may be short):

    bcq grid       W[n,k] = offsets[n,G] + sum_i scales[i,n,G] * s_i[n,k]          scales [b, N, G], offsets [N, G] or None
    uniform grid   W[n,k] = scales[0,n,G] * (u[n,k] - zero_points[n,G])            scales [1, N, G], zero_points [N, G]
                   u = sum_i 2^(b-1-i) (s_i + 1)/2; without zero_points, (2^b - 1)/2 takes their place

An any-precision checkpoint serves several precisions with the same codes: the first b planes are the model of b bits, whose
grid is `scales_{b}bit` [b, N, G] and `offsets_{b}bit` [N, G]; that of all planes has the ordinary names.

Corrections beside the planes (lutq/residual.py) add `outlier_values`, `outlier_columns`, `low_rank_left` and `low_rank_right`.

The form knows no kernel: kernels reorder it at load. All arithmetic here is fp32, and the uniform grid is exact in it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.residual import NOTHING, Residual, add_to, residual_shapes

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


class Corrected(NamedTuple):
    """W as planes and what corrects them."""

    packed: Packed
    residual: Residual


Form = Packed | Nested | Corrected


def highest(form: Form) -> Packed:
    """The planes of W, all of them."""
    if isinstance(form, Nested):
        return form.highest
    return form.packed if isinstance(form, Corrected) else form


def residual_of(form: Form) -> Residual:
    """The corrections of W; without any tensor where it has none."""
    return form.residual if isinstance(form, Corrected) else NOTHING


def lower_name(part: str, bits: int) -> str:
    """Name of `scales` or `offsets` of the first `bits` planes of more."""
    return f"{part}_{bits}bit"


LOWER = tuple(lower_name(part, bits) for bits in (1, 2, 3) for part in ("scales", "offsets"))
OWN = Packed._fields + Residual._fields  # the tensors that a loaded layer holds; they keep their dtypes
PARTS = OWN + LOWER  # every tensor that can belong to a packed matrix


def to_tensors(form: Form) -> dict[str, torch.Tensor]:
    """Name -> tensor of everything that a checkpoint stores of a matrix."""
    parts = highest(form)._asdict() | residual_of(form)._asdict()
    tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return tensors | form.lower if isinstance(form, Nested) else tensors


def from_tensors(tensors: dict[str, torch.Tensor]) -> Form:
    """The inverse of `to_tensors`; other names are ignored."""
    packed = Packed(**{name: tensors[name] for name in Packed._fields if name in tensors})
    residual = {name: tensors[name] for name in Residual._fields if name in tensors}
    if residual:
        return Corrected(packed, Residual(**residual))
    lower = {name: tensors[name] for name in LOWER if name in tensors}
    return Nested(packed, lower) if lower else packed


def weight(form: Form, layer: LayerConfig, K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W as `dtype` [N, K] with everything that belongs to it, corrections included; rounded once."""
    if not layer.corrected:
        return dequantize(*highest(form), layer.group, layer.grid, K, dtype)
    return add_to(dequantize(*highest(form), layer.group, layer.grid, K), residual_of(form)).to(dtype)


def words(K: int) -> int:
    """Words of 32 codes in a row of K inputs."""
    return -(-K // 32)


def group_size(group: int, K: int) -> int:
    """Inputs per group: `group`, or for 0 (one group per row) K rounded up to whole words."""
    return group or 32 * words(K)


def packed_shapes(N: int, K: int, layer: LayerConfig) -> dict[str, tuple]:
    """Tensor name -> (shape, dtype) of the packed form of W [N, K]."""
    G = -(-K // group_size(layer.group, K))
    bcq = layer.grid == "bcq"
    shapes = {
        "codes": ((layer.bits, N, words(K)), torch.int32),
        "scales": ((layer.bits if bcq else 1, N, G), torch.float16),
    }
    if layer.offsets:
        shapes |= {"offsets": ((N, G), torch.float16)} if bcq else {"zero_points": ((N, G), torch.uint8)}
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

        def spread(per_group: torch.Tensor, part: slice = part) -> torch.Tensor:  # [N, G] -> fp32 [rows, K]
            return per_group[part].float().repeat_interleave(g, dim=-1)[:, :K]

        if grid == "uniform":
            w = signs(codes[0, part], K, 2.0 ** (bits - 1), 0.0)
            for i in range(1, bits):
                w += signs(codes[i, part], K, 2.0 ** (bits - 1 - i), 0.0)
            w -= spread(zero_points) if zero_points is not None else (2**bits - 1) / 2
            w *= spread(scales[0])
        else:
            w = signs(codes[0, part], K) * spread(scales[0])
            for i in range(1, bits):
                w += signs(codes[i, part], K) * spread(scales[i])
            if offsets is not None:
                w += spread(offsets)
        out[part] = w.to(dtype)
    return out
