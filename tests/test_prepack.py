"""The kernel order: there and back bit for bit, and every bit where kernels/layout.cuh says that it lies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lutq.prepack
from lutq.config import LayerConfig
from lutq.pack import Packed, group_size, packed_shapes, words
from lutq.prepack import chunks, pack_codes, pack_records, tiles, unpack_codes, unpack_records

GROUPS = (0, 32, 64, 96, 128)
LAYERS = st.builds(LayerConfig, st.integers(1, 4), st.sampled_from(GROUPS), st.sampled_from(("bcq", "uniform")), st.booleans())
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
    codes, records = pack_codes(packed.codes), pack_records(packed, layer)
    T, U, G = -(-N // 16), -(-K // 256), packed.scales.shape[-1]
    size = 32 * (layer.bits + layer.offsets) if layer.grid == "bcq" else 32 + 16 * layer.offsets
    assert (codes.shape, codes.dtype) == ((T + 1, 2 * U, 64 * layer.bits), torch.int32), f"{about} {codes.shape=}"
    assert (records.shape, records.dtype) == ((T + 1, G, size), torch.uint8), f"{about} {records.shape=}"
    assert codes.is_contiguous(), about  # kernels take their addresses
    assert records.is_contiguous(), about
    check_same(unpack_codes(codes, N, K), packed.codes, f"codes {about}")
    back = unpack_records(records, N, K, layer)
    assert set(back) == set(packed_shapes(N, K, layer)) - {"codes"}, about
    for name, tensor in back.items():
        check_same(tensor, getattr(packed, name), f"{name} {about}")


@some
@given(N=st.integers(1, 70), K=st.integers(1, 600), layer=LAYERS, seed=SEEDS)
def test_there_and_back(N, K, layer, seed):
    check_round_trip(N, K, layer, seed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", ["bcq", "uniform"])
@pytest.mark.parametrize("offsets", [False, True])
def test_there_and_back_at_the_edges(bits, grid, offsets):
    for group in GROUPS:
        for N, K in ((1, 1), (15, 31), (16, 32), (17, 33), (16, 255), (32, 256), (33, 257), (8, 512), (9, 513)):
            check_round_trip(N, K, LayerConfig(bits, group, grid, offsets), N + K)


def codes_by_the_comment(codes):
    """What kernels/layout.cuh says of `codes`, one bit at a time: int32 [b, N, words] -> list [T + 1][2 U][64 b] of words."""
    bits, N, width = codes.shape
    canonical = codes.tolist()
    T, U = -(-N // 16), -(-32 * width // 256)

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

    out = []
    for tile in range(T + 1):
        rows = []
        for block in range(2 * U):
            made = []
            for i in range(0, bits - 1, 2):
                made += [word(tile, 128 * block, lane, low=(i, w), high=(i + 1, w)) for lane in range(32) for w in range(4)]
            if bits % 2:
                i = bits - 1
                made += [
                    word(tile, 128 * block, lane, low=(i, 2 * v), high=(i, 2 * v + 1)) for lane in range(32) for v in range(2)
                ]
            rows.append(made)
        out.append(rows)
    return out


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("N", "K"), [(20, 300), (16, 256), (1, 1)])
def test_codes_lie_where_layout_says(bits, N, K):
    codes = random_packed(N, K, LayerConfig(bits, 32), seed=bits).codes
    expected = torch.tensor(codes_by_the_comment(codes), dtype=torch.int32)
    actual = pack_codes(codes)
    assert actual.shape == expected.shape, f"{bits=} {N=} {K=} {actual.shape=}"
    wrong = (actual != expected).nonzero()
    assert not len(wrong), f"{bits=} {N=} {K=}: {len(wrong)} words differ, the first [tile, block, word] {wrong[0].tolist()}"


def records_by_the_comment(packed, layer, N, G):
    """What kernels/layout.cuh says of `records`, one number at a time: bytes of [T][G][...]."""

    def number(tensor, *at):
        """The bytes of one element, 0 past N."""
        size = tensor.dtype.itemsize
        return bytes(size) if at[-2] >= N else tensor[at].view(1).view(torch.uint8).numpy().tobytes()

    out = b""
    for tile in range(-(-N // 16)):
        for g in range(G):
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


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", ["bcq", "uniform"])
@pytest.mark.parametrize("offsets", [False, True])
def test_records_lie_where_layout_says(bits, grid, offsets):
    N, K, layer = 20, 300, LayerConfig(bits, 96, grid, offsets)
    packed = random_packed(N, K, layer)
    G = -(-K // group_size(96, K))
    records = pack_records(packed, layer)
    assert records[:-1].numpy().tobytes() == records_by_the_comment(packed, layer, N, G), f"{layer=}"
    assert not records[-1].any(), f"{layer=}: the spare tile is not zero"


def ones(N, K, layer):
    """Every bit set, so that what is 0 in kernel order is padding."""
    shapes = packed_shapes(N, K, layer)
    whole = {name: torch.full((*shape, dtype.itemsize), 255, dtype=torch.uint8) for name, (shape, dtype) in shapes.items()}
    return Packed(**{name: tensor.view(shapes[name][1]).squeeze(-1) for name, tensor in whole.items()})


@some
@given(N=st.integers(1, 70), K=st.integers(1, 600), layer=LAYERS)
def test_padding_is_zero(N, K, layer):
    """As many bits are set as there are in the canonical tensors, and none in the spare tile."""
    packed, about = ones(N, K, layer), f"{N=} {K=} {layer=}"
    for kernel_order, canonical in (
        (pack_codes(packed.codes), [packed.codes]),
        (pack_records(packed, layer), [tensor for tensor in packed[1:] if tensor is not None]),
    ):
        set_bits = sum(8 * tensor.numel() * tensor.dtype.itemsize for tensor in canonical)
        as_bytes = kernel_order.contiguous().view(torch.uint8)
        counted = sum(((as_bytes >> shift) & 1).sum().item() for shift in range(8))
        assert counted == set_bits, f"{about} {counted=} {set_bits=}"
        assert not kernel_order[-1].any(), f"{about}: the spare tile is not zero"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 3000, 20_000])
def test_chunks_change_nothing(bits, chunk, monkeypatch):
    for N, K in ((1, 33), (70, 600), (64, 256)):
        codes = random_packed(N, K, LayerConfig(bits, 32), seed=N).codes
        whole = pack_codes(codes)
        with monkeypatch.context() as patch:
            patch.setattr(lutq.prepack, "CHUNK", chunk)
            per_tile = bits * 16 * words(K) * 4
            assert len(chunks(tiles(N), per_tile)) >= min(tiles(N), -(-tiles(N) * per_tile // max(chunk, per_tile)))
            assert torch.equal(pack_codes(codes), whole), f"{bits=} {chunk=} {N=} {K=}"
            assert torch.equal(unpack_codes(whole, N, K), codes), f"{bits=} {chunk=} {N=} {K=}"


def test_slices_are_those_of_whole():
    """chunks() covers every tile once, in order, and none is larger than asked."""
    for T in (0, 1, 5, 64):
        for size in (0, 1, 1 << 20, lutq.prepack.CHUNK, 1 << 30):
            parts = chunks(T, size)
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(T)), f"{T=} {size=} {parts=}"
            assert all((part.stop - part.start) * size <= max(size, lutq.prepack.CHUNK) for part in parts), f"{T=} {size=}"


def test_codes_need_not_be_contiguous():
    packed = random_packed(40, 300, LayerConfig(3, 32))
    strided = packed.codes.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(pack_codes(strided), pack_codes(packed.codes))
