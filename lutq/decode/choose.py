"""Which engine continues a text, and why not a faster one."""

import warnings
from typing import Any

import torch

from lutq.decode.engine import Engine
from lutq.decode.general import General
from lutq.decode.sampler import Sampler, Settings
from lutq.decode.shape import RefusedError
from lutq.decode.weights import weights_of
from lutq.errors import LutqError, LutqWarning
from lutq.linear import backend_of
from lutq.parallel.ranks import ALONE

ENGINES = ("auto", "fast", "graph", "plain")


def check_engine(name: str) -> None:
    """Raise LutqError for an engine that does not exist."""
    if name not in ENGINES:
        raise LutqError(f"unknown engine {name!r}: use {', '.join(ENGINES)}")


def make(name: str, model: Any, capacity: int, settings: Settings, batch: int = 1) -> Any:
    """The engine `fast` or `graph` for `batch` texts of `capacity` tokens at a time, captured; `graph` is for one, whatever the
    batch. Raises RefusedError with the reason why not.
    """
    sampler = Sampler(settings, model.config.vocab_size, batch if name == "fast" else 1, model.device)
    if name == "fast":
        ranks = getattr(model, "ranks", ALONE)
        weights = weights_of(model, ranks.world)
        engine: Any = Engine(weights, capacity, batch, functions_for(model), sampler, ranks)
    else:
        engine = General(model, capacity, sampler)
    engine.capture()
    return engine


def functions_for(model: Any) -> Any:
    """The kernels for a model on a GPU, the reference for one on the CPU. Raises RefusedError."""
    if model.device.type != "cuda":
        from lutq.decode import reference

        return reference
    from lutq.decode.steps import Kernels

    try:
        return Kernels(model.device)
    except LutqError as error:
        raise RefusedError("fast", f"its kernels cannot run: {error}") from error


def choose(requested: str, model: Any, capacity: int, settings: Settings, batch: int = 1) -> Any:
    """The engine asked for, or None for `plain`. `auto`: on a GPU the first of fast, graph and plain that takes the model.

    A rank's part of a model (lutq/parallel) is for `fast`. Warns once why `auto` does not take a faster one; raises LutqError
    where an engine asked for does not take the model.
    """
    check_engine(requested)
    if hasattr(model, "ranks"):
        if requested not in ("auto", "fast"):
            raise LutqError(f"several processes share the fast engine's model: leave out --engine {requested}, or torchrun")
        return make("fast", model, capacity, settings, batch)
    if requested == "plain" or (requested == "auto" and model.device.type != "cuda"):
        return None
    if requested != "auto":
        return make(requested, model, capacity, settings, batch)
    names = ["graph"] if backend_of(model) == "reference" else ["fast", "graph"]
    for name, slower in zip(names, [*names[1:], "plain"], strict=True):
        try:
            return make(name, model, capacity, settings, batch)
        except RefusedError as error:
            warnings.warn(
                f"lutq decodes with --engine {slower}: {name} does not take this model: {error.reason}", LutqWarning, stacklevel=2
            )
            torch.cuda.empty_cache()
    return None
