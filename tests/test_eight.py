"""Layers of 8 bits as layers of 4 that are twice as wide: nothing is rounded on the way, nor lost."""

import itertools

import pytest
import torch
from conftest import random_packed

from lutq.config import LayerConfig
from lutq.cuda import prepack
from lutq.eight import halve, halves, twice, unite
from lutq.errors import LutqError
from lutq.hf import LutqConfig
from lutq.linear import LutLinear
from lutq.pack import dequantize, to_tensors

CASES = list(itertools.product(((5, 32), (33, 100), (64, 256), (20, 1100)), (0, 32, 96, 128)))


@pytest.mark.parametrize(("size", "group"), CASES)
def test_halves_are_the_whole(size, group):
    (N, K), layer = size, LayerConfig(8, group, "uniform")
    packed = random_packed(N, K, layer)
    two, narrow = halve(packed, layer)
    assert (narrow, halves(layer, K).left % narrow.group) == (halves(layer, K).layer, 0)
    assert narrow.bits == 4
    W = dequantize(*packed, group, "uniform", K, torch.float64)
    left = halves(layer, K).left
    parts = dequantize(*two, narrow.group, "uniform", left + K, torch.float64)
    assert torch.equal(parts[:, :K] + parts[:, left:], W)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).double()
    error = (twice(x, left) @ parts.T - x @ W.T).norm() / (x @ W.T).norm()
    assert error < 1e-12, error
    back = unite(two, layer, K)
    assert all(torch.equal(tensor, to_tensors(packed)[name]) for name, tensor in to_tensors(back).items())


@pytest.mark.parametrize(("size", "group"), CASES)
def test_a_module_in_kernel_order_gives_its_tensors_back(size, group):
    (N, K), layer = size, LayerConfig(8, group, "uniform")
    packed = random_packed(N, K, layer)
    module = LutLinear.from_packed(packed, K, layer)
    x = torch.randn(2, K)
    wanted = module(x)
    module.kernel_codes, module.kernel_records, module.wide = prepack(packed, layer)
    state = module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in to_tensors(packed).items())
    assert torch.equal(module.dequantize(), dequantize(*packed, group, "uniform", K))
    module.unpack()
    assert torch.equal(module(x), wanted)


def test_scales_that_are_too_large():
    layer = LayerConfig(8, 32, "uniform")
    packed = random_packed(4, 64, layer)
    packed.scales[0, 1, 1] = 4094
    halve(packed, layer)
    packed.scales[0, 1, 1] = 4100
    with pytest.raises(LutqError, match=r"below 4095, not 4100.*--backend reference"):
        prepack(packed, layer)


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ({"bits": 8, "grid": "uniform"}, True),
        ({"bits": 8, "grid": "bcq"}, False),
        ({"bits": 8, "grid": "uniform", "offsets": False}, False),
        ({"bits": 6, "grid": "uniform"}, False),
        ({"bits": 4, "grid": "uniform"}, True),
    ],
)
def test_which_checkpoints_may_have_8_bits(fields, fine):
    config = LutqConfig(modules={"fc1": {"group": 64} | fields})
    if fine:
        assert config.layers()["fc1"].bits == fields["bits"]
    else:
        with pytest.raises(LutqError, match=r"fc1\.bits must be 1, 2, 3 or 4; got"):
            config.layers()
