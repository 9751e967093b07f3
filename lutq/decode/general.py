"""The graph engine: the own forward of any causal model of transformers over a static cache, one CUDA graph per step.

A static cache counts its tokens in a tensor, and masks are made from that, so that one captured step serves all positions. What
does not work like that is refused: models that decide by numbers on the host cannot be captured, and models that keep such
numbers would be captured wrongly, so the first steps are computed both ways and compared.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lutq.decode.graph import Captured, Outbox, on_device
from lutq.decode.sampler import Sampler
from lutq.decode.shape import RefusedError

CHUNK = 1024  # tokens of a prompt read at a time
TOLERANCE = 0.02  # of the largest logit, between a captured step and an ordinary one


def refusal(model: Any) -> str | None:
    """Why a model cannot be captured, in words, as far as known without trying."""
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers has no static cache for it"
    if len({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}) > 1:
        return "it is not on one device"
    return None


class General:
    """One sequence of a model, `capacity` tokens at most.

    Raises RefusedError, with the reason, for a model that cannot be captured.
    """

    name, batch = "graph", 1

    def __init__(self, model: Any, capacity: int, sampler: Sampler) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        problem = refusal(model)
        if problem:
            raise RefusedError(self.name, problem)
        self.model, self.sampler, self.capacity = model, sampler, capacity
        self.device = model.device
        takes = inspect.signature(model.forward).parameters
        self.extra = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # sliding windows are left to the masks: a cache that slides counts in Python
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(max_cache_len=capacity) for _ in range(count)])
        self.token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.mask = torch.ones(1, capacity, dtype=torch.int64, device=self.device)
        self.outbox = Outbox(self.token)
        self.graph = Captured(self.step, self.device)
        self.logits: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The logits [1, vocabulary] after tokens [1, T] at positions [1, T]."""
        options = {"attention_mask": self.mask, "position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        return self.model(ids, **options, **self.extra).logits[:, -1]

    def step(self) -> None:
        """The token at `position`, and the next one chosen."""
        self.choose(self.forward(self.token[None], self.position[None]))

    def choose(self, logits: torch.Tensor) -> None:
        """Keep the logits [1, vocabulary]; the next `token` by them, and `position` one further."""
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        self.token.copy_(self.sampler(self.logits))
        self.position.add_(1)

    def clear(self) -> None:
        """Forget everything read."""
        self.cache.reset()
        self.token.zero_()
        self.position.zero_()

    def capture(self) -> None:
        """Make the step a graph, before the first prompt. Raises RefusedError, with the reason, where that does not work."""
        start = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with on_device(self.device):
            try:
                expected = self.trial(start)
                self.prompt(start)
                self.graph.capture()
                found = self.trial(start)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                reason = str(error).strip().split("\n")[0]
                raise RefusedError(self.name, reason) from error
            difference = ((found - expected).abs().amax() / expected.abs().amax()).item()
            if not difference <= TOLERANCE:
                raise RefusedError(self.name, f"its captured steps differ from ordinary ones by {difference:.1e}")
            self.clear()

    def trial(self, start: torch.Tensor) -> torch.Tensor:
        """The logits [3, vocabulary] of three steps with token 0."""
        self.prompt(start)
        logits = []
        for _ in range(3):
            self.token.zero_()
            self.graph()
            logits.append(self.logits.float().clone())
        return torch.cat(logits)

    def prompt(self, prompts: Sequence[torch.Tensor]) -> None:
        """Read the one prompt [T] and choose the token after it."""
        (ids,) = prompts
        ids = ids[None]
        self.clear()
        self.sampler.reset(prompts)
        with on_device(self.device):
            begin = 0
            for part in ids.split(CHUNK, dim=1):
                positions = torch.arange(begin, begin + part.shape[1], device=self.device)[None]
                logits = self.forward(part, positions)
                begin += part.shape[1]
            self.position.fill_(begin - 1)
            self.choose(logits)

    def advance(self) -> None:
        """Start the next step, captured if `capture` was called."""
        with on_device(self.device):
            self.graph()

    def fetch(self) -> Callable[[], list[int]]:
        """The token chosen by the last step started: to be called when it is wanted, which waits for it."""
        return self.outbox.send()
