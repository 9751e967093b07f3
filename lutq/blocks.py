"""A causal language model as three steps: embeddings, decoder blocks, head. Calibration walks through it block by block.

What a block takes besides the hidden states (rotary tables, masks) is recorded from the model's own forward pass, which
keeps this independent of the architecture.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lutq.structure import decoder_blocks

TOKENS = 8192  # that go through a block at a time


class Blocks:
    """`model` seen as blocks: `blocks[i]` maps hidden states [B, L, d] to hidden states.

    Embeddings, norms and head are put on `device` in fp32; the blocks stay where they are until the caller moves one.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.model, self.device, self.prefix = model, device, decoder_blocks(model)
        self.blocks: torch.nn.ModuleList = model.get_submodule(self.prefix)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not name.startswith(self.prefix + "."):
                tensor.data = tensor.data.to(device, torch.float32 if tensor.is_floating_point() else None)
        model.requires_grad_(requires_grad=False)
        self.extras: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, i: int) -> str:
        """Name of block i, as in the state dict."""
        return f"{self.prefix}.{i}"

    @contextlib.contextmanager
    def replaced(self, forward: Callable[[int, torch.Tensor, dict[str, Any]], torch.Tensor]) -> Iterator[None]:
        """Inside, block i computes forward(i, hidden, extras) instead of its own."""
        for i, block in enumerate(self.blocks):
            block.forward = lambda hidden, *_, i=i, **extras: forward(i, hidden, extras)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    @torch.no_grad()
    def embed(self, windows: torch.Tensor) -> torch.Tensor:
        """What enters the first block, fp32 [n, L, d], for windows int64 [n, L]; learns what else blocks take."""
        found: list[torch.Tensor] = []

        def record(i: int, hidden: torch.Tensor, extras: dict[str, Any]) -> torch.Tensor:
            self.extras.append(extras)
            if i == 0:
                found.append(hidden)
            return hidden

        with self.replaced(record):
            for window in windows:
                self.extras = []
                self.model(window[None].to(self.device), use_cache=False)
        return torch.cat(found)

    def run(self, block: torch.nn.Module, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, L, d] after `block`, which is block i or stands for it."""
        out = block(hidden, **self.extras[i])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def through(self, block: torch.nn.Module, i: int, hidden: torch.Tensor) -> torch.Tensor:
        """`run` in parts of a few windows [n, L, d]."""
        return torch.cat([self.run(block, i, part) for part in hidden.split(batch_size(hidden))])

    @torch.no_grad()
    def advance(self, block: torch.nn.Module, i: int, hidden: torch.Tensor) -> None:
        """`through` in place."""
        for part in hidden.split(batch_size(hidden)):
            part.copy_(self.run(block, i, part))

    def logits(self, hidden: torch.Tensor, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits [B, L, vocabulary] of what the last block gives [B, L, d], with `vectors` in place of parameters so named."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with self.replaced(lambda i, _, __: hidden):
            return torch.func.functional_call(self.model, vectors, (tokens,), {"use_cache": False}).logits


def batch_size(hidden: torch.Tensor) -> int:
    """Windows of `hidden` [n, L, d] that go through a block at a time."""
    return max(1, TOKENS // hidden.shape[1])


class _Seen(Exception):  # noqa: N818, no error: it ends a forward pass that has served its purpose
    pass


@torch.no_grad()
def input_stages(walk: Blocks, i: int, hidden: torch.Tensor) -> list[list[str]]:
    """Names of block i's Linear layers in order of use, those that read the same tensor together (q/k/v, gate/up)."""
    seen: list[tuple[torch.Tensor, list[str]]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for tensor, names in seen:
                if tensor is inputs[0]:
                    names.append(name)
                    return
            seen.append((inputs[0], [name]))

        return hook

    block = walk.blocks[i]
    linears = [(name, module) for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(record(name)) for name, module in linears]
    walk.run(block, i, hidden[:1])
    for hook in hooks:
        hook.remove()
    return [names for _, names in seen]


@torch.no_grad()
def visit_inputs(walk: Blocks, i: int, hidden: torch.Tensor, name: str, visit: Callable[[torch.Tensor], None]) -> None:
    """Call `visit` with the inputs [B, L, K] of block i's Linear layer `name`, a few windows of hidden [n, L, d] at a time."""

    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        visit(inputs[0])
        raise _Seen

    handle = walk.blocks[i].get_submodule(name).register_forward_pre_hook(hook)
    try:
        for part in hidden.split(batch_size(hidden)):
            with contextlib.suppress(_Seen):
                walk.run(walk.blocks[i], i, part)
    finally:
        handle.remove()
