"""Scales and offsets in 8 bits: integer codes, and in fp16 one unit for every 256 of them.

    value = fp16(code * unit)          scales: uint8 codes 0 .. 255; offsets: int8 codes -127 .. 127

A unit serves BLOCK consecutive values of a plane [N, G], row after row, so that it costs 1/16 bit per value whatever K is; the
last block of a plane may be short. It is the least fp16 number with which the largest value of its block has a code. Scales
of scales are the idea of QLoRA's double quantization (arXiv 2305.14314, section 3); here the codes are integers.

Values are fp16 numbers, so kernels read them like any others, and with the unit each gives its code back. Where code * unit is
less than 2^-14 it is a multiple of 2^-24, which fp16 holds exactly; elsewhere rounding moves it by at most 2^-11 of itself,
which is less than an eighth of a unit. In a block of zeros the unit and all codes are 0.
"""

import torch
import torch.nn.functional as F

BLOCK = 256  # values that share a unit
SCALES, OFFSETS = torch.uint8, torch.int8  # dtypes of the codes
LARGEST = 65504  # of fp16


def blocks(N: int, G: int) -> int:
    """Units of a plane [N, G]."""
    return -(-N * G // BLOCK)


def largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each block of values [..., N, G], fp32 [..., blocks]."""
    flat = values.float().abs().flatten(-2)
    return F.pad(flat, (0, -flat.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).amax(-1)


def units_of(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Units fp16 [..., blocks] for finite values [..., N, G] whose codes are to be of `dtype`."""
    most = torch.iinfo(dtype).max
    wanted = (largest(values) / most).clamp(max=LARGEST // most)  # no code may stand for infinity
    units = wanted.half()
    return torch.where(units.float() < wanted, (units.view(torch.int16) + 1).view(torch.float16), units)


def grown(units: torch.Tensor, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The units as they are, but new ones for blocks whose values [..., N, G] have outgrown theirs."""
    outgrown = largest(values) > (torch.iinfo(dtype).max + 0.5) * units.float()
    return torch.where(outgrown, units_of(values, dtype), units)


def spread(units: torch.Tensor, N: int, G: int) -> torch.Tensor:
    """Units [..., blocks] -> the unit of each value, fp16 [..., N, G]."""
    return units.repeat_interleave(BLOCK, -1)[..., : N * G].unflatten(-1, (N, G))


def encode(values: torch.Tensor, unit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest codes, of `dtype`, of values; unit: of each, in the same shape."""
    limits, unit = torch.iinfo(dtype), unit.float()
    codes = torch.where(unit > 0, values.float() / unit, 0).round()
    return codes.clamp(0 if limits.min == 0 else -limits.max, limits.max).to(dtype)


def decode(codes: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The values fp16 of codes; unit: of each, in the same shape."""
    return (codes.float() * unit.float()).half()


def nearest(values: torch.Tensor, unit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values fp32 rounded to what 8 bits hold, still in fp32."""
    return decode(encode(values, unit, dtype), unit).float()
