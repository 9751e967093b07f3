"""From a matrix to its packed form: every method, width, group and input size, and what must not change the result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lutq.fit
from lutq.config import METHODS, QuantConfig
from lutq.fit import fit
from lutq.linear import LutLinear
from lutq.pack import dequantize, packed_shapes

KS = (1, 31, 32, 100, 172, 576)  # less than, exactly and more than one word; a short last group for every group size
GROUPS = (0, 32, 64, 128)


def gaussian(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def settings_of(method, has_offsets, **extra):
    return QuantConfig(method=method, offsets=has_offsets, symmetric=not has_offsets, **extra)


def same(left, right):
    return all(torch.equal(a, b) if a is not None else b is None for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_fit_and_multiply(method, has_offsets, bits, group):
    config = settings_of(method, has_offsets, bits=bits, group=group, iterations=3)
    layer = config.layer("x")
    N = 5
    for K in KS:
        about = f"{method=} {has_offsets=} {bits=} {group=} {K=}"
        W, x = gaussian(N, K), gaussian(3, K, seed=1)
        packed = fit(W, layer, config)
        found = {name: (tuple(part.shape), part.dtype) for name, part in packed._asdict().items() if part is not None}
        assert found == packed_shapes(N, K, layer), f"{about} {found=}"
        stored = dequantize(*packed, group, layer.grid, K)
        # rtn at 1 bit is the worst: with 0 as one of its two levels it leaves 0.57 of a long row's norm
        error = ((W - stored).square().sum() / W.square().sum()).item()
        assert error < 0.75, f"{about} {error=}"
        module = LutLinear.from_packed(packed, K, layer)
        module.backend = "reference"
        y = module(x)
        assert torch.equal(y, x @ stored.T), f"{about} {(y - x @ stored.T).abs().max()=}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_chunk_does_not_matter(monkeypatch, method, has_offsets, bits):
    N, K = 14, 100
    W = gaussian(N, K)
    for group in (0, 32):
        # one round: when to stop after more of them is decided over the rows at hand
        config = settings_of(method, has_offsets, bits=bits, group=group, iterations=1)
        whole = fit(W, config.layer("x"), config)
        for chunk in (2 * K, 5 * K, 9 * K, N * K):  # rows two by two; 5, 5, 4; 9, 5; all at once
            with monkeypatch.context() as patch:
                patch.setitem(lutq.fit.CHUNK, "cpu", chunk)
                parts = fit(W, config.layer("x"), config)
            assert same(parts, whole), f"{method=} {has_offsets=} {bits=} {group=} {chunk=}"


@settings(deadline=None, max_examples=40)
@given(
    method=st.sampled_from(METHODS),
    bits=st.integers(1, 4),
    group=st.sampled_from(GROUPS),
    has_offsets=st.booleans(),
    N=st.integers(1, 5),
    K=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_two_runs_are_equal(method, bits, group, has_offsets, N, K, seed):
    config = settings_of(method, has_offsets, bits=bits, group=group)
    W = gaussian(N, K, seed)
    before = W.clone()
    first, second = (fit(W, config.layer("x"), config) for _ in range(2))
    about = f"{method=} {bits=} {group=} {has_offsets=} {N=} {K=} {seed=}"
    assert same(first, second), about
    assert torch.equal(W, before), f"the input was changed: {about}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group", [0, 32])
def test_dtypes_of_the_input(method, dtype, group):
    W = gaussian(4, 100).to(dtype)
    config = QuantConfig(method=method, group=group)
    layer = config.layer("x")
    assert same(fit(W, layer, config), fit(W.float(), layer, config)), f"{method=} {dtype=} {group=}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", [0, 32])
def test_input_need_not_be_contiguous(method, group):
    config = QuantConfig(method=method, group=group)
    layer = config.layer("x")
    wide = gaussian(8, 300)
    views = {"transposed": wide.T[:4], "columns": wide[:, 50:150], "every other column": wide[:, ::2], "rows": wide[::2]}
    views["expanded"] = wide[0].expand(3, -1)
    for name, W in views.items():
        assert not W.is_contiguous(), f"{name} {W.stride()=}"
        assert same(fit(W, layer, config), fit(W.contiguous(), layer, config)), f"{method=} {group=} {name}"
