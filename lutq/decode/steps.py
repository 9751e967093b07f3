"""The functions of lutq/decode/reference.py by kernels/decode.cu and attention.cu: fp16 and bf16, on a GPU, capturable.

Kernels are launched on the current stream of the current device, each of them before the one ahead has ended (programmatic
dependent launch). Nothing is allocated except the workspace and inboxes.
"""

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lutq.cuda import DTYPES, FUNCTIONS, kernels, properties, start
from lutq.decode import reference
from lutq.decode.fusion import Fusion, Norm
from lutq.decode.products import Product, Result, Sums
from lutq.decode.shape import Shape
from lutq.launch import Gpu
from lutq.parallel.inboxes import Inboxes, InboxesArguments, connect
from lutq.parallel.ranks import Ranks

MOST_HIDDEN, MOST_HEAD, MOST_ROWS, MOST_CLUSTER, MOST_BATCH = 16384, 128, 4, 8, 16
BLOCKS = 3  # of attention that fit onto a processor
SHARE = 256  # numbers of a block of a norm, at least, where a cluster shares it
LONG = 512  # tokens of a block, from which on clusters share a context: to sum over them takes as long as some hundred tokens


class ResultArguments(ctypes.Structure):
    """`Result` of kernels/step.cuh."""

    _fields_ = (("data", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("stride", ctypes.c_int64), ("slabs", ctypes.c_int))


FIELDS = (ResultArguments, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float)


def structure(*names: str) -> tuple[tuple[str, Any], ...]:
    """Fields of a structure of the kernels in order: results, pointers, int64, int and float."""
    return tuple((name, kind) for some, kind in zip(names, FIELDS, strict=False) for name in some.split())


class EmbeddingArguments(ctypes.Structure):
    """`Embedding` of kernels/decode.cu."""

    _fields_ = structure("", "token position table learned h step", "", "M K dtype")


class NormArguments(ctypes.Structure):
    """`Norm` of kernels/decode.cu."""

    _fields_ = (*structure("y", "h weight bias x", "", "M K centered cluster dtype", "eps"), ("inboxes", InboxesArguments))


class ActivationArguments(ctypes.Structure):
    """`Activation` of kernels/decode.cu."""

    _fields_ = structure("gate up", "y", "", "M F function dtype")


class ChoiceArguments(ctypes.Structure):
    """`Choice` of kernels/decode.cu."""

    _fields_ = structure("", "logits token position", "last", "M vocabulary dtype")


class AttentionArguments(ctypes.Structure):
    """`Attention` of kernels/attention.cu."""

    _fields_ = structure(
        "q k v",
        "keys values y cosine sine position partial arrived",
        "",
        "M heads kv_heads D capacity rows cluster spread dtype ahead",
        "scale",
    )


class Plan(NamedTuple):
    """How attention is launched: heads of a block, and who share a context: `spread` clusters of `cluster` blocks."""

    rows: int
    cluster: int
    spread: int


def plan(batch: int, heads: int, kv_heads: int, capacity: int, gpu: Gpu) -> Plan:
    """As many blocks as a GPU holds at once, while each has 32 tokens of a full cache.

    More heads in a block read the cache less often from L2; fewer give more blocks.
    """
    group = heads // kv_heads
    most = MOST_CLUSTER if gpu.clusters else max(1, capacity // (BLOCKS * MOST_CLUSTER))
    divisors = [rows for rows in range(MOST_ROWS, 0, -1) if group % rows == 0]
    rows = next((r for r in divisors if batch * heads // r * most >= 0.9 * gpu.processors), divisors[-1])
    units = batch * heads // rows
    splits = max(1, min(BLOCKS * gpu.processors // units, -(-capacity // 32)))
    if not gpu.clusters:
        return Plan(rows, 1, splits)
    cluster = min(MOST_CLUSTER, 1 << (splits.bit_length() - 1))
    return Plan(rows, cluster, max(1, min(splits // cluster, capacity // (cluster * LONG))))


def shared_by(K: int, gpu: Gpu) -> int:
    """Blocks that share a row of K numbers of a norm which reads sums or those of several GPUs: a power of two."""
    return min(MOST_CLUSTER, 1 << max(K // SHARE, 1).bit_length() - 1) if gpu.clusters else 1


def cluster_of(y: Result | None, M: int, K: int, several: bool, gpu: Gpu) -> int:
    """Blocks that share a row of a norm. Those that wait for other GPUs must all run at once, beside whatever else does: where
    clusters take more than half of the processors, a block takes a row.
    """
    shared = shared_by(K, gpu)
    return shared if isinstance(y, Sums) or (several and 2 * M * shared <= gpu.processors) else 1


class Workspace(NamedTuple):
    """Of attention: its plan, partial sums (fp32) and counters (int32, 0 between launches)."""

    plan: Plan
    partial: torch.Tensor
    arrived: torch.Tensor


def address(tensor: torch.Tensor | None) -> int | None:
    """Of a tensor's data."""
    return None if tensor is None else tensor.data_ptr()


def result(y: Result | None) -> ResultArguments:
    """Of a product, finished or not. Rows may be apart, what is in a row not."""
    if y is None:
        return ResultArguments()
    if isinstance(y, Sums):
        return ResultArguments(address(y.slabs), address(y.bias), y.slabs.stride(0), y.slabs.shape[0])
    return ResultArguments(address(y), None, y.stride(0), 0)


class Kernels:
    """The kernels on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """Compiles the library where there is none. Raises LutqError where it cannot be had."""
        self.found, self.gpu, self.device, self.ahead = kernels(device), properties(device), device, False

    def reason(self, shape: Shape, dtype: torch.dtype, batch: int) -> str | None:
        """Why the kernels do not take a model, in words; None if they do."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"its kernels take float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if shape.head_size % 16 or shape.head_size > MOST_HEAD:
            return f"its attention takes heads of 16, 32, ... {MOST_HEAD} numbers, not {shape.head_size}"
        if shape.hidden % 8 or shape.own_inner % 8 or shape.hidden > MOST_HIDDEN:
            return f"its kernels take features in multiples of 8, {MOST_HIDDEN} at most"
        if batch > MOST_BATCH:
            return f"it takes {MOST_BATCH} sequences at most, not {batch}"
        return None

    def workspace(self, shape: Shape, batch: int, capacity: int, chosen: Plan | None = None) -> Workspace:
        """Memory for `attention`, launched as chosen."""
        chosen = chosen or plan(batch, shape.own_heads, shape.own_kv_heads, capacity, self.gpu)
        units = batch * shape.own_heads // chosen.rows
        results = units * chosen.spread * 3 * chosen.rows * shape.head_size if chosen.spread > 1 else 0
        partial = torch.empty(results, dtype=torch.float32, device=self.device)
        return Workspace(chosen, partial, torch.zeros(units * chosen.cluster, dtype=torch.int32, device=self.device))

    @contextlib.contextmanager
    def in_graph(self) -> Iterator[None]:
        """What a step is captured in. A graph of one step begins after the last has ended: attention may read the cache ahead."""
        self.ahead = True
        try:
            yield
        finally:
            self.ahead = False

    def multiply(self, product: Product, x: torch.Tensor, y: Result, fusion: Fusion | None = None) -> None:
        """See reference.py."""
        reference.multiply(product, x, y, fusion)

    def inboxes(self, ranks: Ranks) -> Inboxes | None:
        """Of these ranks: `norm` then sums y over them. None for ranks that are alone or cannot, which rank 0 says."""
        return connect(ranks, self.device, MOST_BATCH * MOST_HIDDEN) if ranks.world > 1 and dist.is_initialized() else None

    def embed(
        self,
        token: torch.Tensor,
        position: torch.Tensor,
        table: torch.Tensor,
        learned: torch.Tensor | None,
        h: torch.Tensor,
        step: torch.Tensor | None = None,
    ) -> None:
        """See reference.py. step: counter of `Inboxes`, which goes on by one."""
        tensors = (address(tensor) for tensor in (token, position, table, learned, h, step))
        start(self.found.lutq_embedding, EmbeddingArguments(*tensors, *h.shape, DTYPES[table.dtype]))

    def norm(self, h: torch.Tensor, y: Result | None, by: Norm, x: torch.Tensor, inboxes: InboxesArguments | None = None) -> None:
        """See reference.py. inboxes: `Inboxes.at` of this sum, by which y becomes that over the ranks."""
        tensors = (address(tensor) for tensor in (h, by.weight, by.bias, x))
        cluster = cluster_of(y, *x.shape, inboxes is not None, self.gpu)
        settings = (*x.shape, by.centered, cluster, DTYPES[x.dtype], by.eps)
        start(self.found.lutq_norm, NormArguments(result(y), *tensors, *settings, inboxes or InboxesArguments()))

    def attention(
        self,
        q: Result,
        k: Result,
        v: Result,
        cache: tuple[torch.Tensor, torch.Tensor],
        position: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        scale: float,
        y: torch.Tensor,
        work: Workspace,
    ) -> None:
        """See reference.py. Rows of q, k and v may be apart, their heads not."""
        M, kv_heads, capacity, D = cache[0].shape
        cosine, sine = rotation or (None, None)
        tensors = (*cache, y, cosine, sine, position, work.partial if work.partial.numel() else None, work.arrived)
        a = AttentionArguments(
            *(result(part) for part in (q, k, v)),
            *(address(tensor) for tensor in tensors),
            *(M, y.shape[1] // D, kv_heads, D, capacity, *work.plan, DTYPES[y.dtype], self.ahead),
            scale * math.log2(math.e),
        )
        start(self.found.lutq_attention, a)

    def activation(self, function: str, gate: Result, up: Result | None, y: torch.Tensor) -> None:
        """See reference.py. Rows of gate and up may be apart."""
        a = ActivationArguments(result(gate), result(up), address(y), *y.shape, FUNCTIONS[function], DTYPES[y.dtype])
        start(self.found.lutq_activation, a)

    def choose(self, logits: torch.Tensor, token: torch.Tensor, position: torch.Tensor, last: int) -> None:
        """See reference.py."""
        tensors = (address(tensor) for tensor in (logits, token, position))
        start(self.found.lutq_choice, ChoiceArguments(*tensors, last, *logits.shape, DTYPES[logits.dtype]))
