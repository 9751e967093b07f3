"""Norms that sum over GPUs (kernels/inbox.cuh), on one: ranks are streams that write into each other's memory.

Their kernels wait for each other, so those of all ranks must run at once: each rank is told of its share of the processors, and
nothing that waits for a rank's kernel is launched before the kernels of all. tests/gpu/test_ranks.py has the processes.
"""

import time

import pytest
import torch

from lutq.decode.products import Sums, padded
from lutq.decode.steps import Kernels
from lutq.decode.weights import Norm
from lutq.parallel.inboxes import Inboxes, inbox_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = torch.device("cuda", 0)
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of a result, relative to its row
STEPS, TURNS = 4, 6
PATIENCE = 60  # seconds


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


class OneGpu:
    """`world` ranks of a GPU, for sums of up to `most` numbers."""

    def __init__(self, world, most):
        self.memory = [torch.zeros(inbox_bytes(world, most), dtype=torch.uint8, device=DEVICE) for _ in range(world)]
        addresses = [memory.data_ptr() for memory in self.memory]
        self.inboxes = [Inboxes(addresses, rank, most, DEVICE) for rank in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]
        self.kernels = Kernels(DEVICE)
        self.kernels.gpu = self.kernels.gpu._replace(processors=self.kernels.gpu.processors // world)

    def wait(self):
        """For all streams. Ends the tests if they wait for each other: no other kernel would ever run."""
        events, until = [stream.record_event() for stream in self.streams], time.monotonic() + PATIENCE
        while not all(event.query() for event in events):
            if time.monotonic() > until:
                pytest.exit("ranks on one GPU wait for each other", returncode=1)
            time.sleep(0.001)


def draw(*shape, generator):
    return torch.randn(shape, generator=generator, device=DEVICE)


def parts(world, M, K, dtype, slabs, generator):
    """A part of y [M, K] for every rank, rows or sums of so many slabs; rank 0 has a bias."""
    if not slabs:
        return [draw(M, K, generator=generator).to(dtype) for _ in range(world)]
    found = []
    for rank in range(world):
        memory = draw(slabs, padded(K), generator=generator)
        memory[:, K:] = torch.nan
        found.append(Sums(memory[:, :K], draw(K, generator=generator).to(dtype) if rank == 0 else None))
    return found


def exact(y):
    """A part in float64."""
    if not isinstance(y, Sums):
        return y.double()
    return y.slabs.double().sum(0, keepdim=True) + (0 if y.bias is None else y.bias.double())


def normed(h, by):
    v = h - h.mean(-1, keepdim=True) if by.centered else h
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + by.eps) * by.weight.double()
    return v if by.bias is None else v + by.bias.double()


