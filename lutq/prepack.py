"""Canonical packed tensors (lutq/pack.py) to the order of the CUDA kernels (kernels/layout.cuh), and back, bit for bit.

    codes [b, N, ceil(K/32)] int32     <->  codes [P, U, 4, 128 b] int32    P = ceil(N/64) panels, U = ceil(K/256) units
    scales, offsets or zero_points     <->  records [P, G', 4, bytes] uint8

A panel has four tiles of 16 rows, and G' groups cover the inputs of whole units. The order is a permutation of bits and scales,
and what pads N and K is 0: the way back is exact. Works on any device, a few panels at a time.
"""

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.pack import Packed, packed_shapes, words

TILE, PANEL, UNIT, SLAB = 16, 64, 256, 4  # rows, rows, inputs, units
CHUNK = 1 << 23  # bytes of codes reordered at a time, or a panel; about 40 times as much memory is used meanwhile


def panels(N: int) -> int:
    """Panels of 64 rows."""
    return -(-N // PANEL)


def units(K: int) -> int:
    """Units of 256 inputs."""
    return -(-K // UNIT)


def chunks(P: int, bytes_per_panel: int) -> list[slice]:
    """Slices of panels, each of at most CHUNK bytes of codes or one panel."""
    step = max(1, CHUNK // max(1, bytes_per_panel))
    return [slice(begin, min(P, begin + step)) for begin in range(0, P, step)]


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


def plane_order(bits: int, grid: str) -> list[int]:
    """Planes in the order in which they are paired. In pairs 2, 0 and 3, 1 of a uniform grid one bit weighs 4 times the other."""
    return [2, 0, 3, 1] if (bits, grid) == (4, "uniform") else list(range(bits))


def pack_codes(codes: torch.Tensor, grid: str) -> torch.Tensor:
    """Int32 [b, N, words] -> int32 [P, U, 4, 128 b]."""
    bits, N, width = codes.shape
    P, U, planes = panels(N), units(32 * width), plane_order(bits, grid)
    out = torch.empty(P, U, 4, 4, bits, 2, 16, dtype=torch.int32, device=codes.device)
    for part in chunks(P, bits * PANEL * U * UNIT // 8):
        rows = codes[:, part.start * PANEL : part.stop * PANEL]
        count = 4 * (part.stop - part.start)
        padded = F.pad(rows, (0, 8 * U - width, 0, count * TILE - rows.shape[1])).contiguous().view(torch.uint8)

        def put(made: torch.Tensor, i: int, part: slice = part) -> None:  # T, block, r, q, words; from plane i on
            to = out[part].transpose(1, 2)  # P tile U j
            pieces = made.reshape(part.stop - part.start, 4, U, 2, 4, 2, 4, -1).transpose(3, 4)  # P tile U j block r % 2 q w
            if made.shape[-1] == 2:
                to[..., i, :, :] = pieces.transpose(5, 6).flatten(5)
            else:
                to[..., i, :, :] = pieces[..., 0, :, :].flatten(5)
                to[..., i + 1, :, :] = pieces[..., 1, :, :].flatten(5).flip(4)

        # plane, then T h r B w s t: tile, row half, row, block, 32 inputs, 16 inputs, lane
        index = spread(padded.view(bits, count, 2, 8, 2 * U, 4, 2, 2))
        for i in range(0, bits - 1, 2):
            halves = (index[planes[i]] | index[planes[i + 1]] << 2).permute(0, 3, 2, 5, 6, 4, 1)  # T B r s t w h
            put((halves[..., 0] | halves[..., 1] << 16).flatten(3, 4), i)
        if bits % 2:
            last = index[-1].unflatten(4, (2, 2))  # T h r B v parity s t
            halves = (last[:, :, :, :, :, 0] | last[:, :, :, :, :, 1] << 2).permute(0, 3, 2, 5, 6, 4, 1)
            put((halves[..., 0] | halves[..., 1] << 16).flatten(3, 4), bits - 1)
    return out.view(P, U, 4, 128 * bits)


def unpack_codes(packed: torch.Tensor, N: int, K: int, grid: str) -> torch.Tensor:
    """The inverse of `pack_codes`: int32 [b, N, words(K)]."""
    P, U, _, width = packed.shape
    bits = width // 128
    planes = plane_order(bits, grid)
    out = torch.empty(bits, N, words(K), dtype=torch.int32, device=packed.device)

    def canonical(plane: torch.Tensor) -> torch.Tensor:  # bytes -> [rows, words]
        return plane.reshape(-1, 32 * U).contiguous().view(torch.int32)[: N - part.start * PANEL, : words(K)]

    def halves(tiles: torch.Tensor, i: int) -> torch.Tensor:  # P tile U j plane block words -> T h r B w s t
        if i + 1 < bits:
            by_lane = torch.stack([tiles[..., i, :, :], tiles[..., i + 1, :, :].flip(4)], dim=5)  # ... block r % 2 words
            by_lane = by_lane.unflatten(-1, (4, 4))
        else:
            by_lane = tiles[..., i, :, :].unflatten(-1, (4, 2, 2)).transpose(5, 6)
        by_lane = by_lane.transpose(3, 4).reshape(-1, 2 * U, 8, 2, 2, by_lane.shape[-1])
        return torch.stack([by_lane & 0xFFFF, by_lane >> 16 & 0xFFFF], dim=1).permute(0, 1, 3, 2, 6, 4, 5)

    for part in chunks(P, bits * PANEL * U * UNIT // 8):
        rows = slice(part.start * PANEL, part.stop * PANEL)
        tiles = packed[part].view(-1, U, 4, 4, bits, 2, 16).transpose(1, 2)
        for i in range(0, bits - 1, 2):
            index = halves(tiles, i)
            out[planes[i], rows] = canonical(gather(index & 0x3333))
            out[planes[i + 1], rows] = canonical(gather(index >> 2 & 0x3333))
        if bits % 2:
            index = halves(tiles, bits - 1)
            out[-1, rows] = canonical(gather(torch.stack([index, index >> 2], dim=5).flatten(4, 5) & 0x3333))
    return out


def by_tile(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[C, N, G] -> [P, groups, 4, 8, 2, C]: rows (r, r + 8) of a tile side by side, N and G padded with 0."""
    C, N, G = tensor.shape
    padded = F.pad(tensor, (0, groups - G, 0, panels(N) * PANEL - N))
    return padded.view(C, panels(N), 4, 2, 8, groups).permute(1, 5, 2, 4, 3, 0).contiguous()


def by_row(tensor: torch.Tensor, N: int, G: int) -> torch.Tensor:
    """The inverse of `by_tile`: [C, N, G]."""
    return tensor.permute(5, 0, 2, 4, 3, 1).flatten(1, 4)[:, :N, :G]


def fields(layer: LayerConfig) -> list[tuple[str, int, int]]:
    """The parts of a record in order: name in Packed, first plane, planes."""
    if layer.grid == "bcq":
        parts = [("scales", i, min(2, layer.bits - i)) for i in range(0, layer.bits, 2)]
        return [*parts, ("offsets", 0, 1)] if layer.offsets else parts
    return [("scales", 0, 1), ("zero_points", 0, 1)] if layer.offsets else [("scales", 0, 1)]


def pack_records(packed: Packed, K: int, layer: LayerConfig) -> torch.Tensor:
    """Scales with offsets or zero points -> uint8 [P, G', 4, bytes], G' groups for all inputs of whole units."""
    parts, groups = [], -(-units(K) * UNIT // (layer.group or units(K) * UNIT))
    for name, first, count in fields(layer):
        tensor = getattr(packed, name)
        tensor = tensor[first : first + count] if tensor.dim() == 3 else tensor[None]
        parts.append(by_tile(tensor, groups).flatten(3).view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_records(records: torch.Tensor, N: int, K: int, layer: LayerConfig) -> dict[str, torch.Tensor]:
    """The inverse of `pack_records`: scales and, where there are any, offsets or zero_points, by name."""
    found: dict[str, list[torch.Tensor]] = {}
    shapes, at = packed_shapes(N, K, layer), 0
    for name, _, count in fields(layer):
        dtype = shapes[name][1]
        size = 16 * count * dtype.itemsize
        field = records[..., at : at + size].contiguous().view(dtype).view(*records.shape[:3], 8, 2, count)
        found.setdefault(name, []).append(by_row(field, N, shapes[name][0][-1]))
        at += size
    return {name: torch.cat(parts).view(shapes[name][0]) for name, parts in found.items()}
