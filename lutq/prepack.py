"""Canonical packed tensors (lutq/pack.py) to the order of the CUDA kernels (kernels/layout.cuh), and back, bit for bit.

    codes [b, N, ceil(K/32)] int32     <->  codes [T + 1, 2 U, 64 b] int32  T = ceil(N/16) tiles, U = ceil(K/256) units
    scales, offsets or zero_points     <->  records [T + 1, G, bytes] uint8   G groups of g inputs

The order is a permutation of bits and scales and what pads N and K is 0, so the way back is exact. One spare tile of zeros
ends both: the kernels read two tiles at a time. Works on any device, a few tiles at a time.
"""

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.pack import Packed, packed_shapes, words

TILE, UNIT = 16, 256
CHUNK = 1 << 23  # bytes of codes reordered at a time; about 30 times as much memory is used meanwhile


def tiles(N: int) -> int:
    """Tiles of 16 rows."""
    return -(-N // TILE)


def units(K: int) -> int:
    """Units of 256 inputs."""
    return -(-K // UNIT)


def chunks(T: int, bytes_per_tile: int) -> list[slice]:
    """Slices of tiles, each of at most CHUNK bytes of codes."""
    step = max(1, CHUNK // max(1, bytes_per_tile))
    return [slice(begin, min(T, begin + step)) for begin in range(0, T, step)]


def spread(plane: torch.Tensor) -> torch.Tensor:
    """Bytes uint8 [..., 2] of 16 inputs -> int32 [..., 2]: for lanes t = 0, 1 the indices in the low half of 4 nibbles.

    Nibble j = u + 2 jj of lane t holds bits 4 t + 2 jj and the next of byte u.
    """
    wide = plane.int()
    lanes = []
    for t in (0, 1):
        nibbles = [((wide[..., u] >> (4 * t + 2 * jj)) & 3) << (4 * u + 8 * jj) for u in (0, 1) for jj in (0, 1)]
        lanes.append(nibbles[0] | nibbles[1] | nibbles[2] | nibbles[3])
    return torch.stack(lanes, dim=-1)


def gather(lanes: torch.Tensor) -> torch.Tensor:
    """The inverse of `spread`: int32 [..., 2] -> uint8 [..., 2]."""
    out = []
    for u in (0, 1):
        bits = [((lanes[..., t] >> (4 * u + 8 * jj)) & 3) << (4 * t + 2 * jj) for t in (0, 1) for jj in (0, 1)]
        out.append(bits[0] | bits[1] | bits[2] | bits[3])
    return torch.stack(out, dim=-1).to(torch.uint8)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Int32 [b, N, words] -> int32 [T + 1, 2 U, 64 b]."""
    bits, N, width = codes.shape
    T, U = tiles(N), 2 * units(32 * width)  # U in halves of a unit
    out = torch.zeros(T + 1, U, 64 * bits, dtype=torch.int32, device=codes.device)
    for part in chunks(T, bits * TILE * width * 4):
        rows = codes[:, part.start * TILE : part.stop * TILE]
        count = part.stop - part.start
        padded = F.pad(rows, (0, 4 * U - width, 0, count * TILE - rows.shape[1])).view(torch.uint8)
        # plane, then T h r U w s t: tile, row half, row, unit, 32 inputs, 16 inputs, lane
        index = spread(padded.view(bits, count, 2, 8, U, 4, 2, 2))
        for i in range(0, bits - 1, 2):
            halves = (index[i] | index[i + 1] << 2).permute(0, 3, 2, 5, 6, 4, 1)  # T U r s t w h
            out[part, :, 64 * i : 64 * i + 128] = (halves[..., 0] | halves[..., 1] << 16).reshape(count, U, 128)
        if bits % 2:
            last = index[-1].unflatten(4, (2, 2))  # T h r U v parity s t
            halves = (last[:, :, :, :, :, 0] | last[:, :, :, :, :, 1] << 2).permute(0, 3, 2, 5, 6, 4, 1)
            out[part, :, 64 * (bits - 1) :] = (halves[..., 0] | halves[..., 1] << 16).reshape(count, U, 64)
    return out


def unpack_codes(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The inverse of `pack_codes`: int32 [b, N, words(K)]."""
    T, (_, U, width) = tiles(N), packed.shape
    bits = width // 64
    out = torch.empty(bits, N, words(K), dtype=torch.int32, device=packed.device)

    def canonical(index: torch.Tensor) -> torch.Tensor:  # T h r U w s t -> [rows, words]
        plane = gather(index & 0x3333).reshape(-1, 16 * U).contiguous().view(torch.int32)
        return plane[: N - part.start * TILE, : words(K)]

    def halves(block: torch.Tensor, per_lane: int) -> torch.Tensor:  # -> T h r U w s t
        by_lane = block.reshape(-1, U, 8, 2, 2, per_lane)
        return torch.stack([by_lane & 0xFFFF, by_lane >> 16 & 0xFFFF], dim=1).permute(0, 1, 3, 2, 6, 4, 5)

    for part in chunks(T, 4 * U * width):
        rows = slice(part.start * TILE, part.stop * TILE)
        for i in range(0, bits - 1, 2):
            index = halves(packed[part, :, 64 * i : 64 * i + 128], 4)
            out[i, rows], out[i + 1, rows] = canonical(index), canonical(index >> 2)
        if bits % 2:
            index = halves(packed[part, :, 64 * (bits - 1) :], 2)
            out[-1, rows] = canonical(torch.stack([index, index >> 2], dim=5).flatten(4, 5))
    return out


def by_tile(tensor: torch.Tensor) -> torch.Tensor:
    """[P, N, G] -> [T, G, 8, 2, P]: rows (r, r + 8) of a tile side by side, N padded with 0."""
    P, N, G = tensor.shape
    padded = F.pad(tensor, (0, 0, 0, tiles(N) * TILE - N))
    return padded.view(P, tiles(N), 2, 8, G).permute(1, 4, 3, 2, 0).contiguous()


def by_row(tensor: torch.Tensor, N: int) -> torch.Tensor:
    """The inverse of `by_tile`."""
    return tensor.permute(4, 0, 3, 2, 1).flatten(1, 3)[:, :N].contiguous()


def fields(layer: LayerConfig) -> list[tuple[str, int, int]]:
    """The parts of a record in order: name in Packed, first plane, planes."""
    if layer.grid == "bcq":
        parts = [("scales", i, min(2, layer.bits - i)) for i in range(0, layer.bits, 2)]
        return [*parts, ("offsets", 0, 1)] if layer.offsets else parts
    return [("scales", 0, 1), ("zero_points", 0, 1)] if layer.offsets else [("scales", 0, 1)]


def pack_records(packed: Packed, layer: LayerConfig) -> torch.Tensor:
    """Scales with offsets or zero points -> uint8 [T + 1, G, bytes]."""
    parts = []
    for name, first, count in fields(layer):
        tensor = getattr(packed, name)
        tensor = tensor[first : first + count] if tensor.dim() == 3 else tensor[None]
        parts.append(by_tile(tensor).flatten(2).view(torch.uint8))
    return F.pad(torch.cat(parts, dim=-1), (0, 0, 0, 0, 0, 1))


def unpack_records(records: torch.Tensor, N: int, K: int, layer: LayerConfig) -> dict[str, torch.Tensor]:
    """The inverse of `pack_records`: scales and, where there are any, offsets or zero_points, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    shapes = packed_shapes(N, K, layer)
    records, at = records[:-1], 0
    for name, _, count in fields(layer):
        dtype = shapes[name][1]
        size = 16 * count * dtype.itemsize
        field = records[..., at : at + size].contiguous().view(dtype).view(*records.shape[:2], 8, 2, count)
        found.setdefault(name, []).append(by_row(field, N))
        at += size
    return {name: torch.cat(parts).view(shapes[name][0]) for name, parts in found.items()}
