"""Reading a prompt: the fast engine's step for many tokens of one sequence, in chunks. Beyond the cache, memory grows with the
prompt by the mask of a chunk and, where heads share keys and values, by those of one layer, repeated.

Products are those for many rows of x (weights dequantized, then an ordinary product), attention is torch's.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lutq.decode.reference import rotate

if TYPE_CHECKING:
    from lutq.decode.engine import Engine

CHUNK = 2048  # tokens


def prefill(engine: "Engine", sequence: int, ids: torch.Tensor) -> None:
    """Put a prompt's ids [T] into a sequence's cache, its last position into `position` and its logits into `logits`."""
    h = None
    for begin in range(0, ids.shape[0], CHUNK):
        h = read_chunk(engine, sequence, ids[begin : begin + CHUNK], begin)
    fill_logits(engine, h[-1:], engine.logits[sequence, None])
    engine.position[sequence] = ids.shape[0] - 1


def fill_logits(engine: "Engine", h: torch.Tensor, logits: torch.Tensor) -> None:
    """Fill logits [C, vocabulary] by the residual stream h [C, hidden] after the last block."""
    x = engine.x.new_empty(h.shape)
    engine.functions.norm(h, None, engine.weights.norm, x)
    engine.ranks.gather(engine.weights.head(x), logits)


def read_chunk(engine: "Engine", sequence: int, ids: torch.Tensor, begin: int) -> torch.Tensor:
    """The residual stream [C, hidden] of tokens [C] from `begin` on, after filling their place of the cache."""
    do, shape, weights = engine.functions, engine.shape, engine.weights
    C, end = ids.shape[0], begin + ids.shape[0]
    positions = torch.arange(begin, end, device=ids.device)
    h = torch.empty(C, shape.hidden, dtype=engine.h.dtype, device=ids.device)
    x, y = engine.x.new_empty(C, shape.hidden), None
    do.embed(ids.contiguous(), positions, weights.table, weights.learned, h)
    angles = engine.rotation and tuple(values[begin:end] for values in engine.rotation)
    for i, layer in enumerate(weights.layers):
        do.norm(h, y, layer.attention_norm, x)
        q, k, v = (part.unflatten(1, (-1, shape.head_size)) for part in layer.inward(x))
        if angles:
            q, k = (rotate(part, *angles).to(x.dtype) for part in (q, k))
        keys, values = engine.cache[i, :, sequence]
        keys[:, begin:end], values[:, begin:end] = k.transpose(0, 1), v.transpose(0, 1)
        y = layer.out(attend(q, keys[:, :end], values[:, :end], engine.scale))
        engine.ranks.sum(y)
        do.norm(h, y, layer.norm, x)
        up = layer.up(x)
        inner = x.new_empty(C, shape.own_inner)
        do.activation(shape.activation, up[0], up[1] if shape.gated else None, inner)
        y = layer.down(inner)
        engine.ranks.sum(y)
    h += y
    return h


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention [C, heads D] of q [C, heads, D] over keys and values [kv heads, end, D], the last C being theirs."""
    C, heads, D = q.shape
    kv_heads, end, _ = keys.shape
    shared = (kv_heads, heads // kv_heads, end, D)
    keys, values = (part[:, None].expand(shared).reshape(1, heads, end, D) for part in (keys, values))
    q, mask = q.transpose(0, 1)[None], None
    if end > C:
        mask = torch.ones(C, end, dtype=torch.bool, device=q.device).tril(end - C)
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y[0].transpose(0, 1).reshape(C, -1)
