"""`torch.ops.lutq.linear`: y = x W^T + bias with W in packed form (lutq/pack.py), defined once for every backend.

    lutq::linear(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? zero_points, Tensor? bias,
                 int group, str grid, str backend) -> Tensor

x [..., K] fp16, bf16 or fp32; y [..., N] in the dtype of x. `group` in inputs, 0 for one per row. `backend` is a name in
`BACKENDS`, or `auto` for the fastest that works where x lies. A fake kernel gives shapes to torch.compile and meta tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lutq.errors import LutqError
from lutq.pack import dequantize, words

library = torch.library.Library("lutq", "DEF")
library.define(
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? zero_points, Tensor? bias, "
    "int group, str grid, str backend='auto') -> Tensor"
)


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    grid: str,
) -> torch.Tensor:
    """Unpack this layer's weight in the dtype of x (fp32 arithmetic, rounded once), then an ordinary product.

    Works on every device and needs no compiler; it is the oracle of every other backend.
    """
    return F.linear(x, dequantize(codes, scales, offsets, zero_points, group, grid, x.shape[-1], x.dtype), bias)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"reference": reference}


def choose_backend(requested: str = "auto", device: str = "cpu") -> tuple[str, str]:
    """The backend that runs on a device type, and why, in words.

    Raises LutqError for a backend that does not exist.
    """
    if requested == "auto":
        return "reference", f"the only backend for {device} so far: unpacks each layer, then an ordinary matrix product"
    if requested not in BACKENDS:
        raise LutqError(f"unknown backend {requested!r}: use auto or {', '.join(BACKENDS)}")
    return requested, "as asked"


def check_width(x: torch.Tensor, codes: torch.Tensor) -> None:
    """Raise LutqError unless x has as many words of inputs as the codes; LutLinear knows K and checks it exactly."""
    if words(x.shape[-1]) != codes.shape[-1]:
        raise LutqError(
            f"x has {x.shape[-1]} features and the weight has {codes.shape[-1]} words of 32: check the model's config"
        )


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    group: int,
    grid: str,
    backend: str = "auto",
) -> torch.Tensor:
    """The operator's implementation: hand over to the chosen backend."""
    check_width(x, codes)
    name, _ = choose_backend(backend, x.device.type)
    return BACKENDS[name](x, codes, scales, offsets, zero_points, bias, group, grid)


def linear_shape(x: torch.Tensor, codes: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Fake kernel: the result's shape and dtype, without data."""
    check_width(x, codes)
    return x.new_empty(*x.shape[:-1], codes.shape[1])


library.impl("linear", linear, "CPU")
library.impl("linear", linear, "CUDA")
torch.library.register_fake("lutq::linear", linear_shape)
