"""A function that is replayed as a CUDA graph, and tokens on their way to the host while the GPU goes on."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch


def on_device(device: torch.device) -> Any:
    """Makes a GPU the current one inside a `with` block; does nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def without_garbage() -> Iterator[None]:
    """Nothing is collected meanwhile: a graph that is destroyed while another is captured spoils that."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Captured:
    """A function without arguments, which after `capture` is a CUDA graph; on the CPU always the function itself."""

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self.graph: Any = None

    def capture(self, within: Callable[[], Any] = contextlib.nullcontext) -> None:
        """Run the function once, for what first calls load and allocate, then capture it, inside `within`, which does not run it.

        Raises RuntimeError for a function that cannot be captured.
        """
        self.function()
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            with without_garbage(), torch.cuda.graph(graph), within():
                self.function()
        except RuntimeError:
            generator.graphsafe_set_state(before)  # torch leaves it as if the capture went on, and then it draws no more
            raise
        self.graph = graph

    def __call__(self) -> None:
        """Replay the graph, or run the function."""
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()


class Outbox:
    """Copies of a small tensor [n] int64 for the host, each as it was when it was sent; two may be on their way."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.turn = tensor, 0
        if tensor.device.type == "cuda":
            self.host = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for _ in range(2)]
            self.sent = [torch.cuda.Event() for _ in range(2)]

    def send(self) -> Callable[[], list[int]]:
        """Start a copy; the result waits for it and gives the numbers."""
        if self.tensor.device.type != "cuda":
            numbers = self.tensor.tolist()
            return lambda: numbers
        turn = self.turn = 1 - self.turn
        self.host[turn].copy_(self.tensor, non_blocking=True)
        self.sent[turn].record()

        def receive() -> list[int]:
            self.sent[turn].synchronize()
            return self.host[turn].tolist()

        return receive
