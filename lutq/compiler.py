"""The CUDA compiler: where nvcc is, how architectures are spelt for it, and what its log says of each kernel.

Architectures are spelt as NVIDIA does: `sm_80` is machine code for compute capability 8.0 and the later ones of its
generation, `compute_80` is PTX, which the driver translates for 8.0 and everything later.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lutq.errors import LutqError

DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# One library for every GPU: PTX of the oldest architecture runs on every later GPU, that of a newer one only on fewer.
FAT_ARCHS = (*DEFAULT_ARCHS, "compute_80")
OLDEST = (8, 0)
CLUSTERS = (9, 10, 12)  # generations on which products are launched in clusters of blocks: PTX for 8.0 cannot
ARCH = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)")
INSTALL = "pip install 'lutq[nvcc]', or install the CUDA toolkit (12.8 or newer) and put nvcc on PATH"
INSTALL_HOST = "nvcc and the CPU kernel need a C++ compiler, and there is no g++ on PATH: apt install g++, or dnf install gcc-c++"


@dataclass(frozen=True)
class Compiler:
    """An nvcc that runs: `version` is (13, 0), `text` what --version prints."""

    path: Path
    version: tuple[int, int]
    text: str

    def __str__(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]} ({self.path})"

    def library_flags(self) -> list[str]:
        """Where the static CUDA runtime is: nvcc of the 13.0 wheels looks in lib64, but they hold it in lib."""
        folder = self.path.parent.parent / "lib"
        return [f"-L{folder}"] if (folder / "libcudart_static.a").is_file() else []


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel, or of a function that it calls, on one architecture; everything but registers in bytes.

    `name` is mangled; `registers` is 0 for a called function, whose registers count with the kernel's.
    """

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0


def find_compiler() -> Compiler | None:
    """The first nvcc that runs: $CUDA_HOME, $CUDA_PATH, the nvidia-cuda-nvcc wheel, PATH, /usr/local/cuda."""
    for path in nvcc_paths():
        try:
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # not there, or not for this machine: the next may be
            continue
        if version := re.search(r"release (\d+)\.(\d+)", text):
            return Compiler(path, (int(version[1]), int(version[2])), text)
    return None


def nvcc_paths() -> Iterator[Path]:
    """Where nvcc may be, best first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    if found := shutil.which("nvcc"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")


def host_compiler() -> str | None:
    """The C++ compiler that nvcc calls: g++ on PATH, or what nvcc's own NVCC_CCBIN names. Needed for device code, too."""
    return shutil.which(os.environ.get("NVCC_CCBIN") or "g++")


def require_compiler(archs: Iterable[str]) -> Compiler:
    """The compiler, or a LutqError that says what to install to compile for these architectures."""
    compiler = find_compiler()
    if compiler is None:
        raise LutqError(f"there is no CUDA compiler (nvcc) to compile the kernels for {' '.join(archs)}: {INSTALL}")
    if host_compiler() is None:
        raise LutqError(INSTALL_HOST)
    return compiler


def parse_arch(arch: str) -> tuple[str, tuple[int, int], str]:
    """`sm_90a` -> ("sm", (9, 0), "a"). Raises LutqError for another spelling and for what the kernels do not run on."""
    found = ARCH.fullmatch(arch)
    if found is None:
        raise LutqError(f"unknown architecture {arch!r}: write {', '.join(DEFAULT_ARCHS)}, compute_80 for PTX, or all")
    kind, major, minor, suffix = found.groups()
    number = (int(major), int(minor))
    if number < OLDEST:
        raise LutqError(f"architecture {arch} is too old: the kernels need sm_80 or newer")
    if arch == "sm_90":
        suffix = "a"  # wgmma exists in 90a only; there is no other GPU of generation 9 that sm_90 would also run on
    return kind, number, suffix


def arch_flags(archs: Iterable[str]) -> list[str]:
    """What nvcc is told to compile for. Raises LutqError as `parse_arch`."""
    flags = []
    for kind, (major, minor), suffix in map(parse_arch, archs):
        number = f"{major}{minor}{suffix}"
        flags += ["-gencode", f"arch=compute_{number},code={kind}_{number}"]
    return flags


def native_arch(capability: tuple[int, int]) -> str:
    """Architecture of a GPU: (9, 0) -> sm_90."""
    return f"sm_{capability[0]}{capability[1]}"


def covers(archs: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code compiled for these architectures does on a GPU of this compute capability what lutq/cuda.py asks of it.

    It asks what machine code of the GPU's own generation has: 9.0 wants sm_90, and clusters (`CLUSTERS`) want no older PTX.
    """
    for kind, number, suffix in map(parse_arch, archs):
        if kind == "sm":
            fits = number[0] == capability[0]
        else:
            fits = capability[0] not in CLUSTERS or (number >= (9, 0) and capability != (9, 0))
        if fits and (number == capability or (suffix != "a" and number < capability)):
            return True
    return False


def resources(log: str) -> list[Kernel]:
    """What `-Xptxas -v` printed, one record per kernel and architecture, in the order of the log."""
    records: list[Kernel] = []
    entry = 0  # the kernel that `Used N registers` is about: functions that it calls may be listed in between
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            entry = len(records)
            records.append(Kernel(found[1], found[2]))
        elif not records:
            continue
        elif (found := re.search(r"Function properties for (\S+)", line)) and found[1] != records[-1].name:
            records.append(Kernel(found[1], records[entry].arch))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            records[-1] = replace(records[-1], stack=stack, spill_stores=stores, spill_loads=loads)
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            records[entry] = replace(records[entry], registers=int(found[1]), shared=int(shared[1]) if shared else 0)
    return records
