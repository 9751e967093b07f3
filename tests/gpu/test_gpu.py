"""The same path on a GPU: fits, the operator, loading, perplexity and resuming. Skipped where there is none."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lutq.config import QuantConfig
from lutq.data import load_text
from lutq.evaluate import window_nll, windows_of
from lutq.fit import fit
from lutq.hf import load
from lutq.linear import LutLinear
from lutq.pack import dequantize
from lutq.quantize import quantize_checkpoint
from lutq.source import locate
from lutq.tokens import load_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIGS = [
    QuantConfig(bits=4, method="rtn"),
    QuantConfig(bits=3, method="rtn", symmetric=True, group=64),
    QuantConfig(bits=2, method="greedy", group=0),
    QuantConfig(bits=3),
    QuantConfig(bits=1, group=32, offsets=False),
]


def weight(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.bits}-{c.group}")
@pytest.mark.parametrize("shape", [(64, 576), (33, 172), (1, 1)])
def test_fit_is_as_good_as_on_the_cpu_and_repeats(config, shape):
    W = weight(*shape)
    layer = config.layer("x")
    first, second, host = fit(W.cuda(), layer, config), fit(W.cuda(), layer, config), fit(W, layer, config)
    for name in first._fields:
        a, b = getattr(first, name), getattr(second, name)
        assert a is b is None or torch.equal(a, b), f"{config=} {shape=} {name=}"
    errors = [(dequantize(*p, layer.group, layer.grid, shape[1]).cpu() - W).norm() for p in (first, host)]
    assert errors[0] <= 1.01 * errors[1] + 1e-7, f"{config=} {shape=} {errors=}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{c.bits}-{c.group}")
@pytest.mark.parametrize("M", [0, 1, 5, 130])
def test_operator_against_float64(config, dtype, M):
    N, K = 96, 172
    layer = config.layer("x")
    module = LutLinear.from_packed(fit(weight(N, K).cuda(), layer, config), K, layer, torch.randn(N, device="cuda", dtype=dtype))
    x = torch.randn(K, M, device="cuda").to(dtype).T  # not contiguous
    y = module(x)
    assert y.shape == (M, N), f"{config=} {dtype=} {M=}"
    assert y.dtype == dtype, f"{config=} {dtype=} {M=}"
    if M:
        expected = x.double() @ module.dequantize().double().T + module.bias.double()
        limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert relative(y, expected) < limit, f"{config=} {dtype=} {M=} {relative(y, expected)=}"


def test_compiled_and_captured():
    config = QuantConfig()
    layer = config.layer("x")
    module = LutLinear.from_packed(fit(weight(64, 256).cuda(), layer, config), 256, layer)
    x = torch.randn(3, 256, device="cuda")
    compiled = torch.compile(module, fullgraph=True)
    assert relative(compiled(x), module(x).double()) < 1e-6
    module(x)  # warm up before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    x.copy_(torch.randn(3, 256))
    graph.replay()
    assert relative(y, module(x).double()) < 1e-6


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The embedded model, quantized on the GPU."""
    return quantize_checkpoint(None, tmp_path_factory.mktemp("gpu") / "out", QuantConfig(), device="cuda").out


def test_model_and_perplexity(quantized):
    tokenizer = load_tokenizer(locate(None)[0])
    tokens = torch.tensor(tokenizer(load_text("wikitext2", "gptq").text, verbose=False).input_ids)
    windows = windows_of(tokens, 1024, 8)
    nll = {
        (device, dtype): window_nll(load(quantized, device=device, dtype=dtype), windows, progress=False).mean().item()
        for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "float16"), ("cuda", "bfloat16"))
    }
    expected = nll["cpu", "float32"]
    for (device, dtype), value in nll.items():
        limit = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        assert abs(value - expected) < limit, f"{device=} {dtype=} {nll=}"


def test_an_interrupted_run_gives_the_same_bits(quantized, tmp_path, monkeypatch):
    import lutq.quantize

    calls = 0

    def stop_in_the_middle(*arguments):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(lutq.quantize, "fit", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(None, tmp_path / "out", QuantConfig(), device="cuda")
    again = quantize_checkpoint(None, tmp_path / "out", QuantConfig(), device="cuda").out
    one, other = load_file(quantized / "model.safetensors"), load_file(again / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json.loads((again / "config.json").read_text()) == json.loads((quantized / "config.json").read_text())
