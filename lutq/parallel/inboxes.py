"""Sums over the ranks inside a kernel: memory of each GPU that all others write to (kernels/inbox.cuh says how).

For some ten kilobytes a collective takes many times as long as they do on their way. A kernel that reads y anyway can exchange it
as well, where GPUs reach each other's memory (NVLink, or PCIe if the driver allows it).
"""

import ctypes
import functools
import sys
from collections.abc import Sequence

import torch

from lutq.cuda import kernels
from lutq.parallel.ranks import Ranks

MOST_RANKS = 8  # of kernels/inbox.cuh
HANDLE = 64  # bytes of a cudaIpcMemHandle_t


class InboxesArguments(ctypes.Structure):
    """`Inboxes` of kernels/inbox.cuh."""

    _fields_ = (
        ("inbox", ctypes.c_void_p * MOST_RANKS),
        ("step", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("rank", "world", "turn", "most")),
    )


def inbox_bytes(world: int, most: int) -> int:
    """Of an inbox for sums of `most` numbers: two turns, of each sender a number and a flag."""
    return 2 * world * most * 8


class Inboxes:
    """A rank's view of them: the address of everyone's, and `step` int32 [1] on the GPU, which every step has to count on."""

    def __init__(self, addresses: Sequence[int], rank: int, most: int, device: torch.device) -> None:
        self.addresses, self.rank, self.most = addresses, rank, most
        self.step = torch.zeros(1, dtype=torch.int32, device=device)

    def at(self, turn: int) -> InboxesArguments:
        """What a kernel takes for a sum of the step: turns 0, 1, ... in this order, an even number of them, on all ranks."""
        inbox = (ctypes.c_void_p * MOST_RANKS)(*self.addresses)
        return InboxesArguments(inbox, self.step.data_ptr(), self.rank, len(self.addresses), turn, self.most)


def open_inboxes(found: ctypes.CDLL, ranks: Ranks, bytes_each: int) -> list[int | None]:
    """Make one on the current device and open those of the others; None for what the driver refuses. Called by all ranks."""
    handle = torch.zeros(1, HANDLE, dtype=torch.uint8)
    handles = torch.zeros(1, ranks.world * HANDLE, dtype=torch.uint8)
    own = ctypes.c_void_p()
    failed = found.lutq_inbox_make(ctypes.c_int64(bytes_each), ctypes.byref(own), ctypes.c_void_p(handle.data_ptr()))
    ranks.gather(handle, handles)
    addresses: list[int | None] = []
    for rank in range(ranks.world):
        other = ctypes.c_void_p()
        if rank == ranks.rank:
            other = ctypes.c_void_p() if failed else own
        elif found.lutq_inbox_open(ctypes.c_void_p(handles.data_ptr() + rank * HANDLE), ctypes.byref(other)):
            other = ctypes.c_void_p()
        addresses.append(other.value)
    return addresses


@functools.cache
def connect(ranks: Ranks, device: torch.device, most: int) -> Inboxes | None:
    """The inboxes of the ranks for sums of up to `most` numbers, a multiple of 2^17; None, which rank 0 says, where not all GPUs
    reach all others. Called by all ranks.

    They stay until the process ends, for all engines: memory may not be freed while another process has it open.
    """
    addresses: list[int | None] = [None]
    if ranks.world <= MOST_RANKS:
        with torch.cuda.device(device):
            addresses = open_inboxes(kernels(device), ranks, inbox_bytes(ranks.world, most))
    if ranks.least(int(None not in addresses)):
        return Inboxes([address for address in addresses if address is not None], ranks.rank, most, device)
    if ranks.rank == 0:
        reason = "cannot all write to each other's memory" if ranks.world <= MOST_RANKS else f"are more than {MOST_RANKS}"
        print(
            f"lutq: the {ranks.world} GPUs {reason}: NCCL sums over them, which takes longer",
            file=sys.stderr,
            flush=True,
        )
    return None
