"""What the kernels of kernels/decode.cu and attention.cu compute, in torch, on any device: their oracle, and the CPU's engine.

The functions have the signatures of `lutq.decode.steps.Kernels`, an engine takes either. They fill tensors given to them. M is
rows: sequences, or tokens of a prompt. h, the residual stream, is fp32; other numbers have the model's dtype and are computed
with in fp32 (fp64 stays fp64). The results of products may be unfinished (`Sums`).
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from lutq.decode.fusion import Fusion, Norm
from lutq.decode.products import Product, Result, Sums
from lutq.decode.shape import Shape
from lutq.parallel.ranks import Ranks

FUNCTIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def wide(x: torch.Tensor) -> torch.Tensor:
    """The numbers in fp32, or in fp64 if they are."""
    return x if x.dtype == torch.float64 else x.float()


def reason(shape: Shape, dtype: torch.dtype, batch: int) -> str | None:
    """Why these functions do not do for a model: they always do."""
    return None


def inboxes(ranks: Ranks) -> Any:
    """What sums over ranks inside `norm` want: none here, so neither `embed` nor `norm` is given any."""
    return None


def workspace(shape: Shape, batch: int, capacity: int) -> Any:
    """Memory that `attention` wants: none."""
    return None


def in_graph() -> Any:
    """What a step is captured in: nothing special."""
    return contextlib.nullcontext()


def finished(y: Result) -> torch.Tensor:
    """The result of a product; one that was not finished is fp32."""
    return y.finished() if isinstance(y, Sums) else y


def multiply(product: Product, x: torch.Tensor, y: Result, fusion: Fusion | None = None) -> None:
    """Fill y [M, N] = x [M, K] W^T + bias, or its sums, or, for products that can (`Product.fuses`), what `fusion` says."""
    if fusion is not None:
        product.fused_into(x, y, fusion)
    elif isinstance(y, Sums):
        product.sums_into(x, y.memory())
    else:
        product.into(x, y)


def embed(
    token: torch.Tensor,
    position: torch.Tensor,
    table: torch.Tensor,
    learned: torch.Tensor | None,
    h: torch.Tensor,
    step: None = None,
) -> None:
    """Fill h [M, K] = table[token] + learned[position]. token, position [M] int64; table [V, K]; learned [positions, K]."""
    h.copy_(table[token] if learned is None else wide(table[token]) + learned[position])


def fused(product: Product, x: torch.Tensor, y: torch.Tensor, fusion: Fusion) -> None:
    """What `Packed.fused_into` computes, by the product alone, in the dtype that it computes in."""
    v = wide(product(x if fusion.norm is None else normalized(x, fusion.norm)))
    v, by = v.chunk(2, -1) if fusion.gated else (v, 1)
    v = by * (v if fusion.function is None else FUNCTIONS[fusion.function](v))
    y.copy_(y + v if fusion.add else v)


def normalized(h: torch.Tensor, by: Norm) -> torch.Tensor:
    """The norm of h [M, K], as wide."""
    v = wide(h)
    if by.centered:
        v = v - v.mean(-1, keepdim=True)
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + by.eps) * by.weight
    return v if by.bias is None else v + by.bias


def norm(h: torch.Tensor, y: Result | None, by: Norm, x: torch.Tensor, inboxes: None = None) -> None:
    """Add y to h, and fill x with the norm of h. h [M, K] fp32, y and x [M, K]."""
    if y is not None:
        h += finished(y)
    x.copy_(normalized(h, by))


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [..., heads, D] by cosine and sine [..., D / 2] (arXiv 2104.09864, halves as in LLaMA): fp32."""
    first, second = wide(x).chunk(2, -1)
    c, s = cosine.unsqueeze(-2), sine.unsqueeze(-2)
    return torch.cat([first * c - second * s, second * c + first * s], -1)


def attention(
    q: Result,
    k: Result,
    v: Result,
    cache: tuple[torch.Tensor, torch.Tensor],
    position: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    y: torch.Tensor,
    work: Any = None,
) -> None:
    """Append k and v to the cache at `position`, then y = softmax(scale q k^T) v over all up to there.

    q [M, heads, D]; k, v [M, kv heads, D]; cache: keys and values [M, kv heads, capacity, D] each; position [M] int64;
    rotation: cosine and sine [capacity, D / 2]; y [M, heads D].
    """
    q, k, v = finished(q), finished(k), finished(v)
    M, heads, D = q.shape
    kv_heads = k.shape[1]
    if rotation is not None:
        angles = rotation[0][position], rotation[1][position]
        q, k = rotate(q, *angles), rotate(k, *angles)
    rows = torch.arange(M, device=q.device)
    keys, values = cache
    keys[rows, :, position] = k.to(keys.dtype)
    values[rows, :, position] = v.to(values.dtype)
    grouped = wide(q).view(M, kv_heads, heads // kv_heads, D)
    scores = scale * torch.einsum("mgrd,mgtd->mgrt", grouped, wide(keys))
    past = torch.arange(keys.shape[2], device=q.device) > position[:, None, None, None]
    weights = scores.masked_fill(past, -torch.inf).softmax(-1)
    mixed = torch.einsum("mgrt,mgtd->mgrd", weights, wide(values).masked_fill(past.transpose(2, 3), 0))
    y.copy_(mixed.reshape(M, heads * D))


def activation(function: str, gate: Result, up: Result | None, y: torch.Tensor) -> None:
    """Fill y with f(gate) * up, or f(gate). All [M, F]."""
    v = FUNCTIONS[function](wide(finished(gate)))
    y.copy_(v if up is None else v * finished(up))


def choose(logits: torch.Tensor, token: torch.Tensor, position: torch.Tensor, last: int) -> None:
    """Fill token [M] with the first of the largest of logits [M, V]; position [M] goes on by one, up to `last`."""
    top = logits.amax(-1, keepdim=True)
    token.copy_((logits == top).int().argmax(-1))
    position.add_(1).clamp_(max=last)
