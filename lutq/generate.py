"""`lutq generate`: stream text from a prompt, then say how fast it was.

Sampling is that of transformers' `generate`, under the same names.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from lutq.decode.choose import check_engine
from lutq.decode.keep import engine_for
from lutq.decode.loop import continue_texts
from lutq.decode.steps import MOST_BATCH
from lutq.errors import LutqError
from lutq.linear import backend_of
from lutq.runtime import free_memory, out_of_memory, size


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Names and meaning as in transformers' GenerationConfig; temperature 0 is greedy decoding."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
            if not getattr(self, name) >= low:
                raise LutqError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise LutqError(f"seed must be at least 0 and less than 2**64, not {self.seed}")
        if not 0 < self.top_p <= 1:
            raise LutqError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.repetition_penalty > 0:
            raise LutqError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return options | {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclasses.dataclass(frozen=True)
class Generation:
    """Text and timing: the prompt's tokens are processed until the first new token, the others are decoded."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    decode_seconds: float
    backend: str
    engine: str = "plain"

    def summary(self) -> str:
        """Tokens per second of both phases, and what computed them."""
        prompt = f"prompt {self.prompt_tokens} tokens, {self.prompt_tokens / self.prompt_seconds:.1f} tokens/s"
        if self.new_tokens < 2:
            return f"{prompt}; {self.how()}"
        speed = (self.new_tokens - 1) / self.decode_seconds
        return f"{prompt}; decode {self.new_tokens} tokens, {speed:.1f} tokens/s; {self.how()}"

    def how(self) -> str:
        """What computed it."""
        return f"backend {self.backend}" + (f", engine {self.engine}" if self.engine != "plain" else "")


class TimedStreamer(TextStreamer):
    """Hands finished words to `write` and remembers when tokens came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.pieces, self.times = write, [], []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt first, then with every new token."""
        super().put(value)
        self.times.append(time.perf_counter())

    def result(self, model: Any, prompt_tokens: int, new_tokens: int, begin: float, engine: str) -> Generation:
        """What came of a prompt that was begun at a time; to be called at the end."""
        first, last = self.times[1], self.times[-1]
        if hasattr(model, "ranks"):  # lutq/parallel
            engine += f", {model.ranks.world} processes"
        return Generation("".join(self.pieces), prompt_tokens, new_tokens, first - begin, last - first, backend_of(model), engine)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with text that will not change any more."""
        self.pieces.append(text)
        self.write(text)


def encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids [1, T] of a prompt, through the chat template if `chat`. Raises LutqError."""
    if not prompt.strip():
        raise LutqError("the prompt is empty: give some text, --file FILE, or text on standard input")
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise LutqError("this model's tokenizer has no chat template: leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    sampling: Sampling | None = None,
    chat: bool = False,
    write: Callable[[str], None] = lambda text: None,
    engine: str = "auto",
    ready: Callable[[], None] = lambda: None,
) -> Generation:
    """Continue `prompt`, handing text to `write` as it comes. Stops early at the model's longest context.

    engine: see lutq/decode; what it does before the first prompt counts as loading, and it stays with the model for the next
    text (lutq/decode/keep.py). ready: called once the engine is there, before the prompt is read. Raises LutqError for an empty
    prompt or one that leaves no room, for an engine that does not take the model, and when memory runs out.
    """
    return generate_many(model, tokenizer, [prompt], sampling, chat, engine, ready, write=write)[0]


@torch.inference_mode()
def generate_many(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    chat: bool = False,
    engine: str = "auto",
    ready: Callable[[], None] = lambda: None,
    done: Callable[[str, Generation], None] = lambda prompt, result: None,
    write: Callable[[str], None] = lambda text: None,
) -> list[Generation]:
    """Continue several prompts: up to 16 at a time by the engine `fast`, one after the other by others.

    Greedy texts are those of `generate`, but where rounding decides between two tokens; random ones are repeatable for the same
    prompts in the same order. ready: called once the engine is there. done: gets every prompt, in order, with what came of it.
    write: gets the words of all as they come. Raises LutqError as `generate`, for what is wrong with a prompt before any is read.
    """
    check_engine(engine)
    sampling = sampling or Sampling()
    rows = [encode(tokenizer, prompt, chat).to(model.device) for prompt in prompts]
    longest = longest_of(model)
    counts = [room(ids, longest, sampling) for ids in rows]
    if not rows:
        return []
    most, batch, found = max(counts), min(len(rows), MOST_BATCH), []
    capacity = max(ids.shape[1] + count for ids, count in zip(rows, counts, strict=True))
    with (
        out_of_memory(lambda: what_would_fit(model, batch * (capacity - most), batch * most)),
        engine_for(engine, model, capacity, longest, sampling, batch) as chosen,
    ):
        ready()
        torch.manual_seed(sampling.seed)
        together = 1 if chosen is None else chosen.batch
        for first in range(0, len(rows), together):
            part = slice(first, first + together)
            results = generate_part(chosen, model, tokenizer, rows[part], counts[part], sampling, write)
            for prompt, result in zip(prompts[part], results, strict=True):
                done(prompt, result)
            found += results
    return found


