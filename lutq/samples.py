"""Calibration without a text: windows that the model to be quantized writes itself, as in LLM-QAT (arXiv 2305.17888).

Tokens are drawn from the model's own distribution, untruncated, of a text that begins as its tokenizer lets texts begin; the
token that marks the beginning is not in the window. Without such a token every window begins with one drawn evenly from the
vocabulary: what a model makes of that alone can be poor text. Special tokens are left out, so that texts do not end.
"""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lutq.errors import LutqError
from lutq.runtime import out_of_memory, progress_interval

TOKENS = 16384  # written side by side on a CPU, at most
CACHE = 8 << 30  # bytes of keys and values side by side on a GPU, where a step takes as long as its launches, however wide it is


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


def windows_at_once(model: Any, length: int) -> int:
    """How many windows of so many tokens `model` writes side by side."""
    if model.device.type == "cpu":
        return max(1, TOKENS // length)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return max(1, CACHE // (2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * length))


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
            raise LutqError(
                "the model predicts NaN or infinite values in its own text: give an undamaged model, or --calib books"
            )
        chances = logits.masked_fill(~ordinary, -torch.inf).softmax(-1)
        written.append(torch.multinomial(chances, 1, generator=random))
    return torch.cat(written, 1)


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
    batches = []
    with (
        out_of_memory(lambda: f"--calib own needs the whole model on {device}: use --calib books, or --device cpu"),
        tqdm(total=windows, unit="window", desc="writing", mininterval=progress_interval()) as bar,
    ):
        for tokens in first[:, None].split(windows_at_once(model, length)):
            batches.append(continue_windows(model, tokens, length + skipped, ordinary, random)[:, skipped:].cpu())
            bar.update(len(tokens))
    return torch.cat(batches)
