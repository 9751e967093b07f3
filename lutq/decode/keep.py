"""The engine of a text stays with its model for the next one, so that it is made and captured once.

It is taken again only where a new one would be the same: for the same settings, sequences, capacity and weights. So no result
depends on what was generated before. One engine is kept per model; while it is in use, another thread makes its own. It holds the
weights, too: `forget` it before a model is moved to make room.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lutq.decode.choose import choose
from lutq.decode.sampler import Settings

NAME = "_lutq_engine"  # of a model's attribute
ROUNDING = 256  # capacity in tokens is a multiple of it, so that texts of different lengths share an engine


class Kept:
    """An engine and what it was made for. Copies of it, as in a copied or saved model, are empty."""

    def __init__(self, engine: Any = None, purpose: Any = None) -> None:
        self.engine, self.purpose = engine, purpose

    def __deepcopy__(self, memo: Any) -> "Kept":
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def __del__(self) -> None:
        self.free()

    def free(self) -> None:
        """Give its memory back now: an engine and its graph hold each other."""
        if self.engine is not None:
            self.engine.graph = None
            self.engine = None


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was written; 0 for those of inference mode, of which torch does not count it."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def weight_marks(model: torch.nn.Module) -> tuple[tuple[int, int], ...]:
    """Change when weights are moved, replaced or, as far as torch counts that, written."""
    return tuple((tensor.data_ptr(), version(tensor)) for tensor in (*model.parameters(), *model.buffers()))


def forget(model: torch.nn.Module) -> None:
    """Free the engine kept with a model, if there is one."""
    kept = model.__dict__.pop(NAME, None)
    if kept is not None:
        kept.free()


@contextlib.contextmanager
def engine_for(
    requested: str, model: Any, capacity: int, longest: int | None, settings: Settings, batch: int = 1
) -> Iterator[Any]:
    """What `choose` gives for texts of `capacity` tokens, or of a few more, up to `longest`; of the last text, if it would do.

    After the block it stays with the model, if the block ends well and the model is not a rank's part of one, whose processes
    end together. Raises as `choose`.
    """
    if requested == "plain":
        yield choose(requested, model, capacity, settings, batch)
        return
    capacity = -(-capacity // ROUNDING) * ROUNDING
    capacity = min(capacity, longest or capacity)
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    purpose = (requested, capacity, batch, *(getattr(settings, name) for name in names))
    kept = model.__dict__.pop(NAME, None)
    if kept is None or kept.engine is None or kept.purpose != (purpose, weight_marks(model)):
        if kept is not None:
            kept.free()
        kept = Kept(choose(requested, model, capacity, settings, batch))
    try:
        yield kept.engine
    except BaseException:
        kept.free()
        raise
    if hasattr(model, "ranks"):  # lutq/parallel
        kept.free()
    elif kept.engine is not None:
        kept.purpose = (purpose, weight_marks(model))
        model.__dict__[NAME] = kept
