"""`OrderedLinear`: a LutLinear whose packed columns are in an order of their own.

Layers quantized in activation order (GPTQ's `desc_act`) have inputs of a group apart. `lutq convert` sorts their columns by
group and stores where each came from; the inputs are put into that order before every product, which takes a kernel more.
"""

from typing import Any

import torch

from lutq.linear import LutLinear


class OrderedLinear(LutLinear):
    """Column j of the packed matrix belongs to input `input_order[j]`, a permutation int32 [K]. Otherwise as LutLinear."""

    def __init__(self, in_features: int, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> None:
        """An unfilled layer, its tensors on `device`; arguments as of LutLinear."""
        super().__init__(in_features, *args, device=device, **kwargs)
        self.register_buffer("input_order", torch.empty(in_features, dtype=torch.int32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., K] to y [..., N]. Raises LutqError for an x of another width."""
        if x.shape[-1] == self.in_features:
            x = x.index_select(-1, self.input_order)
        return super().forward(x)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as `dtype` [N, K], its columns in the order of the inputs."""
        return super().dequantize(dtype)[:, self.input_order.long().argsort()]
