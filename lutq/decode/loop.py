"""The loop over tokens: the GPU computes the next while the host looks at the last."""

from collections.abc import Callable, Collection
from typing import Any

import torch


def continue_text(engine: Any, ids: torch.Tensor, count: int, stop: Collection[int], put: Callable[[int], None]) -> int:
    """Continue a prompt [1, T] by up to `count` tokens, one of `stop` being the last; `put` gets each. The number of tokens.

    A step is started before the token of the last is known to be no stop; what it computes then is not used. Whatever ends the
    loop, the GPU has finished when it returns.
    """
    try:
        engine.prompt(ids)
        pending = engine.fetch()
        for made in range(1, count + 1):
            arriving = pending
            if made < count:
                engine.advance()
                pending = engine.fetch()
            (token,) = arriving()
            put(token)
            if token in stop:
                break
        return made
    finally:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
