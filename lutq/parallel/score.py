"""Logits of whole windows by the fast engine's prompt reader, for perplexity over several ranks."""

from collections.abc import Iterator
from typing import Any

import torch

from lutq.decode import prefill
from lutq.decode.choose import functions_for
from lutq.decode.engine import Engine
from lutq.decode.weights import weights_of


class Scorer:
    """Maps windows [windows, T] of tokens to their logits [T, vocabulary], T at most `window`; on every rank all of them.

    They come one window after the other, so that memory holds those of one.
    """

    def __init__(self, model: Any, window: int) -> None:
        ranks = model.ranks
        weights = weights_of(model, ranks.world)
        self.engine = Engine(weights, window, 1, functions_for(model), None, ranks)
        self.engine.graph = None  # it holds the engine, which would keep the model in memory

    def __call__(self, windows: torch.Tensor) -> Iterator[torch.Tensor]:
        """See the class."""
        for ids in windows:
            logits = self.engine.logits.new_empty(len(ids), self.engine.shape.vocabulary)
            begin = 0
            for part in ids.split(prefill.CHUNK):
                end = begin + len(part)
                prefill.fill_logits(self.engine, prefill.read_chunk(self.engine, 0, part, begin), logits[begin:end])
                begin = end
            yield logits
