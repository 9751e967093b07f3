"""The fast engine: a decode step of OPT or LLaMA, written out over functions that fill given memory.

    h = embed(token)                                      for each block:
    logits = head(norm(h))                                    q, k, v = inward(norm(h));  y = out(attention(q, k, v))
                                                              h += y
                                                              g, u = up(norm(h));         y = down(f(g) * u)
                                                              h += y

The sum h += y is part of the norm that follows. h is fp32, where transformers rounds it to the model's dtype after every sum:
the logits of both agree within that rounding. Sequences have positions of their own, so a batch may be ragged.

`functions` are those of lutq/decode/reference.py or of steps.py. All memory is taken once. A rank of several (lutq/parallel)
holds its heads and inner features (`Shape.world`), sums y over the ranks where `reduce` is called, and takes the token of rank 0
where `agree` is.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lutq.decode import reference
from lutq.decode.graph import Captured, Outbox, on_device
from lutq.decode.prefill import prefill
from lutq.decode.sampler import Sampler
from lutq.decode.shape import RefusedError
from lutq.decode.weights import Weights, rotation
from lutq.errors import LutqError
from lutq.runtime import free_memory, size

ROUNDING = 64  # capacity in tokens is a multiple of it


class Engine:
    """Sequences of a model, `capacity` tokens each at most. `token` and `position` [batch] int64: what the next step reads.

    Raises RefusedError for models that the functions do not take, LutqError for a cache that does not fit.
    """

    name = "fast"

    def __init__(
        self,
        weights: Weights,
        capacity: int,
        batch: int = 1,
        functions: Any = reference,
        sampler: Sampler | None = None,
        reduce: Callable[[torch.Tensor], None] = lambda y: None,
        agree: Callable[[torch.Tensor], None] = lambda token: None,
    ) -> None:
        shape, device, dtype = weights.shape, weights.device, weights.dtype
        problem = functions.reason(shape, dtype, batch)
        if problem:
            raise RefusedError("fast", problem)
        self.weights, self.shape, self.functions = weights, shape, functions
        self.reduce, self.agree, self.sampler, self.batch = reduce, agree, sampler, batch
        self.capacity = min(-(-capacity // ROUNDING) * ROUNDING, shape.longest)
        self.rotation = rotation(weights, self.capacity)
        self.scale = shape.head_size**-0.5
        with on_device(device):
            self.take_memory(batch, device, dtype)
        self.outbox = Outbox(self.token)
        self.graph = Captured(self.step, device)

    def take_memory(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        """The cache [layers, keys and values, batch, kv heads, capacity, D], activations of a step, and the functions' own."""
        shape, weights = self.shape, self.weights
        needed, free = shape.cache_bytes(batch, self.capacity, dtype.itemsize), free_memory(device)
        if needed > free:
            fitting = int(0.95 * free) * self.capacity // needed
            raise LutqError(
                f"the cache of {batch} x {self.capacity} tokens takes {size(needed)} and {device} has {size(free)} free: "
                f"about {fitting} tokens would fit, and more with fewer bits per weight"
            )
        widest = max(max(sum(layer.inward.sizes), sum(layer.up.sizes)) for layer in weights.layers)

        def empty(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device=device)

        heads = (shape.own_kv_heads, self.capacity, shape.head_size)
        self.cache = empty(shape.layers, 2, batch, *heads)
        self.token, self.position = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.h = empty(batch, shape.hidden, dtype=reference.wide(empty(0)).dtype)
        self.x, self.y = empty(batch, shape.hidden), empty(batch, shape.hidden)
        self.mixed, self.inner = empty(batch, shape.own_heads * shape.head_size), empty(batch, shape.own_inner)
        self.logits = empty(batch, weights.head.N)
        memory = empty(batch * widest)
        self.places = [(layer.inward.place(memory, batch), layer.up.place(memory, batch)) for layer in weights.layers]
        self.work = self.functions.workspace(shape, batch, self.capacity)

    def forward(self) -> Iterator[tuple[int, torch.Tensor]]:
        """One token of every sequence: reads `token` and `position`, fills the cache there, and `logits` [batch, vocabulary].

        Gives (index, y) after every block, y being what is still to be added to h.
        """
        do, shape, weights, y = self.functions, self.shape, self.weights, None
        do.embed(self.token, self.position, weights.table, weights.learned, self.h)
        for i, layer in enumerate(weights.layers):
            (outputs, parts), (up_outputs, up_parts) = self.places[i]
            do.norm(self.h, y, layer.attention_norm, self.x)
            for product, output in zip(layer.inward.products, outputs, strict=True):
                do.multiply(product, self.x, output)
            q, k, v = (part.unflatten(1, (-1, shape.head_size)) for part in parts)
            cache = (self.cache[i, 0], self.cache[i, 1])
            do.attention(q, k, v, cache, self.position, self.rotation, self.scale, self.mixed, self.work)
            y = self.y
            do.multiply(layer.out, self.mixed, y)
            self.reduce(y)
            do.norm(self.h, y, layer.norm, self.x)
            for product, output in zip(layer.up.products, up_outputs, strict=True):
                do.multiply(product, self.x, output)
            do.activation(shape.activation, up_parts[0], up_parts[1] if shape.gated else None, self.inner)
            do.multiply(layer.down, self.inner, y)
            self.reduce(y)
            yield i, y
        do.norm(self.h, y, weights.norm, self.x)
        do.multiply(weights.head, self.x, self.logits)

    def step(self) -> None:
        """One token of every sequence, and the next one chosen."""
        for _ in self.forward():
            pass
        self.choose()

    def choose(self) -> None:
        """The next `token` by `logits`, and `position` one further; at the end of the cache it stays."""
        if self.sampler is None or self.sampler.greedy:
            self.functions.choose(self.logits, self.token, self.position, self.capacity - 1)
        else:
            self.token.copy_(self.sampler(self.logits))
            self.position.add_(1).clamp_(max=self.capacity - 1)
        self.agree(self.token)

    def capture(self) -> None:
        """Make the step a graph, before the first prompt: it is run once, which leaves marks in the cache."""
        with on_device(self.weights.device):
            self.graph.capture(self.functions.in_graph)
            self.token.zero_()
            self.position.zero_()

    def prompt(self, ids: torch.Tensor) -> None:
        """Read prompts [batch, T] and choose the token after each."""
        if self.sampler is not None:
            self.sampler.reset(ids)
        with on_device(self.weights.device):
            for i, row in enumerate(ids):
                prefill(self, i, row)
            self.choose()

    def advance(self) -> None:
        """Start the next step, captured if `capture` was called."""
        with on_device(self.weights.device):
            self.graph()

    def fetch(self) -> Callable[[], list[int]]:
        """The tokens chosen by the last step started: to be called when they are wanted, which waits for them."""
        return self.outbox.send()
