"""`LutLinear`: an nn.Linear whose weight stays packed."""

from collections.abc import Callable
from typing import Any

import torch

import lutq.ops  # noqa: F401, defines torch.ops.lutq.linear
from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.pack import Packed, dequantize, packed_shapes


class LutLinear(torch.nn.Module):
    """y = x W^T + bias with W [N, K] packed as in lutq/pack.py; x [..., K] in fp16, bf16 or fp32.

    The packed tensors are buffers and keep their dtype when the module is moved or cast; only `bias` follows a cast.
    K and N are called `in_features` and `out_features`, as in nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layer: LayerConfig,
        bias: torch.nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An unfilled layer, its tensors on `device`."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layer, self.backend = layer, "auto"
        shapes = packed_shapes(out_features, in_features, layer)
        for name in Packed._fields:
            tensor = None
            if name in shapes:
                shape, dtype = shapes[name]
                tensor = torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, tensor)
        self.register_parameter("bias", bias)

    @classmethod
    def from_packed(cls, packed: Packed, in_features: int, layer: LayerConfig, bias: torch.Tensor | None = None) -> "LutLinear":
        """A layer that holds `packed`, of `in_features` inputs."""
        parameter = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        module = cls(in_features, packed.codes.shape[1], layer, parameter, device="meta")
        for name, tensor in packed._asdict().items():
            setattr(module, name, tensor)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., K] to y [..., N]. Raises LutqError for an x of another width."""
        if x.shape[-1] != self.in_features:
            raise LutqError(f"x has {x.shape[-1]} features and this layer takes {self.in_features}: check the model's config")
        tensors = (self.codes, self.scales, self.offsets, self.zero_points, self.bias)
        return torch.ops.lutq.linear(x, *tensors, self.layer.group, self.layer.grid, self.backend)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as `dtype` [N, K]."""
        tensors = (self.codes, self.scales, self.offsets, self.zero_points)
        return dequantize(*tensors, self.layer.group, self.layer.grid, self.in_features, dtype)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        settings = ", ".join(f"{key}={value}" for key, value in self.layer._asdict().items())
        return f"{self.in_features}, {self.out_features}, {settings}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # fp16 scales must survive model.to(bfloat16): shown to `fn` as integers, they are moved and never cast
        floats = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and tensor.is_floating_point()}
        for name, tensor in floats.items():
            self._buffers[name] = tensor.view(torch.int16)
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, tensor in floats.items():
                self._buffers[name] = self._buffers[name].view(tensor.dtype)
