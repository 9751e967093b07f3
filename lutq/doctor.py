"""`lutq doctor`: what this machine has, which kernels will run on it and why, and what to do about what is missing."""

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

import torch

from lutq.build import BUNDLED, cache_folder, fault, library_path, read_library, source_hash
from lutq.compiler import INSTALL, INSTALL_HOST, OLDEST, Compiler, find_compiler, host_compiler
from lutq.cpu import compiled
from lutq.errors import LutqError
from lutq.paths import shipped
from lutq.runtime import size

TOLERANCE = 0.01  # relative error of one product in fp16 against the reference


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use; memory in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int


def diagnose() -> tuple[list[str], bool]:
    """The lines of `lutq doctor`, and whether everything that this machine could do works. Compiles nothing."""
    compiler, host, found = find_compiler(), host_compiler(), gpus()
    driver = driver_cuda()
    lines = [line(package, version(package)) for package in ("lutq", "torch", "transformers")]
    lines[1] += f", built for CUDA {torch.version.cuda}" if torch.version.cuda else ", a CPU build"
    lines.insert(1, line("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"))
    remedies: list[str] = []
    for gpu in found:
        major, minor = gpu.capability
        lines.append(line(f"GPU {gpu.index}", f"{gpu.name}, compute capability {major}.{minor}, {size(gpu.memory)}"))
    unused = [] if found else unusable_gpus()
    if unused:
        lines.append(line("GPU", f"{', '.join(unused)}, which this torch cannot use"))
        remedies.append(
            "see why torch.cuda.is_available() is False: the NVIDIA driver may be too old for this torch"
            if torch.version.cuda
            else "install a CUDA build of torch: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        )
    elif not found:
        hidden = ", CUDA_VISIBLE_DEVICES hides all" if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else ""
        lines.append(line("GPU", f"none that torch can see{hidden}"))
    if driver:
        lines.append(line("driver", f"for CUDA {driver[0]}.{driver[1]} and older"))
    lines += [
        line("compiler", f"{compiler}" if compiler else "no nvcc found"),
        line("C++ compiler", host or "none found (g++)"),
        line("bundled", bundled_library()),
        line("cache", cached_libraries()),
    ]
    healthy = not unused
    for gpu in found:
        words, remedy = what_runs(gpu, compiler, host, driver)
        lines.append(line(f"runs on {gpu.index}", words))
        healthy = healthy and words.startswith("cuda kernels")
        if remedy and remedy not in remedies:
            remedies.append(remedy)
    words, remedy = what_runs_on_cpu(host)
    lines.append(line("runs on CPU", words))
    if remedy and remedy not in remedies:
        remedies.append(remedy)
    lines += [line("to do", remedy) for remedy in remedies] or [line("to do", "nothing")]
    return lines, healthy


def line(label: str, words: str) -> str:
    """One line of the report, in two columns."""
    return f"{label:13} {words}"


def version(package: str) -> str:
    """Version of an installed package, in words."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def gpus() -> list[Gpu]:
    """The GPUs that torch can use."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(index, properties.name, (properties.major, properties.minor), properties.total_memory))
    return found


def unusable_gpus() -> list[str]:
    """Names of the GPUs of nvidia-smi, asked when torch sees none; empty where CUDA_VISIBLE_DEVICES hides them on purpose."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError):  # a driver that does not work has no GPUs
        return []


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version of the installed NVIDIA driver, (13, 0); None without driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def bundled_library() -> str:
    """The library that came with lutq, in words."""
    found = read_library(shipped("kernels") / BUNDLED)
    if found is None:
        return "none (a wheel may carry one)"
    return f"{fault(found, source_hash(shipped('kernels'))) or 'valid'}, for {' '.join(found.archs)}"


def cached_libraries() -> str:
    """The libraries compiled on this machine for the present sources, in words."""
    folder = cache_folder()
    digest = source_hash(shipped("kernels"))
    records = filter(None, map(read_library, sorted(folder.glob("lutq_cuda-*.so"))))
    kept = [f"{found.path.name} for {' '.join(found.archs)}" for found in records if fault(found, digest) is None]
    return f"{folder}: {'; '.join(kept) or 'nothing compiled from these sources'}"


def what_runs(gpu: Gpu, compiler: Compiler | None, host: str | None, driver: tuple[int, int] | None) -> tuple[str, str | None]:
    """Which backend runs on a GPU and why, and what to do if it could be a faster one."""
    if gpu.capability < OLDEST:
        return f"reference: {library_path(gpu.capability)[1]}", "use a GPU of the Ampere generation or a newer one for speed"
    path, why = library_path(gpu.capability)
    if path is not None:
        error = try_kernels(gpu.index)
        if error is None:
            return f"cuda kernels: {why}; one product agrees with the reference", None
        remedy = "update the NVIDIA driver if it is older than the library's CUDA; otherwise report these lines as a bug"
        return f"--backend reference only: the CUDA library {why}, but it fails: {error}", remedy
    if compiler is None:
        return f"reference: {why}, and there is no compiler", INSTALL
    if host is None:
        return f"reference: {why}, and there is no C++ compiler", INSTALL_HOST
    if driver and compiler.version[0] > driver[0]:
        remedy = f"update the NVIDIA driver, or compile with CUDA {driver[0]}: CUDA_HOME=/path/to/it lutq build"
        return f"reference: the driver is too old for what {compiler} compiles", remedy
    return "cuda kernels: they will be compiled at first use, or now by `lutq build`", None


def what_runs_on_cpu(host: str | None) -> tuple[str, str | None]:
    """Which backend runs on the CPU and why, and what to do if it could be a faster one."""
    if compiled().is_file():
        return "cpu kernel: compiled earlier", None
    if host:
        return "cpu kernel: it will be compiled at first use, within seconds", None
    return "reference: unpacks each layer at every call, for there is no C++ compiler", INSTALL_HOST


def try_kernels(device: int | str) -> str | None:
    """Multiply once with the CUDA kernels and once with the reference; what went wrong, in words, or None."""
    import lutq.ops  # noqa: F401, registers the operator

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31, (3, 256, 16), dtype=torch.int32, generator=generator)
    scales = torch.rand(3, 256, 4, generator=generator).half()
    x = torch.randn(1, 512, generator=generator).half()
    try:
        x, codes, scales = (tensor.to(device) for tensor in (x, codes, scales))
        products = [torch.ops.lutq.linear(x, codes, scales, None, None, None, 128, "bcq", name) for name in ("cuda", "reference")]
        found, expected = (product.float() for product in products)
        difference = ((found - expected).norm() / expected.norm()).item()
    except (LutqError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return None if difference < TOLERANCE else f"a product differs from the reference by {difference:.1%}"
