"""The fast engine: a decode step of OPT or LLaMA, written out over functions that fill given memory.

    h = embed(token)                                      for each block:
    logits = head(norm(h))                                    q, k, v = inward(norm(h));  y = out(attention(q, k, v))
                                                              h += y
                                                              g, u = up(norm(h));         y = down(f(g) * u)
                                                              h += y

The sum h += y is part of the norm that follows. Where products can (`Fusion`), they do more: norms are part of the product that
follows, activations and sums of the one before. h is fp32, where transformers rounds it to the model's dtype after every sum: the
logits of both agree within that rounding. Sequences have positions of their own, so a batch may be ragged.

A product of one row may be left unfinished, as sums that its reader adds up (`Sums` of products.py), except the head's.

`functions` are those of lutq/decode/reference.py or of steps.py. All memory is taken once. A rank of several (lutq/parallel)
holds its heads, inner features and rows of the head (`Shape.world`): y is summed over the ranks, inside the norm that follows
where there are inboxes (lutq/parallel/inboxes.py), and logits are gathered, so that all have the same and choose the same token.
Where it is drawn, that of rank 0 counts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lutq.decode import reference
from lutq.decode.fusion import Fusion, Norm
from lutq.decode.graph import Captured, Outbox, on_device
from lutq.decode.prefill import prefill
from lutq.decode.products import Product, Result, common_slabs, padded, place
from lutq.decode.sampler import Sampler
from lutq.decode.shape import RefusedError
from lutq.decode.weights import Layer, Weights, rotation
from lutq.errors import LutqError
from lutq.parallel.ranks import ALONE, Ranks
from lutq.runtime import free_memory, size

ROUNDING = 64  # capacity in tokens is a multiple of it
NORM_SUMS = 1 << 18  # numbers that a norm adds up at most: it has a few processors for that, a product all of them


class Fusions(NamedTuple):
    """What the products of a layer do besides, those of `inward` each; None where they do nothing."""

    inward: Fusion | None
    out: Fusion | None
    up: Fusion | None
    down: Fusion | None


class Places(NamedTuple):
    """Where the products of a layer leave their results: those of `inward` and `up` by product, and by part."""

    inward: list[Result]
    queries: list[Result]
    out: Result
    up: list[Result]
    gates: list[Result]
    down: Result


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
        ranks: Ranks = ALONE,
    ) -> None:
        shape, device, dtype = weights.shape, weights.device, weights.dtype
        problem = functions.reason(shape, dtype, batch)
        if problem:
            raise RefusedError("fast", problem)
        self.weights, self.shape, self.functions = weights, shape, functions
        self.ranks, self.sampler, self.batch = ranks, sampler, batch
        self.inboxes = functions.inboxes(ranks)
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
        self.logits = empty(batch, shape.vocabulary)
        self.own_logits = self.logits if shape.world == 1 else empty(batch, weights.head.N)
        groups = [group for layer in weights.layers for group in self.groups(layer)]
        most = max(slabs * sum(padded(product.N) for product in products) for products, slabs in groups)
        memory, sums = empty(batch * widest), empty(most, dtype=torch.float32)
        self.places = [self.places_of(layer, memory, sums) for layer in weights.layers]
        self.fusions = [self.fusions_of(layer) for layer in weights.layers]
        self.work = self.functions.workspace(shape, batch, self.capacity)

    def groups(self, layer: Layer) -> list[tuple[Sequence[Product], int]]:
        """Products of a layer whose results are read together, of inward, out, up and down, and how many slabs they leave.

        None for a norm that would have too much to add, or where y is summed over ranks ahead of it.
        """
        found = []
        for products, for_norm in (
            (layer.inward.products, False),
            ([layer.out], True),
            (layer.up.products, False),
            ([layer.down], True),
        ):
            slabs = common_slabs(products, self.batch, self.weights.dtype)
            if for_norm and ((self.shape.world > 1 and self.inboxes is None) or slabs * self.shape.hidden > NORM_SUMS):
                slabs = 0
            found.append((products, slabs))
        return found

    def places_of(self, layer: Layer, memory: torch.Tensor, sums: torch.Tensor) -> Places:
        """In flat memory, which layers share: a result has been read before the next is written there."""
        y = self.y.view(-1)
        inward, out, up, down = (
            place(products, slabs, self.batch, sums if slabs else rows)
            for (products, slabs), rows in zip(self.groups(layer), (memory, y, memory, y), strict=True)
        )
        return Places(inward, layer.inward.split(inward), out[0], up, layer.up.split(up), down[0])

    def fusions_of(self, layer: Layer) -> Fusions:
        """As much as the products of a layer can. Where y is summed over ranks it is not complete when a product ends."""

        def allowed(products: Sequence[Product], fusion: Fusion) -> Fusion | None:
            alone = self.shape.world == 1 and not (fusion.gated and len(products) > 1)
            fuses = alone and all(product.fuses(self.batch, self.weights.dtype, fusion) for product in products)
            return fusion if fuses else None

        return Fusions(
            allowed(layer.inward.products, Fusion(norm=layer.attention_norm)),
            allowed([layer.out], Fusion(add=True)),
            allowed(layer.up.products, Fusion(layer.norm, self.shape.activation, self.shape.gated)),
            allowed([layer.down], Fusion(add=True)),
        )

    def forward(self) -> Iterator[tuple[int, Result | None]]:
        """One token of every sequence: reads `token` and `position`, fills the cache there, and `logits` [batch, vocabulary].

        Gives (index, y) after every block, y being what is still to be added to h, or None; with inboxes this rank's part of it.
        """
        do, shape, weights, y, inboxes = self.functions, self.shape, self.weights, None, None
        do.embed(self.token, self.position, weights.table, weights.learned, self.h, self.inboxes and self.inboxes.step)
        for i, layer in enumerate(weights.layers):
            at, fusions = self.places[i], self.fusions[i]
            self.multiply_norm(layer.inward.products, at.inward, y, layer.attention_norm, inboxes, fusions.inward)
            q, k, v = (part.unflatten(1, (-1, shape.head_size)) for part in at.queries)
            cache = (self.cache[i, 0], self.cache[i, 1])
            do.attention(q, k, v, cache, self.position, self.rotation, self.scale, self.mixed, self.work)
            y, inboxes = self.multiply_add(layer.out, self.mixed, at.out, 2 * i, fusions.out)
            if y is None and fusions.up:
                do.multiply(layer.up.products[0], self.h, self.inner, fusions.up)
            else:
                self.multiply_norm(layer.up.products, at.up, y, layer.norm, inboxes)
                do.activation(shape.activation, at.gates[0], at.gates[1] if shape.gated else None, self.inner)
            y, inboxes = self.multiply_add(layer.down, self.inner, at.down, 2 * i + 1, fusions.down)
            yield i, y
        do.norm(self.h, y, weights.norm, self.x, inboxes)
        do.multiply(weights.head, self.x, self.own_logits)
        self.ranks.gather(self.own_logits, self.logits)

    def multiply_norm(
        self,
        products: Sequence[Product],
        results: list[Result],
        y: Result | None,
        by: Norm,
        inboxes: Any,
        fusion: Fusion | None = None,
    ) -> None:
        """Fill the results of products with the norm of h + y."""
        x = self.h
        if y is not None or fusion is None:
            x, fusion = self.x, None
            self.functions.norm(self.h, y, by, x, inboxes)
        for product, result in zip(products, results, strict=True):
            self.functions.multiply(product, x, result, fusion)

    def multiply_add(
        self, product: Product, x: torch.Tensor, y: Result, turn: int, fusion: Fusion | None
    ) -> tuple[Result | None, Any]:
        """Add a product with x to h. Gives what the next norm has to add, y or nothing, and `add_ranks` of it."""
        if fusion:
            self.functions.multiply(product, x, self.h, fusion)
            return None, None
        self.functions.multiply(product, x, y)
        return y, self.add_ranks(y, turn)

    def add_ranks(self, y: Result, turn: int) -> Any:
        """Sum y over the ranks; with inboxes what the next norm takes to do so. Turns are the sums of a step, from 0."""
        if self.inboxes is not None:
            return self.inboxes.at(turn)
        self.ranks.sum(y)
        return None

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
            self.ranks.agree(self.token)

    def capture(self) -> None:
        """Make the step a graph, before the first prompt: it is run once, which leaves marks in the cache."""
        with on_device(self.weights.device):
            self.graph.capture(self.functions.in_graph)
            self.token.zero_()
            self.position.zero_()

    def prompt(self, prompts: Sequence[torch.Tensor]) -> None:
        """Read prompts [T], one for each sequence, and choose the token after each."""
        if self.sampler is not None:
            self.sampler.reset(prompts)
        with on_device(self.weights.device):
            for i, ids in enumerate(prompts):
                prefill(self, i, ids)
            self.choose()

    def advance(self) -> None:
        """Start the next step, captured if `capture` was called."""
        with on_device(self.weights.device):
            self.graph()

    def fetch(self) -> Callable[[], list[int]]:
        """The tokens chosen by the last step started: to be called when they are wanted, which waits for them."""
        return self.outbox.send()
