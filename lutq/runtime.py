"""Devices, dtypes and memory: what the flags --device and --dtype mean, and what to say when memory runs out."""

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lutq.errors import LutqError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device of --device; None or `auto` is the current GPU when there is one, else the CPU. Raises LutqError."""
    if device is None or device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise LutqError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise LutqError(f"device {device!r} is not supported: use cpu, cuda or cuda:N")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise LutqError("no CUDA GPU is usable here: use --device cpu, or install a CUDA build of torch and its driver")
        index = torch.cuda.current_device() if found.index is None else found.index
        if index >= torch.cuda.device_count():
            raise LutqError(f"there is no {device}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0")
        found = torch.device("cuda", index)
    return found


def resolve_dtype(dtype: str | torch.dtype | None, auto: torch.dtype) -> torch.dtype:
    """The dtype of --dtype; None or "auto" is `auto`. Raises LutqError."""
    if dtype is None or dtype == "auto":
        return auto
    if isinstance(dtype, torch.dtype):
        dtype = dtype_name(dtype)
    if dtype not in DTYPES:
        raise LutqError(f"unknown dtype {dtype!r}: use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as --dtype and config.json spell it: `float16`, not `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or `CPU, N threads`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with Path("/proc/meminfo").open() as meminfo:
            available = next(line for line in meminfo if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> str:
    """Peak memory of this process so far, in words."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    words = f"{size(peak)} of host memory"
    if device.type == "cuda":
        words += f", {size(torch.cuda.max_memory_allocated(device))} of GPU memory"
    return words


def size(count: float) -> str:
    """Bytes in words: 1.50 GB, 9.01 MB (powers of ten)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


def progress_interval() -> float:
    """Seconds between redraws of a progress bar; a log file wants few lines."""
    return 0.1 if sys.stderr.isatty() else 10


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that host or GPU memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


@contextlib.contextmanager
def out_of_memory(explain: Callable[[], str], kind: type[LutqError] = LutqError) -> Iterator[None]:
    """Turn running out of memory inside the block into an error of a kind that says what `explain` says."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        gc.collect()
        raise kind(f"out of memory: {explain()}") from error
