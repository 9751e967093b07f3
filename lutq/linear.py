"""`LutLinear`: an nn.Linear whose weight stays packed.

On a GPU the kernels want their own order (lutq/prepack.py). The first product there, or `prepack`, puts the module into it
and drops the canonical tensors; its state dict, and moving it elsewhere, bring them back bit for bit.
"""

from collections.abc import Callable
from typing import Any

import torch

from lutq.config import LayerConfig
from lutq.errors import LutqError
from lutq.ops import choose_backend, working_backend
from lutq.pack import OWN, Corrected, EightBit, Packed, Stored, from_tensors, highest, stored_shapes, to_tensors, weight
from lutq.residual import Residual, product


class LutLinear(torch.nn.Module):
    """y = x W^T + bias with W [N, K] packed as in lutq/pack.py; x [..., K] in fp16, bf16 or fp32.

    What corrects the planes (lutq/residual.py), if anything does, is added by ordinary operations, whatever the backend.
    The tensors of a checkpoint are buffers and keep their dtype when the module is moved or cast; only `bias` follows a cast.
    Scales in 8 bits become fp16 for each product of the reference, and once and for all in kernel order.
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
        self.layer, self.wide, self._backend = layer, False, "auto"
        shapes = stored_shapes(out_features, in_features, layer)
        for name in OWN:
            tensor = None
            if name in shapes:
                shape, dtype = shapes[name]
                tensor = torch.empty(shape, dtype=dtype, device=device)
            self.register_buffer(name, tensor)
        self.register_buffer("kernel_codes", None, persistent=False)
        self.register_buffer("kernel_records", None, persistent=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_packed(cls, packed: Stored, in_features: int, layer: LayerConfig, bias: torch.Tensor | None = None) -> "LutLinear":
        """A layer that holds `packed`, of one precision, of `in_features` inputs."""
        parameter = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        module = cls(in_features, highest(packed).codes.shape[1], layer, parameter, device="meta")
        for name, tensor in to_tensors(packed).items():
            setattr(module, name, tensor)
        return module

    @property
    def backend(self) -> str:
        """The backend asked for, see lutq/ops.py. A new one takes effect at the next product."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self.unpack()
        self._backend = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., K] to y [..., N]. Raises LutqError for an x of another width."""
        if x.shape[-1] != self.in_features:
            raise LutqError(f"x has {x.shape[-1]} features and this layer takes {self.in_features}: check the model's config")
        if self.kernel_codes is None and not torch.compiler.is_compiling():
            self.prepack()
        y = self._multiply(x)
        return (y + product(x, self.residual)).to(y.dtype) if self.layer.corrected else y

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the planes, and the bias."""
        if self.kernel_codes is not None:
            bits, group, grid, offsets = self.layer[:4]
            tensors = (self.kernel_codes, self.kernel_records, self.bias)
            return torch.ops.lutq.linear_prepacked(x, *tensors, self.out_features, bits, group, grid, offsets, self.wide)
        return torch.ops.lutq.linear(x, *self.packed(), self.bias, self.layer.group, self.layer.grid, self.backend)

    def prepack(self) -> bool:
        """Put the layer into kernel order if its backend wants that, and say whether it is in it.

        Compiles the kernels where there are none yet. Not inside CUDA-graph capture: raises LutqError there.
        """
        if self.kernel_codes is not None:
            return True
        if self.is_offloaded():
            return False
        if self.codes.device.type != "cuda" or self.backend == "reference":
            return False
        if torch.cuda.is_current_stream_capturing():
            raise LutqError("a LutLinear was first used inside CUDA-graph capture: call prepack() or the model once before")
        if working_backend(self.backend, self.codes.device) != "cuda":
            return False
        from lutq.cuda import prepack

        self.kernel_codes, self.kernel_records, self.wide = prepack(self.packed(), self.layer)
        for name in Packed._fields:
            self._buffers[name] = None
        return True

    def is_offloaded(self) -> bool:
        """Whether accelerate moves the canonical tensors in for every product and out again, and so needs them."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))

    def packed(self) -> Packed:
        """The canonical tensors, scales and offsets in fp16: the buffers, or made from the kernel order."""
        if self.kernel_codes is None:
            if self.scale_units is None:
                return Packed(self.codes, self.scales, self.offsets, self.zero_points)
            return highest(from_tensors({name: tensor for name, tensor in self._buffers.items() if tensor is not None}))
        from lutq.cuda import canonical

        return canonical(self.kernel_codes, self.kernel_records, self.out_features, self.in_features, self.layer)

    @property
    def residual(self) -> Residual:
        """The corrections; without any tensor where the layer has none."""
        return Residual(*(self._buffers[name] for name in Residual._fields))

    def stored(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of what a checkpoint holds of the planes, made from the kernel order."""
        packed = self.packed()
        return to_tensors(packed if self.scale_units is None else EightBit(packed, self.scale_units, self.offset_units))

    def unpack(self) -> None:
        """Leave the kernel order: the canonical tensors are buffers again."""
        if self.kernel_codes is not None:
            self._buffers |= self.stored()
            self.kernel_codes = self.kernel_records = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as `dtype` [N, K]."""
        packed = Corrected(self.packed(), self.residual) if self.layer.corrected else self.packed()
        return weight(packed, self.layer, self.in_features, dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel_codes is not None:
            destination |= {prefix + name: tensor for name, tensor in self.stored().items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        settings = ", ".join(f"{key}={value}" for key, value in self.layer.to_dict().items())
        return f"{self.in_features}, {self.out_features}, {settings}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.unpack()
        # fp16 scales must survive model.to(bfloat16): shown to `fn` as integers, they are moved and never cast
        floats = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and tensor.is_floating_point()}
        for name, tensor in floats.items():
            self._buffers[name] = tensor.view(torch.int16)
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, tensor in floats.items():
                self._buffers[name] = self._buffers[name].view(tensor.dtype)


def backend_of(model: torch.nn.Module) -> str:
    """The backend that runs a model's quantized layers, or `torch` for a model without any."""
    layer = next((module for module in model.modules() if isinstance(module, LutLinear)), None)
    if layer is None:
        return "torch"
    return "cuda" if layer.kernel_codes is not None else choose_backend(layer.backend, layer.codes.device)[0]
