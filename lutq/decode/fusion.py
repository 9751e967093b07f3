"""What a product of a decode step can do besides, so that it needs no kernel of its own."""

from typing import NamedTuple

import torch


class Norm(NamedTuple):
    """RMSNorm, or, if `centered`, LayerNorm. weight [K], bias [K] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centered: bool


class Fusion(NamedTuple):
    """y = f(norm(x) W^T + bias), of all that is named; `norm` is of an x in fp32, `function` one of lutq/decode/reference.py.

    gated: y [M, N / 2] is f(the first half of the outputs) times the second. add: y, fp32, is what it was plus that.
    """

    norm: Norm | None = None
    function: str | None = None
    gated: bool = False
    add: bool = False
