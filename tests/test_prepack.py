"""The kernel order: there and back bit for bit, and every bit where kernels/layout.cuh says that it lies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import lutq.prepack
from lutq.config import LayerConfig
from lutq.pack import Packed, packed_shapes, words
from lutq.prepack import chunks, pack_codes, pack_records, panels, plane_order, units, unpack_codes, unpack_records

GROUPS, GRIDS = (0, 32, 64, 96, 128), ("bcq", "uniform")
LAYERS = st.builds(LayerConfig, st.integers(1, 4), st.sampled_from(GROUPS), st.sampled_from(GRIDS), st.booleans())
SEEDS = st.integers(0, 2**32 - 1)
some = settings(deadline=None, max_examples=150)  # no deadline: the first example of a process pays for torch's start


def random_packed(N, K, layer, seed=0):
    """Any bits at all, those of NaN and those past K too: the order is one of bits, not of values."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in packed_shapes(N, K, layer).items():
        low, high, drawn = {
            torch.int32: (-(2**31), 2**31, torch.int32),
            torch.float16: (-(2**15), 2**15, torch.int16),
            torch.uint8: (0, 256, torch.uint8),
        }[dtype]
        tensors[name] = torch.randint(low, high, shape, generator=random).to(drawn).view(dtype)
    return Packed(**tensors)


def as_bits(tensor):
    """Tensors of fp16 as integers, so that NaN equals itself."""
    return tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor


def check_same(actual, expected, about):
    assert actual.dtype == expected.dtype, f"{about} {actual.dtype=}"
    assert actual.shape == expected.shape, f"{about} {actual.shape=} {expected.shape=}"
    assert torch.equal(as_bits(actual), as_bits(expected)), about


