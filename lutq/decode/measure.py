"""How long the steps of an engine take, as a whole and by kind of work."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lutq.decode.engine import Engine
from lutq.decode.graph import Captured
from lutq.parallel.ranks import current
from lutq.timing import WARM_SECONDS

KINDS = ("products", "attention", "elementwise", "head")


class StepTime(NamedTuple):
    """Milliseconds of a step: median and 99th percentile."""

    ms: float
    ms_p99: float


def time_steps(step: Callable[[], None], count: int) -> StepTime:
    """Of `count` steps, each timed on the GPU, after a while of the same work: an idle GPU has lowered its clocks.

    Several ranks (lutq/parallel) take the same number of steps.
    """
    until = time.perf_counter() + WARM_SECONDS
    while current().decide(time.perf_counter() < until):
        step()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in itertools.pairwise(events))
    return StepTime(statistics.median(times), times[min(count - 1, int(0.99 * count))])


class Only:
    """The functions of one kind of work (`KINDS`); the others do nothing."""

    def __init__(self, functions: Any, kind: str, head: Any) -> None:
        self.functions, self.kind, self.head = functions, kind, head

    def in_graph(self) -> Any:
        """See lutq/decode/reference.py."""
        return self.functions.in_graph()

    def multiply(self, product: Any, *arguments: Any) -> None:
        """See lutq/decode/reference.py."""
        if self.kind == ("head" if product is self.head else "products"):
            self.functions.multiply(product, *arguments)

    def attention(self, *arguments: Any) -> None:
        """See lutq/decode/reference.py."""
        if self.kind == "attention":
            self.functions.attention(*arguments)

    def __getattr__(self, name: str) -> Any:
        """The rest is elementwise."""
        return getattr(self.functions, name) if self.kind == "elementwise" else lambda *arguments: None


class Silent:
    """Ranks that exchange nothing."""

    def __getattr__(self, name: str) -> Any:
        """A call of `Ranks` that does nothing."""
        return lambda *tensors: None


def time_kinds(engine: Engine, count: int) -> dict[str, float]:
    """Milliseconds of each kind of work in a step: of graphs that do it alone, in the same order.

    Kernels of different kinds overlap a little, so the sum is not the time of a step. Several ranks (lutq/parallel) have one kind
    more, `communication`: sums over the ranks and the gathered logits, without waiting for a rank that has more to do. Sums may
    be part of elementwise kernels, so it is what these take longer with all that is exchanged (by
    more blocks then).
    """
    functions, ranks, inboxes, found = engine.functions, engine.ranks, engine.inboxes, {}
    for kind in (*KINDS, *(["communication"] if current().world > 1 else [])):
        everything = kind == "communication"
        engine.functions = Only(functions, "elementwise" if everything else kind, engine.weights.head)
        engine.ranks, engine.inboxes = (ranks, inboxes) if everything else (Silent(), None)
        graph = Captured(engine.step, engine.weights.device)
        graph.capture(engine.functions.in_graph)
        found[kind] = time_steps(graph, count).ms - (found["elementwise"] if everything else 0.0)
    engine.functions, engine.ranks, engine.inboxes = functions, ranks, inboxes
    return found
