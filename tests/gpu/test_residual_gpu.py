"""Corrected layers on the GPU: products at every number of rows and inside a CUDA graph, and texts of every engine."""

import pytest
import torch
from conftest import random_packed
from engines import check_engines, quantize_deep

from lutq.config import LayerConfig, QuantConfig
from lutq.decode.products import Module, product_of
from lutq.hf import load
from lutq.linear import LutLinear
from lutq.pack import Corrected, weight
from lutq.residual import Residual, residual_shapes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def corrected_layer(N, K, layer):
    random = torch.Generator().manual_seed(0)
    shapes = residual_shapes(N, K, layer)
    tensors = {name: (0.3 * torch.randn(shape, generator=random)).to(dtype) for name, (shape, dtype) in shapes.items()}
    if layer.outliers_per_row:
        places = torch.rand(N, K, generator=random).topk(layer.outliers_per_row).indices.sort(1).values
        tensors["outlier_columns"] = places.to(tensors["outlier_columns"].dtype)
    residual = Residual(**{name: tensor.cuda() for name, tensor in tensors.items()})
    packed = Corrected(random_packed(N, K, layer, device="cuda"), residual)
    module = LutLinear.from_packed(packed, K, layer, torch.randn(N, generator=random).half().cuda())
    module.backend = "cuda"
    return module, weight(packed, layer, K).double()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outliers", "rank"), [(5, 0), (0, 8), (5, 8)])
def test_products_also_in_a_graph(dtype, outliers, rank):
    for bits, grid, (N, K) in ((3, "bcq", (96, 1000)), (2, "bcq", (1024, 4096)), (4, "uniform", (256, 512))):
        module, W = corrected_layer(N, K, LayerConfig(bits, 128, grid, outliers_per_row=outliers, low_rank=rank))
        module = module.to(dtype)
        assert torch.equal(module.dequantize().double(), W)
        for M in (1, 4, 8, 64, 500):
            x = torch.randn(M, K, device="cuda", dtype=dtype)
            eager, wanted = module(x), x.double() @ W.T + module.bias.double()
            about = f"{dtype=} {outliers=} {rank=} {bits=} {grid=} {N=} {K=} {M=}"
            error = ((eager.double() - wanted).norm() / wanted.norm()).item()
            assert error < (2e-3 if dtype == torch.float16 else 1.6e-2), f"{about} {error=}"
            assert torch.equal(module(x), eager), f"{about}: not the same bits every time"
            y, graph = torch.empty_like(eager), torch.cuda.CUDAGraph()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                product_of(module).into(x, y)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                product_of(module).into(x, y)
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, eager), f"{about}: another result from the graph"
        assert module.kernel_codes is not None
        assert isinstance(product_of(module), Module)


def test_engines(tmp_path, monkeypatch):
    """Each engine, and `auto`, gives the text of the plain loop; logits are those of the reference on the CPU."""
    folder = quantize_deep(monkeypatch, tmp_path, QuantConfig(bits=4, group=32, outliers=2.0, low_rank=4))
    model = load(folder, device="cuda")
    layers = [module for module in model.modules() if isinstance(module, LutLinear)]
    assert layers
    assert all(module.layer.corrected and module.kernel_codes is not None for module in layers)
    check_engines(folder, model, ("plain", "graph", "fast", "auto"))
