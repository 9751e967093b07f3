"""The `cpu` backend: products with packed weights on a CPU, by kernels/lut_cpu.cpp, which g++ compiles in seconds at first use.

Up to LIMIT rows of x are multiplied with the bit-planes themselves, more with W unpacked a slice at a time; in fp32 either way.
"""

import ctypes
import functools
import hashlib
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from lutq.build import MOVE_CACHE, UNFINISHED, cache_folder, locked, writing
from lutq.compiler import INSTALL_HOST, host_compiler
from lutq.errors import LutqError
from lutq.pack import CHUNK, Packed, group_size, words
from lutq.paths import shipped

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
LIMIT = 16  # rows of x; measured on a Xeon with AVX-512


class Weights(ctypes.Structure):
    """`Weights` of kernels/lut_cpu.cpp. `tensors` are those behind its addresses."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "offsets", "zero_points")),
        *((name, ctypes.c_int64) for name in ("N", "words", "groups", "group_words")),
        *((name, ctypes.c_int32) for name in ("bits", "uniform")),
    )


class Product(ctypes.Structure):
    """`Product` of kernels/lut_cpu.cpp."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "sums", "y")), ("M", ctypes.c_int64))


def source() -> Path:
    """The kernel's source."""
    return shipped("kernels") / "lut_cpu.cpp"


@functools.cache
def machine() -> str:
    """What this processor can do, in words: the kernel is compiled for that."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    can = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {can}"


def compiled() -> Path:
    """Where the library of the present source lies or will lie, in the cache of the CUDA kernels."""
    what = (source().read_bytes(), FLAGS, platform.system(), machine())
    return cache_folder() / f"lutq_cpu-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"


def no_kernel() -> str | None:
    """Why the kernel cannot run here, with the remedy; None if it can, as far as known without compiling."""
    if compiled().is_file() or host_compiler():
        return None
    return INSTALL_HOST


@functools.cache
def kernel() -> ctypes.CDLL:
    """The compiled kernel, compiled first if need be. Raises LutqError, with the remedy."""
    path = compiled()
    if not path.is_file():
        build(path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LutqError(f"{path} cannot be loaded ({error}): remove it, and it is compiled anew") from error
    library.lutq_cpu_multiply.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    library.lutq_cpu_dequantize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *3 * [ctypes.c_int64], ctypes.c_int]
    return library


def build(path: Path) -> None:
    """Compile the kernel to `path`, which appears when it is whole. Raises LutqError with the compiler's last words."""
    compiler = host_compiler()
    if compiler is None:
        raise LutqError(INSTALL_HOST)
    with writing(path.parent, MOVE_CACHE), locked(path.parent / "lock"):
        if path.is_file():  # another process was faster
            return
        print("lutq: compiling the CPU kernel, once (some seconds) ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent, ignore_cleanup_errors=True) as folder:
            made = Path(folder) / path.name
            command = [compiler, *FLAGS, "-o", str(made), str(source())]
            result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace")
            if result.returncode != 0 or not made.is_file():
                tail = "\n  ".join((result.stdout + result.stderr).strip().splitlines()[-15:])
                raise LutqError(f"the CPU kernel does not compile:\n  {tail}\ncommand: {' '.join(command)}")
            made.replace(path)


def weights(packed: Packed, group: int, grid: str, K: int) -> Weights:
    """Packed tensors as the kernel wants them."""
    bits, N, count = packed.codes.shape
    tensors = [None if tensor is None else tensor.contiguous() for tensor in packed]
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    groups, g = packed.scales.shape[-1], group_size(group, K)
    found = Weights(*pointers, N, count, groups, words(g), bits, int(grid == "uniform"))
    found.tensors = tensors  # which live as long
    return found


def multiply(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, group: int, grid: str) -> torch.Tensor:
    """The product x [..., K] W^T + bias -> [..., N] in the dtype of x, summed in fp32. Raises LutqError as `kernel`."""
    K, N = x.shape[-1], packed.codes.shape[1]
    w = weights(packed, group, grid, K)
    rows = x.reshape(-1, K).float()
    y = multiply_packed(rows, w) if len(rows) <= LIMIT else multiply_dense(rows, w)
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], N)


def multiply_packed(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """Of x fp32 [M, K] with the bit-planes themselves: fp32 [M, N]."""
    M, K = x.shape
    width, g = 32 * w.words, 32 * w.group_words
    padded = (x if width == K else F.pad(x, (0, width - K))).contiguous()
    whole = padded if width % g == 0 else F.pad(padded, (0, -width % g))
    sums = whole.unflatten(1, (-1, g)).sum(2)
    y = torch.empty(M, w.N)
    product = Product(padded.data_ptr(), sums.data_ptr(), y.data_ptr(), M)
    kernel().lutq_cpu_multiply(ctypes.byref(w), ctypes.byref(product), torch.get_num_threads())
    return y


def multiply_dense(x: torch.Tensor, w: Weights) -> torch.Tensor:
    """Of x fp32 [M, K] with W unpacked, CHUNK weights at a time: fp32 [M, N]."""
    M, K = x.shape
    y, step = torch.empty(M, w.N), max(1, CHUNK // max(K, 1))
    for begin in range(0, w.N, step):
        end = min(begin + step, w.N)
        part = torch.empty(end - begin, K)
        kernel().lutq_cpu_dequantize(ctypes.byref(w), part.data_ptr(), K, begin, end, torch.get_num_threads())
        y[:, begin:end] = x @ part.T
    return y
