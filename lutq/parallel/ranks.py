"""A process among those that share a model: its rank, and what all of them compute together.

Tensors on GPUs go through NCCL and can be captured, tensors on the CPU go through gloo.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from lutq.errors import LutqError
from lutq.runtime import resolve_device

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # which torchrun sets


class Ranks(NamedTuple):
    """Rank `rank` of `world`. Every call but on one rank waits for all, in the same order."""

    rank: int = 0
    world: int = 1

    def sum(self, y: torch.Tensor) -> None:
        """Replace y by its sum over the ranks, made in the dtype of y: the same bits on every rank."""
        if self.world > 1:
            dist.all_reduce(y)

    def gather(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """Fill whole [M, N] with everyone's part [M, ceil(N / world)] of its columns: the same bits on every rank."""
        if self.world == 1:
            whole.copy_(part)  # does nothing where they are one tensor
            return
        parts = part.new_empty(self.world, *part.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name in older torch
        gather(parts.flatten(0, 1), part)  # gloo takes no third dimension
        side_by_side(parts, whole)

    def agree(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        if self.world > 1:
            dist.broadcast(tensor, 0)

    def least(self, number: int) -> int:
        """The smallest of everyone's numbers."""
        if self.world == 1:
            return number
        found = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found.item())

    def same(self, make: Callable[[], str]) -> str:
        """A text that rank 0 alone makes, such as by reading its standard input."""
        if self.world == 1:
            return make()
        found = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
        return found[0]

    def decide(self, choice: bool) -> bool:
        """What rank 0 says: for decisions by a clock."""
        if self.world == 1:
            return choice
        found = torch.tensor([int(choice)], dtype=torch.int64)
        dist.broadcast(found, 0)
        return bool(found.item())


def side_by_side(parts: torch.Tensor, whole: torch.Tensor) -> None:
    """Fill whole [M, N] with parts [world, M, ceil(N / world)] of its columns. Where N is no multiple of `world`, the last parts
    begin before the end of those ahead (`share` of lutq/parallel/split.py), which count.
    """
    world, _, count = parts.shape
    repeated = [max(0, (rank + 1) * count - whole.shape[1]) for rank in range(world)]
    torch.cat([part[:, skip:] for part, skip in zip(parts, repeated, strict=True)], dim=1, out=whole)


ALONE = Ranks()
JOINED = [ALONE]  # what `current` says


def current() -> Ranks:
    """The ranks that this process has joined; `ALONE` for none."""
    return JOINED[0]


def launched() -> int:
    """Processes of the torchrun that started this one; 1 for none."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def join(device: str = "auto") -> Ranks:
    """Make one group of the processes of torchrun, each with the GPU of its local rank unless `device` is the CPU.

    Raises LutqError for a device of one process, for fewer GPUs than processes, and for more than one host.
    """
    world, rank, local = launched(), int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        raise LutqError("the processes are on several hosts: lutq takes the GPUs of one")
    if device not in ("auto", "cpu", "cuda"):
        raise LutqError(f"{world} processes have {world} devices: use --device auto, cuda or cpu, not {device!r}")
    has_gpu = device != "cpu" and torch.cuda.is_available()
    if has_gpu:
        count = torch.cuda.device_count()
        if world > count:  # on every rank, so that rank 0 says so
            raise LutqError(f"{world} processes take {world} GPUs and this host has {count}: torchrun --nproc-per-node {count}")
        torch.cuda.set_device(local)
    resolve_device(device)
    place = {"device_id": torch.device("cuda", local)} if has_gpu else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", **place)
    JOINED[0] = Ranks(rank, world)
    return JOINED[0]
