"""Codes of one input after the other: by torch against plain sums in float64, and the tiles of the GPU on a stand-in."""

import pytest
import torch
from stand_in import at, fields_in_source, install

from lutq.bcq import storable
from lutq.columns import TILE, ColumnPass, levels_of, planes_of, round_columns, round_on_gpu


def problem(bits, g, N, seed=0):
    """Rows wanted [g, N], positive definite factors [g, g], levels, and quantized weights [g, N] to begin from."""
    random = torch.Generator().manual_seed(seed)
    wanted = torch.randn(g, N, generator=random)
    x = torch.randn(4 * g, g, generator=random)
    scales, offsets = storable(torch.rand(bits, N, generator=random) + 0.1, 0.1 * torch.randn(N, generator=random))
    levels = levels_of(scales, offsets)
    q = levels.values.gather(0, torch.randint(2**bits, (g, N), generator=random))
    return wanted, x.T @ x / (4 * g) + 0.1 * torch.eye(g), levels, q


def check(wanted, factors, levels, q, positions, r):
    """Every code is the level nearest to what the codes before it leave, and r what they say it is."""
    w, F, r = wanted.double(), factors.double(), r.double()
    value = levels.values.gather(0, positions).double()
    left = w - F.triu(1).T @ r
    diagonal = F.diagonal()[:, None]
    target = left if q is None else q.double() + left / diagonal
    expected = (target - value) / diagonal if q is None else value - q.double()
    assert torch.allclose(r, expected, atol=1e-4, rtol=1e-4), f"{(r - expected).abs().max()=}"
    distances = (target[None] - levels.values.double()[:, None]).abs()
    assert ((target - value).abs() <= distances.amin(0) + 1e-4).all()


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(("bits", "g"), [(1, 8), (2, 64), (3, 40), (4, 130)])
def test_every_code_is_nearest_to_what_is_left(bits, g, start):
    wanted, factors, levels, q = problem(bits, g, 30)
    q = q if start else None
    before = wanted.clone()
    positions, r = round_columns(wanted, factors, levels, q)
    assert torch.equal(wanted, before)
    check(wanted, factors, levels, q, positions, r)
    planes = planes_of(positions, levels, bits)
    assert planes.shape == (bits, 30, g)


class StandIn:
    """The kernel by `round_columns`, from the same pointers."""

    def __init__(self):
        self.inputs = []

    def lutq_round_columns(self, reference, stream):
        a = reference._obj
        self.inputs.append(a.inputs)
        assert a.inputs <= TILE, f"{a.inputs=}"
        single = {name: at(getattr(a, name), torch.float32, a.inputs, a.N, a.N) for name in ("wanted", "q", "r")}
        values, middles = (
            at(*part, a.N, a.N) for part in ((a.values, torch.float32, a.levels), (a.middles, torch.float32, a.levels - 1))
        )
        factors = at(a.factors, torch.float32, a.inputs, a.inputs, a.stride)
        numbers = torch.zeros(a.levels, a.N, dtype=torch.uint8)
        levels = levels_of(torch.ones(1, 1), None)._replace(values=values, middles=middles, numbers=numbers)
        positions, r = round_columns(single["wanted"], factors, levels, single["q"])
        single["r"].copy_(r)
        at(a.positions, torch.int64, a.inputs, a.N, a.N).copy_(positions)
        return 0


@pytest.fixture
def stand_in(monkeypatch):
    """A StandIn in the place of the library, on the CPU."""
    library = StandIn()
    install(monkeypatch, library)
    return library


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(("bits", "g"), [(1, 32), (3, 64), (2, 96), (4, 200)])
def test_tiles_of_the_gpu(stand_in, bits, g, start):
    """In slices of larger matrices, as the solver has them."""
    wanted, factors, levels, q = problem(bits, g + 5, 30, seed=1)
    wanted, factors, q = wanted[5:], factors[5:, 5:], q[5:] if start else None
    before = wanted.clone()
    positions, r = round_on_gpu(wanted, factors, levels, q)
    assert torch.equal(wanted, before)
    assert stand_in.inputs == [TILE] * (g // TILE) + [g % TILE] * (g % TILE > 0)
    check(wanted, factors, levels, q, positions, r)
    alike = (positions == round_columns(wanted, factors, levels, q)[0]).float().mean()
    assert alike > 0.99, f"{alike=}: but for rounding they are the same"


def test_arguments_are_those_of_the_source():
    """`ColumnPass` has the fields of kernels/columns.cu in their order."""
    assert fields_in_source("columns.cu", "ColumnPass") == [name for name, *_ in ColumnPass._fields_]
