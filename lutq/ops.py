"""The operators: y = x W^T + bias with W in packed form (lutq/pack.py), defined once for every backend.

    lutq::linear(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? zero_points, Tensor? bias,
                 int group, str grid, str backend) -> Tensor
    lutq::linear_prepacked(Tensor x, Tensor codes, Tensor records, Tensor? bias, int N, int bits, int group, str grid,
                           bool offsets, bool wide, ScalarType? dtype) -> Tensor

x [..., K] fp16, bf16 or fp32; y [..., N] in the dtype of x, or in `dtype`. `group` in inputs, 0 for one per row. `backend`
is a name in `BACKENDS`, or `auto` for the fastest that works where x lies. `linear_prepacked` takes a layer in the order of
the CUDA kernels (lutq/prepack.py) and is what LutLinear calls on a GPU; `linear` reorders at every call there. Fake kernels
give shapes to torch.compile and meta tensors.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.errors import LutqError, LutqWarning
from lutq.pack import Packed, dequantize, words

library = torch.library.Library("lutq", "DEF")
library.define(
    "linear(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, Tensor? zero_points, Tensor? bias, "
    "int group, str grid, str backend='auto') -> Tensor"
)
library.define(
    "linear_prepacked(Tensor x, Tensor codes, Tensor records, Tensor? bias, int N, int bits, int group, str grid, "
    "bool offsets, bool wide, ScalarType? dtype=None) -> Tensor"
)


def reference(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, group: int, grid: str) -> torch.Tensor:
    """Unpack this layer's weight in the dtype of x (fp32 arithmetic, rounded once), then an ordinary product.

    Works on every device and needs no compiler; it is the oracle of every other backend.
    """
    return F.linear(x, dequantize(*packed, group, grid, x.shape[-1], x.dtype), bias)


def cuda(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, group: int, grid: str) -> torch.Tensor:
    """The CUDA kernels. Reorders the weight at every call, so only LutLinear, which keeps it so, is fast."""
    from lutq.cuda import multiply, prepack

    layer = LayerConfig(packed.codes.shape[0], group, grid, packed.offsets is not None or packed.zero_points is not None)
    return multiply(x, prepack(packed, layer), bias, packed.codes.shape[1], layer)


def cpu(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, group: int, grid: str) -> torch.Tensor:
    """The CPU kernel, in fp32 whatever the dtype of x; an x of fp64 goes to the reference."""
    from lutq.cpu import multiply

    if x.dtype == torch.float64:
        return reference(x, packed, bias, group, grid)
    return multiply(x, packed, bias, group, grid)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"reference": reference, "cpu": cpu, "cuda": cuda}
REFERENCE = "unpacks each layer, then an ordinary matrix product"
KERNELS = {"cpu": "CPU kernel", "cuda": "CUDA kernels"}  # by the type of device, which is the name of their backend


def choose_backend(requested: str = "auto", device: str | torch.device = "cpu") -> tuple[str, str]:
    """The backend that runs on a device, and why, in words. Compiles nothing.

    Raises LutqError for a backend that does not exist or cannot run there.
    """
    if requested not in ("auto", *BACKENDS):
        raise LutqError(f"unknown backend {requested!r}: use auto or {', '.join(BACKENDS)}")
    place = torch.device(device)
    if requested == "reference":
        return requested, "as asked"
    if place.type != "cuda" and requested == "cuda":
        raise LutqError(f"backend 'cuda' needs a GPU and the device is {place}: use --device cuda, or --backend reference")
    if place.type != "cpu" and requested == "cpu":
        raise LutqError(f"backend 'cpu' needs the CPU and the device is {place}: use --device cpu, or leave --backend out")
    if place.type not in KERNELS:
        return "reference", f"the only backend for {place.type} so far: {REFERENCE}"
    problem = no_kernels(place)
    if problem is None:
        return place.type, "the fastest: products with the packed weights themselves" if requested == "auto" else "as asked"
    if requested == place.type:
        raise LutqError(f"the {KERNELS[place.type]} cannot run: {problem}")
    return "reference", f"{REFERENCE}, because the {KERNELS[place.type]} cannot run: {problem}"


def no_kernels(device: torch.device) -> str | None:
    """Why the kernels cannot run on a GPU or a CPU, with the remedy; None if they can, as far as known without compiling."""
    from lutq.build import library_path
    from lutq.compiler import OLDEST, find_compiler, host_compiler

    if device in failed:
        return failed[device]
    if device.type == "cpu":
        from lutq.cpu import no_kernel

        return no_kernel()
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    path, why = library_path(capability)
    if path is not None or (find_compiler() and host_compiler()):
        return None
    return f"{why}, and there is no compiler; pip install 'lutq[nvcc]' and a C++ compiler such as g++, then `lutq doctor`"


failed: dict[torch.device, str] = {}  # why the kernels do not work, by device, once that is known


@functools.cache
def working_backend(requested: str, device: torch.device) -> str:
    """The backend that a layer uses: `choose_backend`, and the kernels compiled, loaded and checked.

    `auto` warns once, with the remedy, and uses the reference where the kernels do not work; `cuda` and `cpu` raise LutqError.
    """
    name, why = choose_backend(requested, device)
    if name in KERNELS:
        from lutq.cpu import kernel
        from lutq.cuda import kernels

        try:
            kernels(device) if name == "cuda" else kernel()
        except LutqError as error:
            if requested == name:
                raise
            failed[device] = why = str(error)
            name = "reference"
    if name == "reference" and requested == "auto" and device.type in KERNELS:
        warnings.warn(f"lutq runs without its {KERNELS[device.type]}: {why}", LutqWarning, stacklevel=2)
    return name


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
    name = working_backend(backend, x.device)
    return BACKENDS[name](x, Packed(codes, scales, offsets, zero_points), bias, group, grid)


def linear_prepacked(
    x: torch.Tensor,
    codes: torch.Tensor,
    records: torch.Tensor,
    bias: torch.Tensor | None,
    N: int,
    bits: int,
    group: int,
    grid: str,
    offsets: bool,
    wide: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The operator's implementation on a GPU, see lutq/cuda.py."""
    from lutq.cuda import Prepacked, multiply

    return multiply(x, Prepacked(codes, records, wide), bias, N, LayerConfig(bits, group, grid, offsets), dtype)


def linear_shape(x: torch.Tensor, codes: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Fake kernel: the result's shape and dtype, without data."""
    check_width(x, codes)
    return x.new_empty(*x.shape[:-1], codes.shape[1])


def linear_prepacked_shape(
    x: torch.Tensor, codes: torch.Tensor, records: torch.Tensor, bias: torch.Tensor | None, N: int, *rest: Any, **named: Any
) -> torch.Tensor:
    """Fake kernel: the result's shape and dtype, without data."""
    dtype = named.get("dtype", rest[5] if len(rest) > 5 else None)
    return x.new_empty(*x.shape[:-1], N, dtype=dtype or x.dtype)


library.impl("linear", linear, "CPU")
library.impl("linear", linear, "CUDA")
library.impl("linear_prepacked", linear_prepacked, "CUDA")
torch.library.register_fake("lutq::linear", linear_shape)
torch.library.register_fake("lutq::linear_prepacked", linear_prepacked_shape)
