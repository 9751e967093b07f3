"""Products y = x W^T + bias into given memory, and several with the same x joined into one without a second copy of W.

Layers in kernel order (lutq/prepack.py) lie in panels of 64 rows: where all but the last have a multiple of 64 outputs, the
panels of all of them one after the other are one layer. The layers keep slices of the joint tensor, so state dicts stay as they
are. Linear layers are joined in the same way by rows.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.linear import LutLinear
from lutq.prepack import PANEL


class Product(Protocol):
    """A product with N outputs and K inputs; `nbytes` of weights."""

    N: int
    K: int
    nbytes: int

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Fill y [M, N] from x [M, K], both contiguous and M small."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A new y [M, N] from x [M, K], M of any size."""


class Dense:
    """With W [N, K] as it is, by cuBLAS on a GPU. x and y have the dtype of W."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.N, self.K = weight.shape
        self.nbytes = weight.nbytes + (bias.nbytes if bias is not None else 0)

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """See Product."""
        if self.bias is None:
            torch.mm(x, self.weight.T, out=y)
        else:
            torch.addmm(self.bias, x, self.weight.T, out=y)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See Product."""
        return F.linear(x, self.weight, self.bias)


class Packed:
    """With W in kernel order, by lutq's CUDA kernels: codes int32 [P, U, 4, 128 b], records uint8 [P, G', 4, bytes]."""

    def __init__(
        self,
        codes: torch.Tensor,
        records: torch.Tensor,
        wide: bool,
        bias: torch.Tensor | None,
        N: int,
        K: int,
        layer: LayerConfig,
    ) -> None:
        from lutq.cuda import Prepacked

        self.ready, self.bias, self.N, self.K, self.layer = Prepacked(codes, records, wide), bias, N, K, layer
        self.nbytes = codes.nbytes + records.nbytes + (bias.nbytes if bias is not None else 0)

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """See Product. Allocates nothing where K is a multiple of 8 and the weights fit into fp16."""
        from lutq.cuda import fits_packed, multiply_dense, multiply_packed

        multiply = multiply_packed if fits_packed(self.ready, self.layer) else multiply_dense
        multiply(x, self.ready, self.bias, y, self.layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See Product."""
        from lutq.cuda import multiply

        return multiply(x, self.ready, self.bias, self.N, self.layer)


class Module:
    """By a module's own forward: what is neither a Linear layer nor in kernel order."""

    def __init__(self, module: LutLinear) -> None:
        self.module, self.N, self.K = module, module.out_features, module.in_features
        self.nbytes = sum(tensor.nbytes for tensor in (*module.buffers(), *module.parameters()))

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """See Product."""
        y.copy_(self.module(x))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See Product."""
        return self.module(x)


def product_of(module: torch.nn.Module) -> Product:
    """The product that a layer computes."""
    if isinstance(module, LutLinear):
        if module.prepack():
            bias = None if module.bias is None else module.bias.detach()
            tensors = (module.kernel_codes, module.kernel_records, module.wide, bias)
            return Packed(*tensors, module.out_features, module.in_features, module.layer)
        return Module(module)
    return Dense(module.weight.detach(), None if module.bias is None else module.bias.detach())


def adjacent(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors concatenated along their first dimension: a view where they lie one after the other, else a copy."""
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and tensor.is_contiguous() and tensor.storage_offset() == end):
            return torch.cat(list(tensors))
        end += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def slices(joint: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Where the tensors are in what `adjacent` made of them."""
    return list(joint.split([tensor.shape[0] for tensor in tensors]))


def joint_bias(modules: Sequence[torch.nn.Module]) -> torch.Tensor | None:
    """The biases of layers in a row, 0 where one has none; None where none has."""
    if all(module.bias is None for module in modules):
        return None
    like = next(module.bias for module in modules if module.bias is not None)
    return torch.cat([like.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in modules])


def join_packed(modules: Sequence[LutLinear]) -> Packed | None:
    """One product of layers in kernel order, which become slices of it; None where they do not fit together."""
    first = modules[0]
    if any(m.out_features % PANEL for m in modules[:-1]) or any(
        (m.layer, m.in_features) != (first.layer, first.in_features) for m in modules
    ):
        return None
    joint = []
    for name in ("kernel_codes", "kernel_records"):
        parts = [getattr(module, name) for module in modules]
        joint.append(adjacent(parts))
        for module, part in zip(modules, slices(joint[-1], parts), strict=True):
            setattr(module, name, part)
    N, wide = sum(module.out_features for module in modules), any(module.wide for module in modules)
    return Packed(*joint, wide, joint_bias(modules), N, first.in_features, first.layer)


def join_dense(modules: Sequence[torch.nn.Linear]) -> Dense:
    """One product of Linear layers, whose weights become slices of it."""
    weights = [module.weight.detach() for module in modules]
    joint = adjacent(weights)
    for module, part in zip(modules, slices(joint, weights), strict=True):
        module.weight = torch.nn.Parameter(part, requires_grad=False)
    return Dense(joint, joint_bias(modules))


def join(modules: Sequence[torch.nn.Module]) -> list[Product]:
    """Products for layers with the same x: one for all where possible, otherwise one each."""
    joint: Product | None = None
    if len(modules) > 1 and all(isinstance(module, LutLinear) and module.prepack() for module in modules):
        joint = join_packed(modules)
    elif len(modules) > 1 and all(type(module) is torch.nn.Linear for module in modules):
        joint = join_dense(modules)
    return [product_of(module) for module in modules] if joint is None else [joint]


class Parts:
    """The results of several layers with the same x [M, K]: `sizes` outputs each, by one product or by one per layer."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.sizes = [module.out_features for module in modules]
        self.products = join(modules)
        self.nbytes = sum(product.nbytes for product in self.products)

    def place(self, memory: torch.Tensor, M: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Outputs of the products, contiguous [M, N] in flat memory, and the parts [M, size], which may be slices of them."""
        outputs, begin = [], 0
        for product in self.products:
            outputs.append(memory[begin : begin + M * product.N].view(M, product.N))
            begin += M * product.N
        return outputs, self.split(outputs)

    def split(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The parts [M, size] of the outputs."""
        return list(outputs[0].split(self.sizes, dim=1)) if len(outputs) == 1 else outputs

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The parts as new tensors, for M of any size."""
        return self.split([product(x) for product in self.products])
