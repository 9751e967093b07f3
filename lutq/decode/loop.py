"""The loop over tokens: the GPU computes the next while the host looks at the last."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch


def continue_texts(
    engine: Any, prompts: Sequence[torch.Tensor], counts: Sequence[int], stop: Collection[int], put: Callable[[int, int], None]
) -> list[int]:
    """Continue prompts [T], one for each sequence of the engine, by up to `counts` tokens, one of `stop` being the last.

    `put` gets the number of the sequence and the token, step by step. Returns how many tokens each sequence got; those of count 0
    are there to fill the engine. A step is started before the tokens of the last are known to be no stops; what it
    computes then is not used. Whatever ends the loop, the GPU has finished when it returns.
    """
    made, device = [0] * len(counts), prompts[0].device
    going = [i for i, count in enumerate(counts) if count]
    try:
        engine.prompt(prompts)
        pending = engine.fetch()
        for step in range(1, max(counts) + 1):
            arriving = pending
            if step < max(counts):
                engine.advance()
                pending = engine.fetch()
            tokens = arriving()
            for i in going:
                put(i, tokens[i])
                made[i] = step
            going = [i for i in going if tokens[i] not in stop and step < counts[i]]
            if not going:
                break
        return made
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