def generate_part(
    engine: Any,
    model: Any,
    tokenizer: Any,
    rows: list[torch.Tensor],
    counts: list[int],
    sampling: Sampling,
    write: Callable[[str], None],
) -> list[Generation]:
    """Continue prompts [1, T] by up to `counts` tokens, as many as the engine has sequences or fewer; one without an engine."""
    streamers, begin = [TimedStreamer(tokenizer, write) for _ in rows], time.perf_counter()
    if engine is None:
        name, made = "plain", [plain(model, tokenizer, rows[0], counts[0], sampling, streamers[0])]
    else:
        name, made = engine.name, decode(engine, model, rows, counts, streamers)
    each = zip(streamers, rows, made, strict=True)
    return [streamer.result(model, ids.shape[1], new, begin, name) for streamer, ids, new in each]


def longest_of(model: Any) -> int | None:
    """Tokens of the longest text that a model takes; None where it does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def room(ids: torch.Tensor, longest: int | None, sampling: Sampling) -> int:
    """New tokens for a prompt [1, T] at most. Raises LutqError where there is no room for one."""
    left = (longest - ids.shape[1]) if longest else sampling.max_new_tokens
    if left < 1:
        raise LutqError(f"the prompt has {ids.shape[1]} tokens and the model takes {longest}: shorten the prompt")
    return min(sampling.max_new_tokens, left)


def what_would_fit(model: Any, prompt: int, new: int) -> str:
    """Why there is no memory for `prompt` + `new` tokens, and for how many there is, in words."""
    config, free = model.config, free_memory(model.device)
    words, advice = f"{prompt} + {new} tokens do not fit", "shorten the prompt or --max-new-tokens, or use fewer bits per weight"
    layers, heads, hidden = (getattr(config, name, 0) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if not (layers and heads and hidden):
        return f"{words}: {advice}"
    head_size = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    ranks = model.ranks.world if hasattr(model, "ranks") else 1
    per_token = 2 * layers * kv_heads * head_size * model.dtype.itemsize // ranks
    words = f"{words}: their cache takes {size((prompt + new) * per_token)} and {model.device} has {size(free)} free"
    fitting = int(0.9 * free) // per_token
    return f"{words}, " + (f"enough for about {fitting}" if fitting < prompt + new else "too little for the rest") + f"; {advice}"


def plain(model: Any, tokenizer: Any, ids: torch.Tensor, count: int, sampling: Sampling, streamer: TimedStreamer) -> int:
    """Continue ids [1, T] by up to `count` tokens by transformers' `generate`; how many tokens it made."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mask, options = torch.ones_like(ids), sampling.options() | {"max_new_tokens": count}
    output = model.generate(ids, attention_mask=mask, streamer=streamer, pad_token_id=pad, **options)
    return output.shape[1] - ids.shape[1]


def decode(
    engine: Any, model: Any, rows: Sequence[torch.Tensor], counts: Sequence[int], streamers: Sequence[TimedStreamer]
) -> list[int]:
    """Continue prompts [1, T] by up to `counts` tokens by an engine of lutq/decode; how many tokens it made of each."""
    stop = model.generation_config.eos_token_id
    stop = set() if stop is None else {stop} if isinstance(stop, int) else set(stop)
    for ids, streamer in zip(rows, streamers, strict=True):
        streamer.put(ids)
    missing = engine.batch - len(rows)
    prompts = [ids[0] for ids in [*rows, *[rows[0][:, :1]] * missing]]  # what fills the engine ends at once
    made = continue_texts(
        engine, prompts, [*counts, *[0] * missing], stop, lambda i, token: streamers[i].put(torch.tensor([token]))
    )
    for streamer in streamers:
        streamer.end()
    return made[: len(rows)]
