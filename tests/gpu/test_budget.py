"""A budget of time on a GPU: the kernels are timed, joined products as one, and the chosen layers keep it."""

import json

import pytest
import torch

from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.info import describe
from lutq.latency import Product, from_json
from lutq.quantize import quantize_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

QUICK = {"iterations": 1, "calib_windows": 2, "calib_length": 64, "groups": "64,128"}
JOINED = ("q_proj", "k_proj", "v_proj")


def run(out, target_ms):
    """The report of the embedded model under a budget, and what its checkpoint says about it."""
    report = quantize_checkpoint(None, out, QuantConfig(target_ms=target_ms, **QUICK), device="cuda")
    return report, json.loads((out / "config.json").read_text())["quantization_config"]["settings"]["latency"]


def test_budget_holds_with_the_times_of_the_kernels(tmp_path):
    report, record = run(tmp_path / "slow", 1e3)
    times = from_json(record)
    assert (record["backend"], record["device"]) == ("cuda", torch.cuda.get_device_name())
    shapes = {(product.N, product.K) for product in times.ns}
    assert shapes == {(768, 256), (256, 256), (1024, 256), (256, 1024)}, "q, k and v are one product"
    assert len(times.ns) == len(shapes) * 4 * 2, "four numbers of bits, two groups, each once"
    assert all(500 < ns < 1e6 for ns in times.ns.values()), f"{times.ns=}"
    assert {layer.layer.bits for layer in report.layers} == {4}, "there is time for all bits"

    def fastest(shape):
        return min(ns for product, ns in times.ns.items() if shape == (product.N, product.K))

    least = 4 * sum(fastest(shape) for shape in shapes) / 1e6
    target = (least + record["predicted_ms"]) / 2 + 0.1 * least  # times of another run are a little different
    report, record = run(tmp_path / "fast", target)
    assert record["predicted_ms"] <= target
    ns = from_json(record).ns
    total = 0
    for layer in report.layers:
        if layer.kind in JOINED:
            total += ns[Product(3 * layer.N, layer.K, layer.layer)] if layer.kind == "q_proj" else 0
        else:
            total += ns[Product(layer.N, layer.K, layer.layer)]
    assert total / 1e6 == pytest.approx(record["predicted_ms"], rel=1e-9)
    assert f"predicted {record['predicted_ms']:.4g} ms per token" in describe(tmp_path / "fast")


def test_budget_out_of_reach(tmp_path):
    with pytest.raises(LutqError, match=r"target_ms 0\.001 is out of reach: the fastest choices need 0\.\d+ on .*backend cuda"):
        run(tmp_path / "out", 1e-3)
    assert not list(tmp_path.iterdir())
