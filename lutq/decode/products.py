"""Products y = x W^T + bias into given memory, and several with the same x joined into one without a second copy of W.

For one row of x a product may leave y unfinished (`Sums`): to finish it costs whoever reads it less.

Layers in kernel order (lutq/prepack.py) lie in panels of 64 rows: where all but the last have a multiple of 64 outputs, the
panels of all of them one after the other are one layer. The layers keep slices of the joint tensor, so state dicts stay as they
are. Linear layers are joined in the same way by rows.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from lutq.config import LayerConfig
from lutq.decode.fusion import Fusion
from lutq.linear import LutLinear
from lutq.prepack import PANEL, TILE


class Sums(NamedTuple):
    """A result [1, N] = slabs[0] + slabs[1] + ... + bias, in this order: slabs fp32 [S, N], bias [N] or None.

    Slabs are `padded(N)` numbers apart, of the N of a whole product. Parts are made as of the tensor that it stands for.
    """

    slabs: torch.Tensor
    bias: torch.Tensor | None

    def split(self, sizes: Sequence[int], dim: int) -> list["Sums"]:
        """See torch.split."""
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(list(sizes), dim - 1)
        return [Sums(*parts) for parts in zip(self.slabs.split(list(sizes), dim), biases, strict=True)]

    def unflatten(self, dim: int, sizes: Sequence[int]) -> "Sums":
        """See torch.unflatten."""
        bias = None if self.bias is None else self.bias.unflatten(dim - 1, sizes)
        return Sums(self.slabs.unflatten(dim, sizes), bias)

    def memory(self) -> torch.Tensor:
        """What a product fills, [S, padded(N)]."""
        stride = self.slabs.stride(0)
        return self.slabs.as_strided((self.slabs.shape[0], stride), (stride, 1))

    def finished(self) -> torch.Tensor:
        """The result, fp32."""
        total = self.slabs[0].clone()
        for slab in (*self.slabs[1:], *([] if self.bias is None else [self.bias])):
            total += slab
        return total[None]


Result = torch.Tensor | Sums


def padded(N: int) -> int:
    """Outputs from one slab to the next."""
    return -(-N // TILE) * TILE


class Product(Protocol):
    """A product with N outputs and K inputs; `nbytes` of weights; bias [N] or None."""

    N: int
    K: int
    nbytes: int
    bias: torch.Tensor | None

    def slabs(self, M: int, dtype: torch.dtype) -> int:
        """Slabs of K whose sums the product would rather leave for x [M, K], by `sums_into`; 0 where it finishes y."""

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Fill y [M, N] from x [M, K], both contiguous and M small."""

    def fuses(self, M: int, dtype: torch.dtype, fusion: Fusion) -> bool:
        """Whether `fused_into` does that for M rows of x of a model in dtype."""

    def fused_into(self, x: torch.Tensor, y: torch.Tensor, fusion: Fusion) -> None:
        """Fill y as `fusion` says from x [M, K], both contiguous."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """A new y [M, N] from x [M, K], M of any size."""


class Plain:
    """A product that is nothing but that, and finished."""

    def slabs(self, M: int, dtype: torch.dtype) -> int:
        """See Product."""
        return 0

    def fuses(self, M: int, dtype: torch.dtype, fusion: Fusion) -> bool:
        """See Product."""
        return False


class Dense(Plain):
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

    def fuses(self, M: int, dtype: torch.dtype, fusion: Fusion) -> bool:
        """See Product."""
        from lutq.cuda import fuses, properties

        norm, gpu = fusion.norm, properties(self.ready.codes.device)
        if M > 1 or dtype == torch.float32 or (norm and norm.bias is not None and not norm.centered):
            return False
        return fuses(self.ready, self.N, self.K, self.layer, gpu, norm is not None, fusion.gated)

    def fused_into(self, x: torch.Tensor, y: torch.Tensor, fusion: Fusion) -> None:
        """See Product."""
        from lutq.cuda import DTYPES, FUNCTIONS, FusionArguments, multiply_fused

        norm, function = fusion.norm, -1 if fusion.function is None else FUNCTIONS[fusion.function]
        a = FusionArguments(function=function, gated=fusion.gated, add=fusion.add)
        if norm is not None:
            a.weight, a.shift = norm.weight.data_ptr(), None if norm.bias is None else norm.bias.data_ptr()
            a.eps, a.centered, a.dtype = norm.eps, norm.centered, DTYPES[norm.weight.dtype]
        multiply_fused(x, self.ready, self.bias, y, self.N, self.layer, a)

    def slabs(self, M: int, dtype: torch.dtype) -> int:
        """See Product. 0 also for a bias that is not as the kernels read it: in the dtype of x, on 16 bytes."""
        from lutq.cuda import properties, sum_parts

        if M > 1 or (self.bias is not None and (self.bias.dtype != dtype or self.bias.data_ptr() % 16)):
            return 0
        return sum_parts(self.ready, self.N, self.K, self.layer, properties(self.ready.codes.device))

    def sums_into(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        """Fill sums [slabs, padded(N)] fp32, contiguous, from x [1, K]; bias is left out. Allocates as little as `into`."""
        from lutq.cuda import multiply_sums

        multiply_sums(x, self.ready, sums, self.N, self.layer)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See Product."""
        from lutq.cuda import multiply

        return multiply(x, self.ready, self.bias, self.N, self.layer)


