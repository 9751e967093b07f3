"""How long launches take on a GPU: a CUDA graph of many, over so many copies of the weights that L2 holds none of them.

The graph is replayed twice, and the second replay timed, so that the GPU never waits for the host. Products with few rows
form a `Chain`: each reads what the previous one wrote, as the layers of a model do, and cannot begin before its end.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from lutq.errors import LutqError

CHAINED_ROWS = 16  # up to so many rows of x launches are chained
L2_TIMES, MOST_COPIES = 4, 40  # copies of the weights together exceed so many times L2; how many at most
GRAPH_US, FEWEST, MOST_LAUNCHES = 2000.0, 20, 200  # of a graph: time to aim at, launches when chained, and at most
WARM_SECONDS = 0.15
REPLAYS = 2  # of the graph after each reset; the last one is timed
CEILING_BYTES = 1 << 32


class Timing(NamedTuple):
    """Microseconds per launch: median, minimum and maximum over the repeats."""

    us: float
    us_min: float
    us_max: float


def summarize(times: list[float]) -> Timing:
    """Of a list of times per launch in us."""
    return Timing(statistics.median(times), min(times), max(times))


def copies(nbytes: int, l2: int) -> int:
    """Copies of a weight of `nbytes` to go through in turn, 2 to 40: together more than four times an L2 cache of `l2` bytes."""
    return min(MOST_COPIES, max(2, L2_TIMES * l2 // nbytes + 1))


def launches(M: int, us: float, copies: int) -> int:
    """Launches of a graph, each of about `us`: at least 20 when chained (M <= 16), and 2 ms if 200 launches are enough.

    A multiple of 2 and of `copies`: the next replay then goes on where this one ends, with the buffer and the weights that
    were used longest ago.
    """
    step = math.lcm(2, copies)
    wanted = min(MOST_LAUNCHES, math.ceil(GRAPH_US / us))
    return step * math.ceil(max(wanted, FEWEST if M <= CHAINED_ROWS else 1) / step)


def expected_us(nbytes: int, M: int, N: int, K: int) -> float:
    """A guess at the time of y [M, N] = x [M, K] W^T that moves `nbytes`; it only decides how many launches make a graph."""
    return 3 + max(nbytes / 4e6, 2 * M * N * K / 4e8)


class Chain:
    """Two fp16 buffers that launches read and write in turn: y [M, N] of launch i begins in x [M, K] of launch i + 1.

    It is the last quarter of x that is written. The rest stays random, so that long chains neither overflow nor vanish with
    any W that keeps lengths on average. x and y, and the rows of x, lie on 16 bytes.
    """

    def __init__(self, M: int, N: int, K: int, device: torch.device) -> None:
        self.M, self.N, self.K = M, N, K
        self.stride = -(-K // 8) * 8
        self.kept = M * self.stride * 3 // 4 // 8 * 8  # numbers of x that no launch writes
        self.start = torch.randn(max(self.kept + M * N, M * self.stride), dtype=torch.float16, device=device)
        self.buffers = (self.start.clone(), self.start.clone())

    def x(self, i: int) -> torch.Tensor:
        """The input [M, K] of launch i."""
        return self.buffers[i % 2][: self.M * self.stride].view(self.M, self.stride)[:, : self.K]

    def y(self, i: int) -> torch.Tensor:
        """The output [M, N] of launch i."""
        return self.buffers[(i + 1) % 2][self.kept : self.kept + self.M * self.N].view(self.M, self.N)

    def reset(self) -> None:
        """Both buffers as they were."""
        for buffer in self.buffers:
            buffer.copy_(self.start)

    def check(self) -> None:
        """Raise LutqError unless everything in the buffers is finite."""
        if not all(buffer.isfinite().all() for buffer in self.buffers):
            shape = f"{self.N}x{self.K}, M = {self.M}"
            raise LutqError(f"chained products of {shape} overflowed, their times do not count: leave this --shape out")


def require_gpu(device: str) -> torch.device:
    """The GPU of --device. Raises LutqError where there is none."""
    from lutq.runtime import resolve_device

    if not torch.cuda.is_available():
        raise LutqError("lutq bench measures the CUDA kernels and torch sees no GPU here: `lutq doctor` says what is missing")
    found = resolve_device(device)
    if found.type != "cuda":
        raise LutqError(f"lutq bench measures the CUDA kernels and cannot use {found}: leave --device out, or use cuda:N")
    return found


def l2_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def time_graph(launch: Callable[[int], None], count: int, repeats: int, reset: Callable[[], None] | None = None) -> Timing:
    """Time per launch in a graph of launch(0) ... launch(count - 1); `reset` runs before each repeat, untimed.

    On the current GPU, after a while of the same work: an idle GPU has lowered its clocks. `launch` must not wait for the GPU.
    """
    for i in range(min(count, 3)):  # what the first calls load or allocate is not in the graph
        launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            launch(i)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    until = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
        if reset is not None:
            reset()
    times = []
    for _ in range(repeats + 1):  # the first is not counted
        if reset is not None:
            reset()
        for _ in range(REPLAYS - 1):
            graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / count)
    return summarize(times[1:])


def read_ceiling(device: torch.device, repeats: int) -> float:
    """GB/s at which the fastest of torch's reductions reads 4 GiB (or a quarter of what is free): the median of repeats."""
    count = min(CEILING_BYTES, torch.cuda.mem_get_info(device)[0] // 4) // 2**20 * 2**18
    numbers = torch.ones(count, dtype=torch.float32, device=device)
    views = [numbers, numbers.view(-1, 1 << 18), numbers.view(torch.int32), numbers.view(torch.int32).view(-1, 1 << 18)]
    fastest = math.inf
    for view in views:
        for reduce in (torch.sum, torch.amax):
            if reduce is torch.sum and view.dtype == torch.int32:  # sums integers as int64
                continue
            timing = time_graph(lambda _, reduce=reduce, view=view: reduce(view, dim=-1), 2, repeats)
            fastest = min(fastest, timing.us)
    return numbers.nbytes / fastest / 1000
