"""Converted checkpoints on the GPU: scales below zero, as AutoRound writes them, and layers with an order of their own."""

import itertools
import json

import pytest
import torch
from conftest import random_packed
from engines import check_engines, quantize_deep
from safetensors.torch import load_file, save_file

from lutq.config import LayerConfig, QuantConfig
from lutq.hf import load
from lutq.linear import LutLinear
from lutq.ordered import OrderedLinear
from lutq.pack import dequantize
from lutq.source import read_json

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def negate(packed):
    """Every other group's scale below zero."""
    signs = 1 - 2 * (torch.arange(packed.scales[0].numel(), device=packed.scales.device) % 2)
    return packed._replace(scales=packed.scales * signs.view_as(packed.scales[0]))


@torch.inference_mode()
def test_negative_scales_and_orders():
    """Every width and number of rows, against float64."""
    random = torch.Generator().manual_seed(0)
    for bits, group, (N, K) in itertools.product((2, 3, 4, 8), (32, 128, 0), ((96, 256), (256, 1024))):
        layer = LayerConfig(bits, group, "uniform")
        packed = negate(random_packed(N, K, layer, device="cuda"))
        order = torch.randperm(K, generator=random).cuda()
        module = OrderedLinear.from_packed(packed, K, layer)
        module.input_order = order.int()
        module.backend = "cuda"
        W = torch.empty(N, K, dtype=torch.float64, device="cuda")
        W[:, order] = dequantize(*packed, group, "uniform", K, torch.float64)
        assert torch.equal(module.dequantize().double(), W)
        for M in (1, 3, 8, 16, 100):
            x = torch.randn(M, K, generator=random).half().cuda()
            wanted = x.double() @ W.T
            error = ((module(x).double() - wanted).norm() / wanted.norm()).item()
            assert error < 1e-3, f"{bits=}, {group=}, {N=}, {K=}, {M=}, {error=}"
        assert module.kernel_codes is not None


def put_in_order(folder):
    """Sort the columns of every packed layer by a random permutation: other weights, stored as lutq convert stores them."""
    config = read_json(folder / "config.json", "")
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    names = list(config["quantization_config"]["modules"])
    for name in names:
        K = 32 * tensors[f"{name}.codes"].shape[-1]
        tensors[f"{name}.input_order"] = torch.randperm(K, generator=random).int()
    config["quantization_config"]["ordered"] = names
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_engines(tmp_path, monkeypatch):
    """Each engine gives the text of the reference on the CPU."""
    settings = QuantConfig(bits=4, group=32, method="rtn", overrides={"down_proj": {"skip": True}})
    folder = quantize_deep(monkeypatch, tmp_path, settings)
    put_in_order(folder)
    model = load(folder, device="cuda")
    ordered = [module for module in model.modules() if isinstance(module, LutLinear)]
    assert ordered
    assert all(type(module) is OrderedLinear for module in ordered)
    check_engines(folder, model, ("plain", "graph", "fast"))
