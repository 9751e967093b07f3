"""The last calibrated stage of `lutq quantize`: the whole quantized model is tuned to the original's next-token distribution."""

import contextlib
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from lutq.blocks import Blocks
from lutq.config import QuantConfig
from lutq.refine import Tuner, divergence
from lutq.runtime import progress_interval
from lutq.store import Store
from lutq.tunable import run_at, store_rounded


def distill(
    walk: Blocks, windows: torch.Tensor, original: torch.Tensor, config: QuantConfig, store: Store
) -> dict[int, tuple[float, float]]:
    """Tune the whole quantized model, at each of its precisions in turn, to the logits that follow from `original` [n, L, d],
    the original blocks' output for `windows` int64 [n, L].

    Returns, for each precision, the divergence on held-out windows before and after, nats per token. `store` keeps each epoch.
    """
    kept = {name: p.detach().clone() for name, p in walk.model.named_parameters() if p.dim() == 1}

    def forward(i: int, hidden: torch.Tensor, extras: dict[str, Any]) -> torch.Tensor:
        block = walk.blocks[i]  # makes its activations anew in the backward pass
        return checkpoint(type(block).forward, block, hidden, use_reentrant=False, **extras)

    def loss(numbers: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = walk.logits(original[numbers], kept)
        with walk.replaced(forward) if walk.device.type == "cuda" else contextlib.nullcontext():
            return divergence(walk.model(windows[numbers].to(walk.device), use_cache=False).logits, wanted)

    figures = {}
    for bits in config.precisions:
        run_at(walk.model, bits)
        tuner = Tuner(walk.model, loss, len(windows), windows.shape[1], config.distill, config.rate, config.seed)
        state = store.load(f"distill-{bits}")
        if state:
            tuner.restore(state)
        with tqdm(total=config.distill * len(tuner.learned), unit="window", mininterval=progress_interval()) as bar:
            bar.update(tuner.epoch * len(tuner.learned))
            while tuner.epoch < config.distill:
                for step in tuner.run_epoch():
                    bar.update(min(tuner.batch, len(tuner.learned)))
                    bar.set_postfix(divergence=f"{step:.4f}", refresh=False)
                words = f"divergence{config.at(bits)} {tuner.first:.4f} -> {tuner.best_loss:.4f}"
                bar.set_description(words, refresh=False)
                store.save(f"distill-{bits}", tuner.state())
        tuner.finish()
        figures[bits] = tuner.first, tuner.best_loss
    store_rounded(walk.model)
    return figures
