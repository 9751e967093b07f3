"""The fits' way to their kernels, on a CPU: a stand-in reads and writes what a kernel would."""

import pytest
import torch
from stand_in import at, fields_in_source, install

from lutq import bcq, gpu_fit, tunable, uniform
from lutq.config import LayerConfig
from lutq.fit import pack
from lutq.pack import dequantize, pack_bits


class StandIn:
    """The kernels of kernels/fit.cu by torch, from the same pointers."""

    def __init__(self):
        self.calls = []

    def row(self, address, count):
        return None if not address else at(address, torch.float32, 1, count)[0]

    def lutq_search_grid(self, reference, stream):
        a = reference._obj
        self.calls.append("search")
        w, whiten = at(a.w, torch.float32, a.R, a.g), self.row(a.whiten, a.g)
        scales, center = uniform.search_grid(w, a.bits, bool(a.symmetric), a.ranges, a.lowest, whiten)
        self.row(a.scales, a.R).copy_(scales)
        self.row(a.center, a.R).copy_(center)
        return 0

    def lutq_alternate(self, reference, stream):
        a = reference._obj
        self.calls.append("alternate")
        w, whiten = at(a.w, torch.float32, a.R, a.g), self.row(a.whiten, a.g)
        scales, best_scales, new_scales = (at(p, torch.float32, a.bits, a.R) for p in (a.scales, a.best_scales, a.new_scales))
        best = bcq.Best(best_scales, self.row(a.best_offsets, a.R), self.row(a.best_error, a.R))
        error, refitted = bcq.judge_grid(w, scales, self.row(a.offsets, a.R), whiten, best)
        self.row(a.error, a.R).copy_(error)
        grid = refitted()
        new_scales.copy_(grid[0])
        if grid[1] is not None:
            self.row(a.new_offsets, a.R).copy_(grid[1])
        return 0

    def lutq_solve_systems(self, reference, stream):
        a = reference._obj
        self.calls.append("solve")
        gram = at(a.gram, torch.float32, a.R, a.n * a.n).view(a.R, a.n, a.n)
        at(a.solution, torch.float32, a.R, a.n).copy_(bcq.eliminate(gram, at(a.target, torch.float32, a.R, a.n)))
        return 0

    def layer(self, reference):
        """Codes, scales, offsets and weights of a `Matrix`, and its settings as a layer."""
        a = reference._obj
        layer = LayerConfig(a.bits, 0 if a.g >= a.K else a.g, "bcq", bool(a.offsets))
        G = -(-a.K // a.g)
        grid = [address and at(address, torch.float32, rows, G) for address, rows in ((a.scales, a.bits * a.N), (a.offsets, a.N))]
        codes = at(a.codes, torch.int32, a.bits * a.N, -(-a.K // 32)).view(a.bits, a.N, -1)
        return a, layer, codes, grid, at(a.weights, torch.float32, a.N, a.K)

    def lutq_make_weights(self, reference, stream):
        a, layer, codes, (scales, offsets), weights = self.layer(reference)
        self.calls.append("weights")
        weights.copy_(dequantize(codes, scales.view(a.bits, a.N, -1), offsets, None, layer.group, "bcq", a.K))
        return 0

    def lutq_grid_gradients(self, reference, stream):
        a, layer, codes, _, weights = self.layer(reference)
        self.calls.append("gradients")
        G = -(-a.K // a.g)
        found = by_torch(tunable.grid_gradients, codes, weights, layer.group, bool(a.doffsets))
        at(a.dscales, torch.float32, a.bits * a.N, G).copy_(found[0].flatten(0, 1))
        if a.doffsets:
            at(a.doffsets, torch.float32, a.N, G).copy_(found[1])
        return 0

    def lutq_nearest_codes(self, reference, stream):
        a, _, codes, (scales, offsets), weights = self.layer(reference)
        self.calls.append("codes")
        padded = torch.nn.functional.pad(weights, (0, -a.K % a.g)).unflatten(1, (-1, a.g)).flatten(0, 1)
        planes = bcq.nearest(padded, scales.view(a.bits, -1), None if offsets is None else offsets.flatten())[0]
        codes.copy_(pack_bits(planes.unflatten(1, (a.N, -1)).flatten(2)[..., : a.K]))
        return 0


def by_torch(fit, *arguments):
    """What `fit` returns without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_fit, "usable", lambda tensor: False)
        return fit(*arguments)


@pytest.fixture
def stand_in(monkeypatch):
    """A StandIn in the place of the library, on the CPU."""
    library = StandIn()
    install(monkeypatch, library)
    return library


def groups(R=30, g=40):
    """Weights [R, g] and factors [g] of their errors, neither contiguous."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(g, R, generator=random).T, (torch.rand(g, g, generator=random) + 0.1).diagonal()


def by_kernels(monkeypatch, fit, *arguments):
    """What `fit` returns by torch and by the stand-in."""
    expected = fit(*arguments)
    monkeypatch.setattr(gpu_fit, "usable", lambda tensor: tensor.dtype == torch.float32)
    return expected, fit(*arguments)


def same(expected, found):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize(("bits", "has_offsets", "start"), [(1, True, "best"), (3, False, "greedy"), (4, True, "range")])
def test_alternating(stand_in, monkeypatch, bits, has_offsets, start, weighed):
    w, whiten = groups()
    arguments = w, bits, has_offsets, start, 15, 1e-3, whiten if weighed else None
    expected, found = by_kernels(monkeypatch, bcq.alternating, *arguments)
    assert {"alternate", "solve"} <= set(stand_in.calls)
    assert same(expected, found)


@pytest.mark.parametrize(("symmetric", "clip", "weighed"), [(False, True, True), (True, True, False), (False, False, False)])
def test_rtn(stand_in, monkeypatch, symmetric, clip, weighed):
    w, whiten = groups()
    expected, found = by_kernels(monkeypatch, uniform.rtn, w, 3, symmetric, clip, whiten if weighed else None)
    assert stand_in.calls == ["search"]
    assert same(expected, found)


@pytest.mark.parametrize(("bits", "has_offsets", "group"), [(1, False, 0), (2, True, 32), (4, True, 64)])
def test_tunable(stand_in, monkeypatch, bits, has_offsets, group):
    """A layer with codes that are learned: what it computes, its gradients and its codes."""
    N, K = 5, 100
    random = torch.Generator().manual_seed(0)
    W, x = torch.randn(N, K, generator=random), torch.randn(3, K, generator=random)
    G = -(-K // group) if group else 1
    scales, offsets = bcq.storable(torch.rand(bits, N, G, generator=random), torch.rand(N, G, generator=random))
    packed = pack(bcq.Bcq(torch.rand(bits, N, K, generator=random) < 0.5, scales, offsets if has_offsets else None))

    def run():
        layer = tunable.Tunable(packed, K, LayerConfig(bits, group, "bcq", has_offsets), None, W)
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        return y, layer.codes, layer.scales.grad, layer.offsets.grad if has_offsets else None, layer.latent.grad, inputs.grad

    expected, found = by_kernels(monkeypatch, run)
    assert set(stand_in.calls) == {"weights", "gradients", "codes"}
    assert same(expected, found)


def test_not_for_other_tensors():
    """On a CPU, in other dtypes and without numbers the torch operations are what runs."""
    assert not gpu_fit.usable(torch.ones(3))
    assert not gpu_fit.usable(torch.empty(0))


@pytest.mark.parametrize("structure", [gpu_fit.GridSearch, gpu_fit.Round, gpu_fit.Systems, gpu_fit.Matrix])
def test_arguments_are_those_of_the_source(structure):
    assert fields_in_source("fit.cu", structure.__name__) == [name for name, *_ in structure._fields_]