class Module(Plain):
    """By a module's own forward: what is neither a Linear layer nor in kernel order, or is more than a product with planes and x
    as they are: corrected layers, those with inputs in another order, those of 8 bits.
    """

    def __init__(self, module: LutLinear) -> None:
        self.module, self.N, self.K, self.bias = module, module.out_features, module.in_features, module.bias
        self.nbytes = sum(tensor.nbytes for tensor in (*module.buffers(), *module.parameters()))

    def into(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """See Product."""
        y.copy_(self.module(x))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See Product."""
        return self.module(x)


def is_bare(module: torch.nn.Module) -> bool:
    """Whether a layer in kernel order, into which it is put, is all that there is to it."""
    return type(module) is LutLinear and module.prepack() and not module.layer.corrected and module.layer.bits <= 4


def product_of(module: torch.nn.Module) -> Product:
    """The product that a layer computes."""
    if isinstance(module, LutLinear):
        if is_bare(module):
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
    if len(modules) > 1 and all(is_bare(module) for module in modules):
        joint = join_packed(modules)
    elif len(modules) > 1 and all(type(module) is torch.nn.Linear for module in modules):
        joint = join_dense(modules)
    return [product_of(module) for module in modules] if joint is None else [joint]


def common_slabs(products: Sequence[Product], M: int, dtype: torch.dtype) -> int:
    """Slabs of products whose results are read together: 0 unless all leave as many."""
    found = {product.slabs(M, dtype) for product in products}
    return found.pop() if len(found) == 1 else 0


def place(products: Sequence[Product], slabs: int, M: int, memory: torch.Tensor) -> list[Result]:
    """Results one after the other in flat memory: contiguous [M, N], or, if there are slabs, Sums, the memory being fp32."""
    results: list[Result] = []
    for product in products:
        rows, width = (slabs, padded(product.N)) if slabs else (M, product.N)
        part, memory = memory[: rows * width].view(rows, width), memory[rows * width :]
        results.append(Sums(part[:, : product.N], product.bias) if slabs else part)
    return results


class Parts:
    """The results of several layers with the same x [M, K]: `sizes` outputs each, by one product or by one per layer."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        self.sizes = [module.out_features for module in modules]
        self.products = join(modules)
        self.nbytes = sum(product.nbytes for product in self.products)

    def split(self, outputs: list[Result]) -> list[Result]:
        """The parts [M, size] of the outputs, which may be slices of them."""
        return list(outputs[0].split(self.sizes, dim=1)) if len(outputs) == 1 else outputs

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The parts as new tensors, for M of any size."""
        return self.split([product(x) for product in self.products])