def worst(found, expected):
    """The largest relative error of a row."""
    return ((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def run(world, M, K, dtype, slabs, most=None):
    about = f"{world=} {M=} {K=} {dtype=} {slabs=}"
    generator = torch.Generator(DEVICE).manual_seed(world * K + M)
    gpu = OneGpu(world, most or M * K)
    table = draw(8, K, generator=generator).to(dtype)
    token, position = (torch.arange(M, device=DEVICE) % 8 for _ in range(2))
    weight, bias = (draw(K, generator=generator).to(dtype) for _ in range(2))
    by = Norm(weight, bias, 1e-5, True) if K % 1024 else Norm(weight, None, 1e-5, False)
    given = [[parts(world, M, K, dtype, slabs, generator) for _ in range(TURNS)] for _ in range(STEPS)]
    h = torch.empty(world, M, K, device=DEVICE)
    x = torch.full((STEPS, TURNS, world, M, K), torch.nan, dtype=dtype, device=DEVICE)
    kept = torch.full((STEPS, TURNS, world, M, K), torch.nan, device=DEVICE)
    torch.cuda.synchronize()
    for step in range(STEPS):
        for rank, stream in enumerate(gpu.streams):
            with torch.cuda.stream(stream):
                gpu.kernels.embed(token, position, table, None, h[rank], gpu.inboxes[rank].step)
        for turn in range(TURNS):
            for rank, stream in enumerate(gpu.streams):
                with torch.cuda.stream(stream):
                    y = given[step][turn][rank]
                    gpu.kernels.norm(h[rank], y, by, x[step, turn, rank], gpu.inboxes[rank].at(turn))
            for rank, stream in enumerate(gpu.streams):
                with torch.cuda.stream(stream):
                    kept[step, turn, rank].copy_(h[rank])
    gpu.wait()
    for step in range(STEPS):
        expected = table[token].double()
        for turn in range(TURNS):
            expected = expected + sum(exact(y) for y in given[step][turn])
            for rank in range(world):
                assert torch.equal(kept[step, turn, rank], kept[step, turn, 0]), f"h: {about} {step=} {turn=} {rank=}"
                assert torch.equal(x[step, turn, rank], x[step, turn, 0]), f"x: {about} {step=} {turn=} {rank=}"
            error = worst(kept[step, turn, 0], expected)
            assert error < 1e-6, f"h: {about} {step=} {turn=} {error=:.1e}"
            error = worst(x[step, turn, 0], normed(expected, by))
            assert error < ROUNDING[dtype], f"x: {about} {step=} {turn=} {error=:.1e}"
    for inboxes in gpu.inboxes:
        assert inboxes.step.item() == STEPS, about


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("M", [1, 3, 16])
@pytest.mark.parametrize("K", [512, 4096, 8200, 16384])
def test_rows(K, M, world, dtype):
    run(world, M, K, dtype, 0)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("K", [8, 512, 4096, 8200, 16384])
def test_sums(K, world, dtype):
    if not Kernels(DEVICE).gpu.clusters:
        pytest.skip("no clusters")
    for slabs in (1, 5, 13):
        run(world, 1, K, dtype, slabs, most=1 << 17)


def test_eight_ranks():
    run(8, 1, 2048, torch.float16, 0)


def test_ranks_may_leave_their_parts_in_different_ways():
    """Whether a product leaves sums may depend on a rank's weights."""
    if not Kernels(DEVICE).gpu.clusters:
        pytest.skip("no clusters")
    gpu, K, generator = OneGpu(2, 4096), 4096, torch.Generator(DEVICE).manual_seed(0)
    token = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    table, weight = (torch.ones(*sizes, dtype=torch.float16, device=DEVICE) for sizes in ((1, K), (K,)))
    given = [parts(2, 1, K, torch.float16, slabs, generator)[0] for slabs in (5, 0)]
    h, x = torch.empty(2, 1, K, device=DEVICE), torch.empty(2, 1, K, dtype=torch.float16, device=DEVICE)
    torch.cuda.synchronize()
    for rank, stream in enumerate(gpu.streams):
        with torch.cuda.stream(stream):
            gpu.kernels.embed(token, token, table, None, h[rank], gpu.inboxes[rank].step)
    for rank, stream in enumerate(gpu.streams):
        with torch.cuda.stream(stream):
            gpu.kernels.norm(h[rank], given[rank], Norm(weight, None, 1e-5, False), x[rank], gpu.inboxes[rank].at(0))
    gpu.wait()
    assert torch.equal(h[0], h[1])
    error = worst(h[0], 1 + exact(given[0]) + exact(given[1]))
    assert error < 1e-6, f"{error=:.1e}"


def test_what_does_not_fit_is_refused():
    kernels, inboxes = Kernels(DEVICE), Inboxes([0, 0], 0, 512, DEVICE)
    h, x, y = (torch.zeros(2, 512, dtype=dtype, device=DEVICE) for dtype in (torch.float32, torch.float16, torch.float16))
    by = Norm(torch.ones(512, dtype=torch.float16, device=DEVICE), None, 1e-5, False)
    for rows, part, turn in ((2, y, 0), (1, None, 0), (1, y, 1024)):
        with pytest.raises(RuntimeError, match=r"error 1$"):
            kernels.norm(h[:rows], None if part is None else part[:rows], by, x[:rows], inboxes.at(turn))
