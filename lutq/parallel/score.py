"""Logits of whole windows by the fast engine's prompt reader, for perplexity over several ranks."""

from typing import Any

import torch

from lutq.decode import prefill
from lutq.decode.choose import functions_for
from lutq.decode.engine import Engine
from lutq.decode.weights import weights_of


class Scorer:
    """Maps windows [windows, T] of tokens to logits [windows, T, vocabulary], T at most `window`; on every rank all of them."""

    def __init__(self, model: Any, window: int) -> None:
        ranks = model.ranks
        weights = weights_of(model, ranks.world)
        self.engine = Engine(weights, window, 1, functions_for(model), None, ranks.sum, ranks.agree)

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return torch.stack([torch.cat(list(self.chunks(row))) for row in windows])

    def chunks(self, ids: torch.Tensor) -> Any:
        """Logits [C, vocabulary] of one chunk of a window after the other."""
        engine, begin = self.engine, 0
        for part in ids.split(prefill.CHUNK):
            h = prefill.read_chunk(engine, 0, part, begin)
            x = engine.x.new_empty(h.shape)
            engine.functions.norm(h, None, engine.weights.norm, x)
            begin += part.shape[0]
            yield engine.weights.head(x)
