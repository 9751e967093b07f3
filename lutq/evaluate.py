"""`lutq eval-ppl`: perplexity by a named protocol.

    gptq        rows joined by blank lines, tokenized once, non-overlapping windows of 2048 tokens or the model's maximum if
                that is less, the tail dropped; mean over windows of the mean NLL of each window, then exp. What papers
                report (Frantar et al., arXiv 2210.17323).
    raw         the same on the text as the file has it.
    context-N   `gptq` with windows of N tokens.

Every token of a window but its first is predicted from those before it in the window. The standard error is that of the
mean over windows, carried through exp.
"""

import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lutq.data import Text, load_text
from lutq.errors import LutqError
from lutq.parallel.ranks import current
from lutq.paths import check_folders
from lutq.runtime import device_name, dtype_name, out_of_memory, progress_interval

DEFAULT_WINDOW = 2048
LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}  # logits per forward pass: what fits a CPU cache well, and fills a GPU


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and everything needed to repeat it; nll in nats per token, seconds of the forward passes.

    One window has no standard error.
    """

    model: str
    dataset: str
    protocol: str
    perplexity: float
    standard_error: float | None
    nll: float
    window: int
    windows: int
    tokens: int
    bos: bool
    tokenizer: str
    dtype: str
    device: str
    backend: str
    seconds: float
    tokens_per_second: float

    def summary(self) -> str:
        """One line for people."""
        error = "" if self.standard_error is None else f" +- {self.standard_error:.2f}"
        return (
            f"{self.model}: perplexity {self.perplexity:.2f}{error} "
            f"({self.windows} windows of {self.window}, protocol {self.protocol}, {self.dtype} on {self.device}, "
            f"backend {self.backend}, {self.tokens_per_second:,.0f} tokens/s)"
        )


def window_of(protocol: str, longest: int | None) -> int:
    """Window length in tokens of a protocol, for a model that takes `longest` tokens (None: any). Raises LutqError."""
    match = re.fullmatch(r"gptq|raw|context-(\d+)", protocol)
    if not match or (match[1] and int(match[1]) < 2):
        raise LutqError(f"unknown protocol {protocol!r}: use gptq, raw or context-N with N tokens, such as context-4096")
    if match[1] is None:
        return min(DEFAULT_WINDOW, longest or DEFAULT_WINDOW)
    if longest and int(match[1]) > longest:
        raise LutqError(f"the model takes {longest} tokens at most: use --protocol context-{longest} or less")
    return int(match[1])


def windows_of(tokens: torch.Tensor, window: int, most: int | None) -> torch.Tensor:
    """Tokens [T] cut into [windows, window], the tail dropped, at most `most` windows. Raises LutqError for none."""
    count = len(tokens) // window
    if count == 0:
        raise LutqError(
            f"the text has {len(tokens)} tokens, less than one window of {window}: give a longer text or --protocol context-N"
        )
    return tokens[: count * window].view(count, window)[:most]


@torch.inference_mode()
def window_nll(model: Any, windows: torch.Tensor, progress: bool = True) -> torch.Tensor:
    """Mean negative log-likelihood of each window [windows], float64; windows int64 [windows, window]."""
    vocabulary = model.get_output_embeddings().out_features
    if hasattr(model, "ranks"):  # a part of it, in one of several processes
        from lutq.parallel.score import Scorer

        forward: Any = Scorer(model, windows.shape[1])
    else:
        forward = lambda tokens: model(tokens, use_cache=False).logits  # noqa: E731
    batch = max(1, LOGITS[model.device.type] // (windows.shape[1] * vocabulary))
    losses = []
    with tqdm(total=windows.numel(), unit="token", unit_scale=True, disable=not progress, mininterval=progress_interval()) as bar:
        for part in windows.split(batch):
            tokens = part.to(model.device)
            logits = forward(tokens)
            for row, target in zip(logits, tokens, strict=True):
                losses.append(F.cross_entropy(row[:-1].float(), target[1:]).double().cpu())
            bar.update(part.numel())
            bar.set_postfix(ppl=f"{torch.stack(losses).mean().exp().item():.2f}", refresh=False)
    return torch.stack(losses)


def measure(
    model: Any,
    tokenizer: Any,
    text: Text,
    name: str,
    protocol: str = "gptq",
    max_windows: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a loaded model on a text. `name` is what the result calls the model. Raises LutqError."""
    from lutq.linear import backend_of

    window = window_of(protocol, getattr(model.config, "max_position_embeddings", None))
    tokens = torch.tensor(tokenizer(text.text, verbose=False).input_ids, dtype=torch.int64)
    windows = windows_of(tokens, window, min(filter(None, (max_windows, text.windows)), default=None))
    begin = time.perf_counter()
    with out_of_memory(lambda: f"windows of {window} tokens are too long here: use --protocol context-{window // 2}"):
        losses = window_nll(model, windows, progress)
    seconds = time.perf_counter() - begin
    nll = losses.mean().item()
    if not math.isfinite(nll):
        raise LutqError(f"{name} gives NaN or infinite losses in {model.dtype}: try --dtype bfloat16 or float32")
    perplexity = math.exp(min(nll, 700))
    spread = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else None
    bos = getattr(tokenizer, "bos_token_id", None)
    where = device_name(model.device)
    if hasattr(model, "ranks"):
        where = f"{model.ranks.world} x {where}"
    return Perplexity(
        model=name,
        dataset=text.source,
        protocol=protocol,
        perplexity=perplexity,
        standard_error=None if spread is None else perplexity * spread,
        nll=nll,
        window=window,
        windows=len(windows),
        tokens=windows.numel(),
        bos=bos is not None and len(tokens) > 0 and tokens[0].item() == bos,
        tokenizer=type(tokenizer).__name__,
        dtype=dtype_name(model.dtype),
        device=where,
        backend=backend_of(model),
        seconds=seconds,
        tokens_per_second=windows.numel() / seconds,
    )


def evaluate(
    dataset: str = "wikitext2",
    model: str = "lutq-out",
    baseline: str | None = None,
    protocol: str = "gptq",
    max_windows: int | None = None,
    json_file: Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    backend: str = "auto",
    progress: bool = True,
    bits: int | None = None,
) -> list[Perplexity]:
    """Perplexity of `model`, loaded at `bits` bits, after that of `baseline` if given; written to `json_file` if given.

    Arguments as the flags of `lutq eval-ppl`. Raises LutqError.
    """
    from lutq.hf import load
    from lutq.source import locate
    from lutq.tokens import load_tokenizer

    window_of(protocol, None)
    if max_windows is not None and max_windows < 1:
        raise LutqError(f"--max-windows must be 1 or more, not {max_windows}")
    check_folders(json_file)
    text = load_text(dataset, protocol)
    results = []
    for name, precision in ((baseline, None), (model, bits)):
        if name is None:
            continue
        loaded = load(name, device=device, dtype=dtype, backend=backend, bits=precision)
        results.append(measure(loaded, load_tokenizer(locate(name)[0]), text, name, protocol, max_windows, progress))
        del loaded
    if json_file is not None and current().rank == 0:
        json_file.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n", encoding="utf-8")
    return results


def compare(results: list[Perplexity]) -> str:
    """What `lutq eval-ppl` prints: a line per model and, with a baseline, the difference."""
    lines = [result.summary() for result in results]
    if len(results) == 2:
        base, model = results
        change = model.perplexity - base.perplexity
        lines.append(f"difference: {change:+.2f} ({change / base.perplexity:+.1%})")
    return "\n".join(lines)