def check_round_trip(N, K, layer, seed):
    packed, about = random_packed(N, K, layer, seed), f"{N=} {K=} {layer=} {seed=}"
    codes, records = pack_codes(packed.codes, layer.grid), pack_records(packed, K, layer)
    P, U = -(-N // 64), -(-K // 256)
    G = -(-256 * U // (layer.group or 256 * U))
    size = 32 * (layer.bits + layer.offsets) if layer.grid == "bcq" else 32 + 16 * layer.offsets
    assert (codes.shape, codes.dtype) == ((P, U, 4, 128 * layer.bits), torch.int32), f"{about} {codes.shape=}"
    assert (records.shape, records.dtype) == ((P, G, 4, size), torch.uint8), f"{about} {records.shape=}"
    assert codes.is_contiguous(), about  # kernels take their addresses
    assert records.is_contiguous(), about
    check_same(unpack_codes(codes, N, K, layer.grid), packed.codes, f"codes {about}")
    back = unpack_records(records, N, K, layer)
    assert set(back) == set(packed_shapes(N, K, layer)) - {"codes"}, about
    for name, tensor in back.items():
        check_same(tensor, getattr(packed, name), f"{name} {about}")


@some
@given(N=st.integers(1, 140), K=st.integers(1, 600), layer=LAYERS, seed=SEEDS)
def test_there_and_back(N, K, layer, seed):
    check_round_trip(N, K, layer, seed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("offsets", [False, True])
def test_there_and_back_at_the_edges(bits, grid, offsets):
    sizes = ((1, 1), (15, 31), (16, 32), (17, 33), (16, 255), (32, 256), (33, 257), (8, 512), (9, 513))
    for group in GROUPS:
        for N, K in (*sizes, (63, 255), (64, 256), (65, 257), (128, 512), (129, 513)):
            check_round_trip(N, K, LayerConfig(bits, group, grid, offsets), N + K)


def codes_by_the_comment(codes, grid):
    """What kernels/layout.cuh says of `codes`, one bit at a time: int32 [b, N, words] -> list [P][U][4 tiles][128 b] of words."""
    bits, N, width = codes.shape
    canonical = codes.tolist()
    P, U = -(-N // 64), -(-32 * width // 256)
    pairs = [(2, 0), (3, 1)] if (bits, grid) == (4, "uniform") else [(0, 1), (2, 3)][: bits // 2]

    def sign(i, n, k):
        return (canonical[i][n][k // 32] >> k % 32) & 1 if n < N and k < 32 * width else 0

    def half_word(tile, first, lane, h, low, high):
        """Four nibbles; low and high are (plane, w), inputs counted from `first`."""
        r, q, value = lane // 4, lane % 4, 0
        for j in range(4):
            p = 4 * (j % 2) + 2 * (q % 2) + j // 2
            for shift, (i, w) in ((0, low), (2, high)):
                k = first + 32 * w + 16 * (q // 2) + 2 * p
                index = sign(i, 16 * tile + r + 8 * h, k) | sign(i, 16 * tile + r + 8 * h, k + 1) << 1
                value |= index << (4 * j + shift)
        return value

    def word(*place, low, high):
        value = half_word(*place, 0, low, high) | half_word(*place, 1, low, high) << 16
        return value - 2**32 if value >= 2**31 else value

    def words_of(tile, unit):
        made, i = [], bits - 1
        for j in range(4):
            rows = (2 * j, 2 * j + 1)
            for low, high in pairs:
                for r in rows:
                    for block in (2 * unit + r % 2, 2 * unit + 1 - r % 2):
                        lanes = [(128 * block, 4 * r + q) for q in range(4)]
                        made += [word(tile, *lane, low=(low, w), high=(high, w)) for lane in lanes for w in range(4)]
            for block in (2 * unit, 2 * unit + 1) if bits % 2 else ():
                lanes = [(128 * block, 4 * r + q) for q in range(4) for r in rows]
                made += [word(tile, *lane, low=(i, 2 * v), high=(i, 2 * v + 1)) for lane in lanes for v in range(2)]
        return made

    return [[[words_of(4 * panel + t, unit) for t in range(4)] for unit in range(U)] for panel in range(P)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("N", "K"), [(84, 300), (64, 256), (20, 600), (1, 1)])
def test_codes_lie_where_layout_says(bits, grid, N, K):
    codes, about = random_packed(N, K, LayerConfig(bits, 32, grid), seed=bits).codes, f"{bits=} {grid=} {N=} {K=}"
    expected = torch.tensor(codes_by_the_comment(codes, grid), dtype=torch.int32)
    actual = pack_codes(codes, grid)
    assert actual.shape == expected.shape, f"{about} {actual.shape=}"
    wrong = (actual != expected).nonzero()
    assert not len(wrong), f"{about}: {len(wrong)} words differ, the first [panel, unit, tile, word] {wrong[0].tolist()}"


def test_plane_order():
    """Natural, but for 4 uniform bits: there the two of a pair weigh 1 to 4, so that one product serves both."""
    for grid in GRIDS:
        for bits in (1, 2, 3, 4):
            expected = [2, 0, 3, 1] if (bits, grid) == (4, "uniform") else list(range(bits))
            assert plane_order(bits, grid) == expected, f"{bits=} {grid=}"
    weights = [2 ** (3 - i) for i in plane_order(4, "uniform")]  # see lutq/pack.py
    assert weights[1::2] == [4 * weight for weight in weights[::2]], f"{weights=}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_grids_differ_in_the_order_of_planes_alone(bits):
    codes = random_packed(70, 300, LayerConfig(bits, 32), seed=bits).codes
    assert torch.equal(pack_codes(codes, "uniform"), pack_codes(codes[plane_order(bits, "uniform")], "bcq")), f"{bits=}"


def records_by_the_comment(packed, layer, P, groups):
    """What kernels/layout.cuh says of `records`, one number at a time: bytes of [P][groups][4 tiles][record]."""
    _, N, G = packed.scales.shape

    def number(tensor, *at):
        """The bytes of one element, 0 past N and past the last canonical group."""
        size, (n, g) = tensor.dtype.itemsize, at[-2:]
        return bytes(size) if n >= N or g >= G else tensor[at].view(1).view(torch.uint8).numpy().tobytes()

    def record(tile, g):
        out = b""
        if layer.grid == "bcq":
            for i in range(0, layer.bits - 1, 2):
                for r in range(8):
                    for n in (16 * tile + r, 16 * tile + r + 8):
                        out += number(packed.scales, i, n, g) + number(packed.scales, i + 1, n, g)
            single = [(packed.scales, layer.bits - 1)] if layer.bits % 2 else []
        else:
            single = [(packed.scales, 0)]
        extra = packed.offsets if layer.grid == "bcq" else packed.zero_points
        for tensor, *plane in single + ([(extra,)] if layer.offsets else []):
            for r in range(8):
                out += number(tensor, *plane, 16 * tile + r, g) + number(tensor, *plane, 16 * tile + r + 8, g)
        return out

    return b"".join(record(4 * panel + t, g) for panel in range(P) for g in range(groups) for t in range(4))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("offsets", [False, True])
def test_records_lie_where_layout_says(bits, grid, offsets):
    for N, K, group, groups in ((84, 300, 96, 6), (64, 256, 128, 2), (20, 300, 0, 1)):
        layer = LayerConfig(bits, group, grid, offsets)
        packed, about = random_packed(N, K, layer), f"{N=} {K=} {layer=}"
        records = pack_records(packed, K, layer)
        assert records.shape[:3] == (-(-N // 64), groups, 4), f"{about} {records.shape=}"
        assert records.numpy().tobytes() == records_by_the_comment(packed, layer, -(-N // 64), groups), about


def ones(N, K, layer):
    """Every bit set, so that what is 0 in kernel order is padding."""
    shapes = packed_shapes(N, K, layer)
    whole = {name: torch.full((*shape, dtype.itemsize), 255, dtype=torch.uint8) for name, (shape, dtype) in shapes.items()}
    return Packed(**{name: tensor.view(shapes[name][1]).squeeze(-1) for name, tensor in whole.items()})


@some
@given(N=st.integers(1, 140), K=st.integers(1, 600), layer=LAYERS)
def test_padding_is_zero(N, K, layer):
    """As many bits are set as there are in the canonical tensors."""
    packed, about = ones(N, K, layer), f"{N=} {K=} {layer=}"
    for kernel_order, canonical in (
        (pack_codes(packed.codes, layer.grid), [packed.codes]),
        (pack_records(packed, K, layer), [tensor for tensor in packed[1:] if tensor is not None]),
    ):
        set_bits = sum(8 * tensor.numel() * tensor.dtype.itemsize for tensor in canonical)
        as_bytes = kernel_order.contiguous().view(torch.uint8)
        counted = sum(((as_bytes >> shift) & 1).sum().item() for shift in range(8))
        assert counted == set_bits, f"{about} {counted=} {set_bits=}"


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("K", "group", "G", "groups"),
    [(1, 32, 1, 8), (300, 32, 10, 16), (300, 96, 4, 6), (300, 128, 3, 4), (600, 0, 1, 1), (256, 0, 1, 1), (512, 128, 4, 4)],
)
def test_groups_past_the_canonical_ones_are_zero(grid, K, group, G, groups):
    """Groups for whole units are there, and only the canonical ones hold anything, in the 64 + 20 rows that there are."""
    N, layer = 84, LayerConfig(3, group, grid, True)
    records = pack_records(ones(N, K, layer), K, layer)
    assert records.shape[:3] == (2, groups, 4), f"{records.shape=}"
    assert not records[:, G:].any()
    assert (records[0, :G] == 255).all()
    assert (records[1, :G, 0] == 255).all()
    assert not records[1, :, 2:].any()
    assert (records[1, :G, 1] != 0).float().mean() == 4 / 16  # of its rows


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("chunk", [1, 3000, 20_000])
def test_chunks_change_nothing(bits, grid, chunk, monkeypatch):
    for N, K in ((1, 33), (300, 600), (256, 256)):
        codes = random_packed(N, K, LayerConfig(bits, 32, grid), seed=N).codes
        whole, about = pack_codes(codes, grid), f"{bits=} {grid=} {chunk=} {N=} {K=}"
        with monkeypatch.context() as patch:
            patch.setattr(lutq.prepack, "CHUNK", chunk)
            per_panel = bits * 64 * words(K) * 4
            assert len(chunks(panels(N), per_panel)) >= -(-panels(N) * per_panel // max(chunk, per_panel)), about
            assert torch.equal(pack_codes(codes, grid), whole), about
            assert torch.equal(unpack_codes(whole, N, K, grid), codes), about


class Sizes(TorchDispatchMode):
    """Bytes of every tensor made inside, by its memory: views do not count twice."""

    def __enter__(self):
        self.bytes = {}
        self.alive = []  # or an address would be used again
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.alive.append(made)
            self.bytes[made.untyped_storage().data_ptr()] = made.untyped_storage().nbytes()
        return made


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_memory_is_bounded_by_chunks(bits, grid, monkeypatch):
    """Besides input and output no tensor is larger than a few chunks, however large the matrix."""
    N, K, chunk = 32 * 64, 512, 4096 * bits  # a panel at a time
    monkeypatch.setattr(lutq.prepack, "CHUNK", chunk)
    codes = random_packed(N, K, LayerConfig(bits, 32, grid)).codes
    packed = pack_codes(codes, grid)
    for about, source, function in (
        ("pack", codes, lambda: pack_codes(codes, grid)),
        ("unpack", packed, lambda: unpack_codes(packed, N, K, grid)),
    ):
        with Sizes() as sizes:
            result = function()
        own = {tensor.untyped_storage().data_ptr() for tensor in (source, result)}
        largest = max(size for address, size in sizes.bytes.items() if address not in own)
        assert largest <= 4 * chunk, f"{about} {bits=} {grid=}: {largest / chunk:.1f} chunks of {N * K * bits // 8 / chunk:.0f}"


def test_slices_are_those_of_whole():
    """chunks() covers every panel once, in order, and none is larger than asked."""
    for P in (0, 1, 5, 64):
        for size in (0, 1, 1 << 20, lutq.prepack.CHUNK, 1 << 30):
            parts = chunks(P, size)
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(P)), f"{P=} {size=} {parts=}"
            assert all((part.stop - part.start) * size <= max(size, lutq.prepack.CHUNK) for part in parts), f"{P=} {size=}"


def test_panels_and_units():
    assert [panels(N) for N in (1, 63, 64, 65, 128, 129)] == [1, 1, 1, 2, 2, 3]
    assert [units(K) for K in (1, 255, 256, 257, 512, 513)] == [1, 1, 1, 2, 2, 3]


def turned(tensor, *dims):
    """The same numbers, stored with two dimensions swapped."""
    return tensor.transpose(*dims).contiguous().transpose(*dims)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("N", "K"), [(40, 300), (128, 512)])  # with padding, and without any
def test_tensors_need_not_be_contiguous(grid, N, K):
    layer = LayerConfig(3, 32, grid, True)
    packed = random_packed(N, K, layer)
    codes, records = pack_codes(packed.codes, grid), pack_records(packed, K, layer)
    strided = packed._replace(codes=turned(packed.codes, 0, 1), scales=turned(packed.scales, 1, 2))
    assert not strided.codes.is_contiguous()
    assert not strided.scales.is_contiguous()
    assert torch.equal(pack_codes(strided.codes, grid), codes)
    assert torch.equal(pack_records(strided, K, layer), records)
    wide = torch.stack([codes, ~codes], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert torch.equal(unpack_codes(wide, N, K, grid), packed.codes)
    back = unpack_records(torch.stack([records, ~records], dim=-1)[..., 0], N, K, layer)
    for name, tensor in back.items():
        check_same(tensor, getattr(packed, name), name)
