"""The packed form: its bits one by one, and its values against the formulas of lutq/pack.py in Python floats."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lutq.pack
from lutq.config import METHODS, LayerConfig, QuantConfig
from lutq.fit import fit
from lutq.pack import Packed, dequantize, pack_bits, packed_shapes, signs, unpack_bits

KS = st.integers(1, 100)
SEEDS = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=60)  # no deadline: the first example of a process pays for torch's start


def random_bits(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def random_packed(N, K, layer, seed):
    """Any content a checkpoint may hold, so not through `fit`: scales from subnormal to 2^8, offsets of both signs."""
    random = torch.Generator().manual_seed(seed)
    shapes = packed_shapes(N, K, layer)
    codes = pack_bits(torch.rand(layer.bits, N, K, generator=random) < 0.5)
    scales = torch.rand(shapes["scales"][0], generator=random).mul(32).sub(24).exp2().half()
    offsets = torch.randn(shapes["offsets"][0], generator=random).half() if "offsets" in shapes else None
    zero_points = None
    if "zero_points" in shapes:
        zero_points = torch.randint(0, 2**layer.bits, shapes["zero_points"][0], generator=random, dtype=torch.uint8)
    return Packed(codes, scales, offsets, zero_points)


def dense(packed, K, group, grid):
    """Weights and sums of the magnitudes of their terms, float64 [N, K] each, one weight at a time."""
    codes, scales = packed.codes.tolist(), packed.scales.tolist()
    offsets = None if packed.offsets is None else packed.offsets.tolist()
    zero_points = None if packed.zero_points is None else packed.zero_points.tolist()
    bits, N = len(codes), len(codes[0])
    values, magnitudes = torch.zeros(N, K, dtype=torch.float64), torch.zeros(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            G = k // group if group else 0
            ones = [(codes[i][n][k // 32] >> (k % 32)) & 1 for i in range(bits)]
            if grid == "uniform":
                u = sum(one * 2 ** (bits - 1 - i) for i, one in enumerate(ones))
                center = zero_points[n][G] if zero_points is not None else (2**bits - 1) / 2
                terms = [scales[0][n][G] * (u - center)]
            else:
                terms = [scales[i][n][G] * (2 * one - 1) for i, one in enumerate(ones)]
                terms += [offsets[n][G]] if offsets is not None else []
            values[n, k], magnitudes[n, k] = sum(terms), sum(map(abs, terms))
    return values, magnitudes


@quick
@given(leading=st.lists(st.integers(0, 4), max_size=3), K=KS, seed=SEEDS)
def test_round_trip(leading, K, seed):
    bits = random_bits((*leading, K), seed)
    codes = pack_bits(bits)
    assert codes.dtype == torch.int32, f"{leading=} {K=} {codes.dtype=}"
    assert codes.shape == (*leading, -(-K // 32)), f"{leading=} {K=} {codes.shape=}"
    assert torch.equal(unpack_bits(codes, K), bits), f"{leading=} {K=} {seed=}"


@pytest.mark.parametrize("K", [1, 31, 32, 33, 64, 100])
def test_layout_one_bit_at_a_time(K):
    for k in range(K):
        bits = torch.zeros(K, dtype=torch.bool)
        bits[k] = True
        expected = [0] * -(-K // 32)
        expected[k // 32] = 1 << (k % 32)
        words = [word & 0xFFFFFFFF for word in pack_bits(bits).tolist()]
        assert words == expected, f"{K=} {k=} {words=}"


@quick
@given(rows=st.integers(1, 3), K=KS, seed=SEEDS)
def test_layout_of_whole_rows(rows, K, seed):
    bits = random_bits((rows, K), seed)
    words = [[word & 0xFFFFFFFF for word in row] for row in pack_bits(bits).tolist()]
    slices = [slice(begin, begin + 32) for begin in range(0, K, 32)]
    expected = [[sum(one << t for t, one in enumerate(row[part])) for part in slices] for row in bits.int().tolist()]
    assert words == expected, f"{rows=} {K=} {seed=}"


@pytest.mark.parametrize("K", [1, 7, 31, 33, 63, 100])
def test_padding_bits_are_zero(K):
    codes = pack_bits(torch.ones(2, 3, K, dtype=torch.bool))
    assert not unpack_bits(codes, codes.shape[-1] * 32)[..., K:].any(), f"{K=} {codes=}"


@quick
@given(leading=st.lists(st.integers(1, 3), max_size=2), K=KS, seed=SEEDS)
def test_signs_is_unpack(leading, K, seed):
    codes = pack_bits(random_bits((*leading, K), seed))
    bits = unpack_bits(codes, K)
    found = signs(codes, K)
    assert found.dtype == torch.float32, f"{leading=} {K=} {found.dtype=}"
    assert torch.equal(found, torch.where(bits, 1.0, -1.0)), f"{leading=} {K=} {seed=}"
    assert torch.equal(signs(codes, K, 8.0, 0.0), torch.where(bits, 8.0, 0.0)), f"{leading=} {K=} {seed=}"


def test_codes_need_not_be_contiguous():
    bits = random_bits((6, 100), 0)
    codes = pack_bits(bits).T.contiguous().T
    assert not codes.is_contiguous(), f"{codes.stride()=}"
    assert torch.equal(unpack_bits(codes, 100), bits)
    assert torch.equal(signs(codes, 100), torch.where(bits, 1.0, -1.0))


LAYERS = st.builds(
    LayerConfig, st.integers(1, 4), st.sampled_from([0, 32, 64, 128]), st.sampled_from(["bcq", "uniform"]), st.booleans()
)


@quick
@given(N=st.integers(1, 3), K=KS, layer=LAYERS, seed=SEEDS)
def test_dequantize(N, K, layer, seed):
    packed = random_packed(N, K, layer, seed)
    found = dequantize(*packed, layer.group, layer.grid, K).double()
    expected, magnitudes = dense(packed, K, layer.group, layer.grid)
    if layer.grid == "uniform":  # 11 bits of s times at most 5 bits of u - zp: nothing to round in fp32
        assert torch.equal(found, expected), f"{N=} {K=} {layer=} {seed=} {(found - expected).abs().max()=}"
    else:  # at most 4 additions, each of which rounds a sum below `magnitudes` to 24 bits
        excess = ((found - expected).abs() - 2.0**-22 * magnitudes).max()
        assert excess <= 0, f"{N=} {K=} {layer=} {seed=} {excess=}"


@quick
@given(N=st.integers(1, 3), K=KS, layer=LAYERS, seed=SEEDS)
def test_dtype_rounds_once(N, K, layer, seed):
    packed = random_packed(N, K, layer, seed)
    exact = dequantize(*packed, layer.group, layer.grid, K)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = dequantize(*packed, layer.group, layer.grid, K, dtype)
        assert found.dtype == dtype, f"{N=} {K=} {layer=} {dtype=} {found.dtype=}"
        assert torch.equal(found, exact.to(dtype)), f"{N=} {K=} {layer=} {dtype=} {seed=}"
    if layer.grid == "uniform":  # and straight from float64, which numpy rounds without a step through fp32
        found = dequantize(*packed, layer.group, layer.grid, K, torch.float16).numpy()
        expected = dense(packed, K, layer.group, layer.grid)[0].numpy().astype(np.float16)
        assert np.array_equal(found, expected), f"{N=} {K=} {layer=} {seed=}"


@pytest.mark.parametrize("grid", ["bcq", "uniform"])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("group", [0, 32])
def test_dequantize_chunk_does_not_matter(monkeypatch, grid, offsets, group):
    N, K, layer = 7, 100, LayerConfig(3, group, grid, offsets)
    packed = random_packed(N, K, layer, 0)
    whole = dequantize(*packed, group, grid, K)
    for chunk in (1, 99, 100, 250):  # one row at a time thrice, then 2, 2, 2 and 1
        monkeypatch.setattr(lutq.pack, "CHUNK", chunk)
        assert torch.equal(dequantize(*packed, group, grid, K), whole), f"{grid=} {offsets=} {group=} {chunk=}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("has_offsets", [False, True])
def test_packed_shapes_are_those_of_fit(method, has_offsets):
    config = QuantConfig(method=method, offsets=has_offsets, symmetric=not has_offsets, iterations=1)
    for bits in (1, 2, 3, 4):
        for group in (0, 32, 96):
            for K in (1, 32, 33, 97, 200):
                layer = LayerConfig(bits, group, config.grid, has_offsets)
                packed = fit(torch.linspace(-1, 1, 5 * K).view(5, K), layer, config)
                found = {name: (tuple(part.shape), part.dtype) for name, part in packed._asdict().items() if part is not None}
                assert found == packed_shapes(5, K, layer), f"{method=} {bits=} {group=} {K=} {has_offsets=} {found=}"
