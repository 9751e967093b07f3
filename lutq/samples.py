"""Calibration without a text: windows that the model to be quantized writes itself, as in LLM-QAT (arXiv 2305.17888).

Tokens are drawn from the model's own distribution, untruncated, of a text that begins as its tokenizer lets texts begin; the
token that marks the beginning is not in the window. Without such a token every window begins with one drawn evenly from the
vocabulary: what a model makes of that alone can be poor text. Special tokens are left out, so that texts do not end. On a GPU the
fast engine of lutq/decode writes.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lutq.decode.choose import functions_for
from lutq.decode.engine import Engine
from lutq.decode.sampler import Sampler
from lutq.decode.shape import RefusedError
from lutq.decode.weights import weights_of
from lutq.errors import LutqError, LutqWarning
from lutq.runtime import out_of_memory, progress_interval

DAMAGED = "the model predicts NaN or infinite values in its own text: give an undamaged model, or --calib books"
TOKENS = 16384  # written side by side, at most, where the model writes by its own forward
BATCH = 16  # windows side by side where the fast engine writes


class Untruncated(NamedTuple):
    """Settings of a sampler that draws from the model's own distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


class OrdinarySampler(Sampler):
    """Draws tokens that `ordinary`, bool [vocabulary], allows. `sound` is no longer True once logits were NaN or infinite."""

    def __init__(self, ordinary: torch.Tensor, batch: int) -> None:
        super().__init__(Untruncated(), len(ordinary), batch, ordinary.device)
        self.ordinary, self.sound = ordinary, torch.ones((), dtype=torch.bool, device=ordinary.device)

    def discourage(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] without those of other tokens."""
        self.sound.logical_and_(torch.isfinite(logits).all())
        return logits.masked_fill(~self.ordinary, -torch.inf)


def ordinary_tokens(tokenizer: Any, vocabulary: int) -> torch.Tensor:
    """The tokens that text may consist of, of a model with so many logits: bool [vocabulary]."""
    ordinary = torch.arange(vocabulary) < len(tokenizer)
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.int64)
    ordinary[special[special < vocabulary]] = False
    return ordinary


def start_token(tokenizer: Any) -> int | None:
    """The token with which a text begins: one that the tokenizer puts before it, or else is made for that; None without any."""
    before = tokenizer("").input_ids
    return before[0] if before else tokenizer.bos_token_id


def growing_cache(length: int) -> Any:
    """A cache for a transformers model and `length` tokens at most, in memory taken once: its own copies all it has for each."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Growing(DynamicLayer):
        def lazy_initialization(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            super().lazy_initialization(keys, values)
            self.memory = [part.new_empty(*part.shape[:2], length, part.shape[3]) for part in (keys, values)]

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            begin = self.get_seq_length()
            end = begin + keys.shape[2]
            for memory, part in zip(self.memory, (keys, values), strict=True):
                memory[:, :, begin:end] = part
            self.keys, self.values = (memory[:, :, :end] for memory in self.memory)
            return self.keys, self.values

    return Cache(layer_class_to_replicate=Growing)


@torch.no_grad()
def continue_windows(
    model: Any, tokens: torch.Tensor, length: int, ordinary: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """Windows int64 [n, length] whose first tokens are `tokens` [n, 1], the next drawn by `random`, a generator of their device.

    Raises LutqError for logits that are NaN or infinite.
    """
    written, cache = [tokens], growing_cache(length)
    while len(written) < length:
        logits = model(written[-1], past_key_values=cache, use_cache=True).logits[:, -1].float()
        if not torch.isfinite(logits).all():
            raise LutqError(DAMAGED)
        chances = logits.masked_fill(~ordinary, -torch.inf).softmax(-1)
        written.append(torch.multinomial(chances, 1, generator=random))
    return torch.cat(written, 1)


def fast_engine(model: Any, windows: int, length: int, ordinary: torch.Tensor) -> Engine | None:
    """The engine that writes windows of a model, BATCH at a time; None, with a warning, where it does not take the model."""
    batch = min(BATCH, windows)
    try:
        engine = Engine(weights_of(model), length, batch, functions_for(model), OrdinarySampler(ordinary, batch))
    except RefusedError as error:
        warnings.warn(
            f"--calib own is slow, because the fast engine does not take this model: {error.reason}", LutqWarning, stacklevel=2
        )
        return None
    engine.capture()
    return engine


@torch.inference_mode()
def decode_windows(engine: Engine, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """`continue_windows` by an engine for as many windows, or more, with an OrdinarySampler, which draws by torch's generator."""
    engine.token.copy_(F.pad(tokens[:, 0], (0, engine.batch - len(tokens))))
    engine.position.zero_()
    written = [engine.token.clone()]
    for _ in range(length - 1):
        engine.advance()
        written.append(engine.token.clone())
    if not engine.sampler.sound:
        raise LutqError(DAMAGED)
    return torch.stack(written, 1)[: len(tokens)]


def write_windows(path: Path, tokenizer: Any, windows: int, length: int, seed: int, device: torch.device) -> torch.Tensor:
    """Windows int64 [windows, length] that the model in `path` writes on `device`, on the CPU. Raises LutqError."""
    from lutq.hf import load

    model = load(path, device=device)
    ordinary = ordinary_tokens(tokenizer, model.get_output_embeddings().weight.shape[0]).to(device)
    random = torch.Generator(device).manual_seed(seed)
    start = start_token(tokenizer)
    if start is None:
        first = ordinary.float().multinomial(windows, replacement=True, generator=random)
    else:
        first = torch.full((windows,), start, device=device)
    skipped = int(start is not None)
    total, batches = length + skipped, []
    with (
        out_of_memory(lambda: f"--calib own needs the whole model on {device}: use --calib books, or --device cpu"),
        tqdm(total=windows, unit="window", desc="writing", mininterval=progress_interval()) as bar,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        engine = None if device.type == "cpu" else fast_engine(model, windows, total, ordinary)
        torch.manual_seed(seed)
        for tokens in first[:, None].split(engine.batch if engine else max(1, TOKENS // length)):
            if engine:
                written = decode_windows(engine, tokens, total)
            else:
                written = continue_windows(model, tokens, total, ordinary, random)
            batches.append(written[:, skipped:].cpu())
            bar.update(len(tokens))
        if engine:
            engine.graph = None  # each holds the other
    return torch.cat(batches)
