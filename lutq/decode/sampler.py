"""The choice of the next token by logits, in torch operations that a CUDA graph can hold: nothing waits for the host.

Order and meaning are those of transformers' `generate`: repetition penalty, temperature, top k, top p. A token is drawn by
exponential variables, argmax p / e, e ~ Exp(1), from the device's default generator, whose state graphs of torch know.
"""

from collections.abc import Iterable
from typing import Protocol

import torch


class Settings(Protocol):
    """What a Sampler reads of `lutq.generate.Sampling`."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float


class Sampler:
    """Chooses among `vocabulary` tokens for each of `batch` sequences. `greedy`: it is argmax and nothing else."""

    def __init__(self, settings: Settings, vocabulary: int, batch: int, device: torch.device) -> None:
        self.settings = settings
        self.top_k = min(settings.top_k, vocabulary)
        self.seen: torch.Tensor | None = None
        if settings.repetition_penalty != 1:
            self.seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self.greedy = settings.temperature == 0 and self.seen is None

    def reset(self, prompts: Iterable[torch.Tensor]) -> None:
        """Begin with prompts [T], one for each sequence: their tokens, and no others, are discouraged."""
        if self.seen is not None:
            self.seen.zero_()
            for seen, ids in zip(self.seen, prompts, strict=True):
                seen[ids] = True

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens int64 [batch] by logits [batch, vocabulary]."""
        token = self.draw(self.discourage(logits.float()))
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        return token[:, 0]

    def discourage(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits after the repetition penalty (arXiv 1909.05858)."""
        if self.seen is None:
            return logits
        penalty = self.settings.repetition_penalty
        return torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, 1] by logits [batch, vocabulary]."""
        settings = self.settings
        if settings.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        tokens = None
        if self.top_k:
            logits, tokens = logits.topk(self.top_k)
        elif settings.top_p < 1:
            logits, tokens = logits.sort(descending=True)
        p = (logits / settings.temperature).softmax(-1)
        if settings.top_p < 1:  # a token stays if those before it do not reach top_p: the first always does
            p = p.masked_fill(p.cumsum(-1) - p >= settings.top_p, 0)
        waiting = torch.empty_like(p).exponential_().clamp_min_(torch.finfo(p.dtype).tiny)
        drawn = (p / waiting).argmax(-1, keepdim=True)
        return drawn if tokens is None else tokens.gather(1, drawn)
