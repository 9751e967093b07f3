"""`lutq bench decode`: a whole decode step of a model with random weights, embedding, head, cache and choice included.

The napkin is what a step must read: quantized layers, head, and the keys and values of `context` tokens per sequence. Its rate is
compared with the read ceiling, which the same run measures. Every step is at the end of a context of that length.

With several GPUs (torchrun, lutq/parallel) bytes, rates and memory are those of one, and the time of communication is given.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lutq.bench import environment, layer_of
from lutq.config import LayerConfig
from lutq.decode.engine import Engine
from lutq.decode.general import General
from lutq.decode.measure import KINDS, time_kinds, time_steps
from lutq.decode.sampler import Sampler
from lutq.decode.shape import Shape, shape_of
from lutq.decode.synthetic import layer_bytes, read_config, synthetic_model
from lutq.decode.weights import weights_of
from lutq.errors import LutqError
from lutq.parallel.ranks import current
from lutq.parallel.split import check_split
from lutq.paths import check_folders
from lutq.runtime import dtype_name, free_memory, out_of_memory, resolve_dtype, size
from lutq.timing import read_ceiling, require_gpu

PROMPT = 512  # tokens, of the time to the first token
FIRSTS = 3
MORE, MOST_REPLAYS = 1000, 400  # tokens after the context for which the graph engine has room, those timed at most
HALF = 16  # bits of a model that is not quantized
COLUMNS = {
    "model": 12,
    "bits": 4,
    "batch": 5,
    "context": 7,
    "ms": 7,
    "p99": 7,
    "tokens/s": 8,
    "GB": 6,
    "of read": 7,
    "products": 8,
    "attention": 9,
    "elementwise": 11,
    "head": 5,
    "memory GB": 9,
    "first ms": 8,
}


class UnfitError(LutqError):
    """A case that does not fit: on any rank if on one, so that all go on to the next."""


class Greedy:
    """Settings of a Sampler: the largest logit."""

    temperature, top_p, top_k, repetition_penalty = 0.0, 1.0, 0, 1.0


def layer_for(bits: int, grid: str, group: int) -> LayerConfig | None:
    """BCQ without offsets, or a uniform grid with zero points (`auto`: at 4 bits); None for 16 bits. Raises LutqError."""
    return None if bits == HALF else layer_of(bits, grid, group)


def block_bytes(shape: Shape, layer: LayerConfig | None) -> int:
    """Of the products of one decoder block, of a rank."""
    heads, kv, inner = shape.own_heads * shape.head_size, shape.own_kv_heads * shape.head_size, shape.own_inner
    sizes = [(heads, shape.hidden), (kv, shape.hidden), (kv, shape.hidden), (shape.hidden, heads)]
    sizes += [(inner, shape.hidden)] * (1 + shape.gated) + [(shape.hidden, inner)]
    return sum(layer_bytes(N, K, layer) for N, K in sizes)


def needed_bytes(shape: Shape, tied: bool, layer: LayerConfig | None, batch: int, context: int) -> int:
    """Of a model with its cache, and as much again of one block, which is joined."""
    kept = 2 * (shape.vocabulary + (0 if tied else shape.own_vocabulary)) * shape.hidden
    return (shape.layers + 1) * block_bytes(shape, layer) + kept + shape.cache_bytes(batch, context)


def check_memory(shape: Shape, config: Any, layer: LayerConfig | None, batch: int, context: int, device: torch.device) -> None:
    """Raise UnfitError, saying what would fit, for a model that does not."""
    tied, free = config.tie_word_embeddings, 0.97 * current().least(free_memory(device))
    needed = needed_bytes(shape, tied, layer, batch, context)
    if needed <= free:
        return
    group = layer.group if layer else 128
    fewer = [b for b in (4, 3, 2, 1) if needed_bytes(shape, tied, layer_of(b, "auto", group), batch, context) <= free]
    per_token = shape.cache_bytes(batch, 1)
    room = (free - needed_bytes(shape, tied, layer, batch, 0)) // per_token
    words = [
        f"{fewer[0]} bits" if fewer and fewer[0] != (layer and layer.bits) else "",
        f"a context of {room:.0f}" if room > 0 else "",
    ]
    fitting = " or ".join(word for word in words if word) or "nothing of this shape"
    raise UnfitError(f"it needs {size(needed)} and {device} has {size(free)} free: {fitting} would fit")


def at_the_end(engine: Engine, context: int) -> None:
    """Put every sequence to the last token of its context, after random ones."""
    generator = torch.Generator(engine.cache.device).manual_seed(0)
    engine.cache.normal_(generator=generator)
    engine.token.random_(0, engine.shape.vocabulary, generator=generator)
    engine.position.fill_(context - 1)


def fast_engine(model: Any, batch: int, context: int, device: torch.device) -> Engine:
    """The fast engine at the end of a context, captured."""
    from lutq.decode.steps import Kernels

    ranks = current()
    engine = Engine(weights_of(model, ranks.world), context, batch, Kernels(device), None, ranks)
    engine.capture()
    at_the_end(engine, context)
    return engine


def graph_engine(model: Any, context: int, more: int) -> General:
    """The graph engine after a context, with room for `more` tokens, captured."""
    engine = General(model, context + more, Sampler(Greedy(), model.config.vocab_size, 1, model.device))
    engine.capture()
    engine.prompt(torch.randint(0, model.config.vocab_size, (1, context - 1), device=model.device))
    return engine


def first_token_ms(engine: Any, vocabulary: int, longest: int, device: torch.device) -> tuple[int, float]:
    """Tokens of a prompt, and milliseconds until the one after it is known: the median of a few."""
    ids, times = torch.randint(0, vocabulary, (1, min(PROMPT, longest)), device=device), []
    for _ in range(FIRSTS + 1):  # the first is not counted
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        engine.prompt(ids)
        engine.fetch()()
        times.append(1000 * (time.perf_counter() - begin))
    return ids.shape[1], sorted(times[1:])[FIRSTS // 2]


def columns(cells: list[str]) -> str:
    """One line of the table, of fixed width: it is printed while the rest is still measured."""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=True)).rstrip()


def line(record: dict[str, Any]) -> str:
    """A record as a line of the table. Shares are percent of the step."""
    shares = [f"{100 * record['kinds_ms'][kind] / record['ms']:.0f}%" if record["kinds_ms"] else "" for kind in KINDS]
    if "communication" in record["kinds_ms"]:
        more = f"  communication of {record['gpus']} GPUs {100 * record['kinds_ms']['communication'] / record['ms']:.0f}%"
    else:
        more = ""
    names = [record["model"], *(str(record[name]) for name in ("bits", "batch", "context"))]
    times = [f"{record['ms']:.3f}", f"{record['ms_p99']:.3f}", f"{record['tokens_per_second']:.0f}"]
    rates = [f"{record['bytes'] / 1e9:.2f}", f"{record['percent_of_ceiling']:.1f}%"]
    last = [f"{record['memory_bytes'] / 1e9:.2f}", f"{record['first_token_ms']:.1f}"]
    return columns([*names, *times, *rates, *shares, *last]) + more


def measure(
    name: str, layer: LayerConfig | None, batch: int, context: int, kind: str, replays: int, gpu: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The record of one case, without rates. Bytes and memory are of one GPU. Raises LutqError; UnfitError if it does not fit."""
    config, ranks = read_config(name), current()
    check_split(shape_of(config), ranks.world, layer is not None)
    shape = shape_of(config, ranks.world)
    longest = shape.longest - (MORE if kind == "graph" else 0)
    if not 2 <= context <= longest:
        raise UnfitError(f"--context must be 2 to {longest} for {name} and --engine {kind}, not {context}")
    check_memory(shape, config, layer, batch, context, gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    model = synthetic_model(config, layer, gpu, dtype, ranks)
    kinds: dict[str, float] = {}
    if kind == "fast":
        engine: Any = fast_engine(model, batch, context, gpu)
        read = engine.weights.nbytes
        timing = time_steps(engine.advance, replays)
        kinds = time_kinds(engine, replays)
        memory = torch.cuda.memory_allocated(gpu)
        single = engine if batch == 1 else fast_engine(model, 1, context, gpu)
        tokens, first = first_token_ms(single, shape.vocabulary, single.capacity, gpu)
    else:
        read = shape.layers * block_bytes(shape, layer) + 2 * shape.vocabulary * shape.hidden
        engine = graph_engine(model, context, MORE)
        timing = time_steps(engine.advance, min(replays, MOST_REPLAYS))
        memory = torch.cuda.memory_allocated(gpu)
        tokens, first = first_token_ms(engine, shape.vocabulary, engine.capacity, gpu)
    return {
        "model": Path(name).stem if name.endswith(".json") else name,
        "bits": layer.bits if layer else HALF,
        "group": layer.group if layer else None,
        "grid": layer.grid if layer else None,
        "engine": kind,
        "gpus": ranks.world,
        "batch": batch,
        "context": context,
        "replays": replays,
        "dtype": str(dtype).removeprefix("torch."),
        **timing._asdict(),
        "kinds_ms": kinds,
        "bytes": read + shape.cache_bytes(batch, context),
        "memory_bytes": memory,
        "prompt_tokens": tokens,
        "first_token_ms": first,
    }


def cases(shapes: list[str], bits: list[int], batches: list[int]) -> Iterator[tuple[str, int, int]]:
    """Every combination, shape by shape."""
    return ((name, b, batch) for name in shapes for b in bits for batch in batches)


def bench(
    shape: list[str] | None = None,
    bits: list[int] | None = None,
    group: int = 128,
    grid: str = "auto",
    context: int = 512,
    batch: list[int] | None = None,
    engine: str = "fast",
    json_file: Path | None = None,
    plot: Path | None = None,
    replays: int = 200,
    device: str = "auto",
    dtype: str = "float16",
    echo: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Measure, print and write what the flags of `lutq bench decode` say; the JSON file is renewed after every case.

    A model that does not fit is left out, with a word. Raises LutqError for all else.
    """
    from lutq.decode.chart import draw
    from lutq.roofline import require_matplotlib

    shapes, bits, batches = shape or ["llama-2-7b"], bits or [3], batch or [1]
    layers = {b: layer_for(b, grid, group) for b in bits}
    activations = resolve_dtype(dtype, torch.float16)
    check_settings(engine, batches, replays, activations, json_file, plot)
    if current().world > 1 and engine != "fast":
        raise LutqError(f"several GPUs share the fast engine's model: leave out --engine {engine}, or torchrun")
    if current().rank:
        json_file = plot = None  # rank 0 writes
    for name in shapes:
        read_config(name)
    if plot is not None:
        require_matplotlib(plot)
    gpu = require_gpu(device)
    with torch.cuda.device(gpu), torch.inference_mode():
        result = environment(gpu, read_ceiling(gpu, 20)) | {"records": []}
        torch.cuda.empty_cache()
        echo(f"{result['gpu']}: reads {result['read_ceiling_gbps']:.0f} GB/s at most (torch reductions, measured now)")
        echo(columns(list(COLUMNS)))
        for name, b, sequences in cases(shapes, bits, batches):
            reason = f"{name} with {b} bits and a context of {context}: use fewer bits"
            try:
                with out_of_memory(lambda reason=reason: reason, LutqError if current().world > 1 else UnfitError):
                    record = measure(name, layers[b], sequences, context, engine, replays, gpu, activations)
            except UnfitError as error:  # on every rank, or the others may wait for this one
                echo(f"{name}, {b} bits, batch {sequences}: {error}")
                continue
            finally:
                gc.collect()  # an engine and its graph hold each other
                torch.cuda.empty_cache()
            gbps = record["bytes"] / record["ms"] / 1e6
            record |= {
                "tokens_per_second": 1000 * sequences / record["ms"],
                "gbps": gbps,
                "percent_of_ceiling": 100 * gbps / result["read_ceiling_gbps"],
                "date": result["date"],
            }
            result["records"].append(record)
            echo(line(record))
            if json_file is not None:
                json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not result["records"]:
        raise LutqError(
            "nothing of what was asked for fits on this GPU: use fewer --bits, a shorter --context or a smaller --shape"
        )
    if plot is not None:
        draw(result, plot)
    return result


def check_settings(engine: str, batches: list[int], replays: int, dtype: torch.dtype, *files: Path | None) -> None:
    """Raise LutqError for values out of range and for files whose directory does not exist."""
    from lutq.decode.steps import MOST_BATCH

    if engine not in ("fast", "graph"):
        raise LutqError(f"--engine must be fast or graph, not {engine!r}")
    most = MOST_BATCH if engine == "fast" else 1
    for batch in batches:
        if not 1 <= batch <= most:
            raise LutqError(f"--batch must be 1 to {MOST_BATCH}, and 1 for --engine graph, not {batch}")
    if engine == "fast" and dtype not in (torch.float16, torch.bfloat16):
        raise LutqError(f"--dtype must be float16 or bfloat16 for --engine fast, not {dtype_name(dtype)}")
    if replays < 100:
        raise LutqError(f"--replays must be 100 or more, not {replays}: the 99th percentile is reported")
    check_folders(*files)
