"""`lutq generate`: stream text from a prompt, then say how fast it was.

Sampling is that of transformers' `generate`, under the same names.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from lutq.decode.choose import check_engine
from lutq.decode.keep import engine_for
from lutq.decode.loop import continue_text
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
        backend = f"backend {self.backend}" + (f", engine {self.engine}" if self.engine != "plain" else "")
        if self.new_tokens < 2:
            return f"{prompt}; {backend}"
        speed = (self.new_tokens - 1) / self.decode_seconds
        return f"{prompt}; decode {self.new_tokens} tokens, {speed:.1f} tokens/s; {backend}"


class TimedStreamer(TextStreamer):
    """Hands finished words to `write` and remembers when tokens came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.pieces, self.times = write, [], []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt first, then with every new token."""
        super().put(value)
        self.times.append(time.perf_counter())

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


@torch.inference_mode()
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
    check_engine(engine)
    sampling = sampling or Sampling()
    ids = encode(tokenizer, prompt, chat).to(model.device)
    longest = getattr(model.config, "max_position_embeddings", None)
    room = (longest - ids.shape[1]) if longest else sampling.max_new_tokens
    if room < 1:
        raise LutqError(f"the prompt has {ids.shape[1]} tokens and the model takes {longest}: shorten the prompt")
    sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    streamer = TimedStreamer(tokenizer, write)
    capacity = ids.shape[1] + sampling.max_new_tokens
    with (
        out_of_memory(lambda: what_would_fit(model, ids.shape[1], sampling.max_new_tokens)),
        engine_for(engine, model, capacity, longest, sampling) as chosen,
    ):
        name = "plain" if chosen is None else chosen.name
        ready()
        torch.manual_seed(sampling.seed)
        begin = time.perf_counter()
        if chosen is None:
            new_tokens = plain(model, tokenizer, ids, sampling, streamer)
        else:
            new_tokens = decode(chosen, model, ids, sampling, streamer)
    first, last = streamer.times[1], streamer.times[-1]
    text = "".join(streamer.pieces)
    if hasattr(model, "ranks"):  # lutq/parallel
        name += f", {model.ranks.world} processes"
    return Generation(text, ids.shape[1], new_tokens, first - begin, last - first, backend_of(model), name)


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


def plain(model: Any, tokenizer: Any, ids: torch.Tensor, sampling: Sampling, streamer: TimedStreamer) -> int:
    """Continue ids [1, T] by transformers' `generate`; how many tokens it made."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, streamer=streamer, pad_token_id=pad, **sampling.options())
    return output.shape[1] - ids.shape[1]


def decode(engine: Any, model: Any, ids: torch.Tensor, sampling: Sampling, streamer: TimedStreamer) -> int:
    """Continue ids [1, T] by an engine of lutq/decode; how many tokens it made."""
    stop = model.generation_config.eos_token_id
    stop = set() if stop is None else {stop} if isinstance(stop, int) else set(stop)
    streamer.put(ids)
    made = continue_text(engine, ids, sampling.max_new_tokens, stop, lambda token: streamer.put(torch.tensor([token])))
    streamer.end()
    return made
