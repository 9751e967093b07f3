"""The compiled CUDA library: one shared object made from `kernels/*.cu`, found ready or compiled at first use.

`library(capability)` looks for `kernels/lutq_cuda.so` beside the sources (a wheel may carry one, made with
`lutq build --arch all --out kernels`), then in the user's cache, and compiles into the cache what is in neither. The cache is the
folder that the environment variable LUTQ_CACHE names, else $XDG_CACHE_HOME/lutq, else ~/.cache/lutq. scripts/wheel_hook.py
imports this module where no dependency of lutq is installed.

Beside each lutq_cuda*.so lie a .json (the `Library` record) and a .log (the compiler's output, see `lutq.compiler.resources`).
A library counts only if its record names the present sources and flags and its bytes are those of the record. One process
at a time compiles into a cache, the others wait for its result; everything appears by os.replace, so whatever is killed
leaves nothing that looks finished.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lutq.compiler import (
    FAT_ARCHS,
    OLDEST,
    Compiler,
    arch_flags,
    covers,
    host_compiler,
    native_arch,
    parse_arch,
    require_compiler,
)
from lutq.errors import LutqError
from lutq.paths import shipped

BUNDLED = "lutq_cuda.so"
UNFINISHED = "unfinished-"
MOVE_CACHE = "point the environment variable LUTQ_CACHE at a folder of yours"
MINUTES = 0.75  # to compile for one architecture on two cores
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "--threads", "0")


@dataclass(frozen=True)
class Library:
    """A compiled library and how it was made. `sha256` is that of the file, `seconds` what compiling took."""

    path: Path
    archs: tuple[str, ...]
    source_hash: str
    flags: tuple[str, ...]
    machine: str
    compiler: str
    command: str
    seconds: float
    sha256: str


def cache_folder() -> Path:
    """$LUTQ_CACHE, else $XDG_CACHE_HOME/lutq, else ~/.cache/lutq; it need not exist."""
    if chosen := os.environ.get("LUTQ_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lutq"


def source_hash(sources: Path) -> str:
    """SHA-256 (64 hex digits) over names and contents of all .cu and .cuh files. Raises LutqError when there is no .cu."""
    if not any(sources.glob("*.cu")):
        raise LutqError(f"there are no CUDA sources in {sources}: reinstall lutq")
    digest = hashlib.sha256()
    for file in sorted((*sources.glob("*.cu"), *sources.glob("*.cuh")), key=lambda file: file.name):
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def read_library(path: Path) -> Library | None:
    """The record beside a library, as it stands; None where library or record is missing or unreadable."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        record |= {"path": path, "archs": tuple(record["archs"]), "flags": tuple(record["flags"])}
        return Library(**record) if path.is_file() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # whatever a torn or foreign file holds
        return None


def fault(library: Library, digest: str) -> str | None:
    """What keeps a library from being used with the sources of this hash, in words; None when nothing does."""
    if library.source_hash != digest or library.flags != FLAGS:
        return "stale: made from other sources or with other flags"
    if library.machine != platform.machine():
        return f"made for {library.machine} processors"
    try:
        content = library.path.read_bytes()  # before ctypes sees it: a cut library ends the process with SIGBUS
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if hashlib.sha256(content).hexdigest() != library.sha256 or digest.encode() not in content:
        return "damaged"
    return None


def usable(capability: tuple[int, int], sources: Path) -> Iterator[tuple[Library, str]]:
    """Libraries that run on a GPU of this compute capability, and where each comes from: bundled, then cached, newest first."""
    digest = source_hash(sources)
    cache = cache_folder()
    cached = sorted(cache.glob("lutq_cuda-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (sources / BUNDLED, *cached):
        found = read_library(path)
        if found and fault(found, digest) is None and covers(found.archs, capability):
            yield found, f"compiled earlier into {cache}" if path in cached else "came with lutq"


def library_path(capability: tuple[int, int], sources: Path | None = None) -> tuple[Path | None, str]:
    """The library that would be loaded for a GPU of this compute capability, and why; never compiles."""
    if capability < OLDEST:
        return None, f"its compute capability is {capability[0]}.{capability[1]}, and the kernels need {OLDEST[0]}.{OLDEST[1]}"
    for found, why in usable(capability, sources or shipped("kernels")):
        return found.path, why
    return None, f"the kernels are not compiled for {native_arch(capability)} yet"


@functools.cache
def library(capability: tuple[int, int], sources: Path | None = None) -> ctypes.CDLL:
    """The kernels for GPUs of this compute capability, compiled first if need be (about a minute, once per machine).

    Raises LutqError where they cannot be compiled or do not run on such a GPU.
    """
    if capability < OLDEST:
        raise LutqError(f"this GPU cannot run the CUDA kernels: {library_path(capability, sources)[1]}; use --backend reference")
    sources = sources or shipped("kernels")
    refused = []
    for found, _ in usable(capability, sources):
        try:
            return load(found)
        except OSError:  # made on a newer system that shares this home, for instance: compile it here
            refused.append(found)
    built = build((native_arch(capability),), sources=sources, refused=refused)
    try:
        return load(built)
    except OSError as error:
        raise LutqError(f"{built.path} was compiled here and yet cannot be loaded: {error}; see {built.path.stem}.log") from error


def load(found: Library) -> ctypes.CDLL:
    """Open a library. Raises OSError for a file that this system cannot load or that is not of the recorded sources."""
    handle = ctypes.CDLL(str(found.path))
    if not hasattr(handle, "lutq_source_hash"):
        raise OSError("it does not export lutq_source_hash")
    handle.lutq_source_hash.restype = ctypes.c_char_p
    if handle.lutq_source_hash() != found.source_hash.encode():
        raise OSError("it was compiled from other sources")
    return handle


def build(
    archs: Iterable[str], out: Path | None = None, sources: Path | None = None, refused: Collection[Library] = ()
) -> Library:
    """Compile into the cache, or as `out`/lutq_cuda.so; what the cache holds already is not compiled again.

    `all` among the architectures stands for FAT_ARCHS. `refused` are libraries of the cache that must not count. Raises
    LutqError without compiler, without a folder to write to, and when compiling fails.
    """
    wanted = {one for arch in archs for one in (FAT_ARCHS if arch == "all" else (arch,))}
    archs = tuple(sorted(wanted, key=parse_arch))
    sources = sources or shipped("kernels")
    digest = source_hash(sources)
    compiler = require_compiler(archs)
    if out is not None:
        with writing(out, "choose another --out"):
            return compile_library(archs, out / BUNDLED, sources, digest, compiler)
    cache = cache_folder()
    identity = (digest, FLAGS, archs, compiler.text, platform.machine())
    target = cache / f"lutq_cuda-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    with writing(cache, MOVE_CACHE), locked(cache / "lock"):
        found = read_library(target)
        if found and found not in refused and fault(found, digest) is None:  # another process was faster
            return found
        for leftover in cache.glob(f"{UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return compile_library(archs, target, sources, digest, compiler)


@contextlib.contextmanager
def writing(folder: Path, remedy: str) -> Iterator[None]:
    """Make the folder; inside the block, turn what the file system refuses into a LutqError that ends with the remedy."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise LutqError(f"cannot write compiled kernels to {folder} ({error.strerror or error}): {remedy}") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes. The system frees it when its holder dies; the file stays."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            print("lutq: another process is compiling kernels; waiting for it ...", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_library(archs: Sequence[str], target: Path, sources: Path, digest: str, compiler: Compiler) -> Library:
    """Run nvcc beside `target` and put the library in place. Raises LutqError with the compiler's last words."""
    minutes = max(1, round(MINUTES * len(archs)))
    words = f"about {minutes} minute{'s' if minutes > 1 else ''} on two cores, less on more"
    print(f"lutq: compiling the CUDA kernels for {' '.join(archs)}, once ({words}) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=target.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        made = folder / target.name
        command = [str(compiler.path), *FLAGS, *arch_flags(archs), *compiler.library_flags()]
        command += [f'-DLUTQ_SOURCE_HASH="{digest}"', "-I", str(sources), "-o", str(made)]
        command += map(str, sorted(sources.glob("*.cu")))
        words = shlex.join(command).replace(str(made), str(target))  # as it can be run again
        started = time.perf_counter()
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": name},  # a killed nvcc leaves its intermediate files; here they are removed
            encoding="utf-8",
            errors="replace",
        )
        if result.returncode != 0 or not made.is_file():
            tail = "\n  ".join(result.stdout.strip().splitlines()[-15:])
            raise LutqError(
                f"the CUDA kernels do not compile with {compiler} and {host_compiler()}:\n  {tail}\ncommand: {words}\n"
                f"`lutq doctor` shows what is installed; a newer compiler comes with pip install -U 'lutq[nvcc]'"
            )
        content = made.read_bytes()
        if digest.encode() not in content:
            raise LutqError(f"the sources in {sources} must define lutq_source_hash, which returns LUTQ_SOURCE_HASH")
        if source_hash(sources) != digest:
            raise LutqError(f"the sources in {sources} changed while they were compiled: run it again")
        sha256 = hashlib.sha256(content).hexdigest()
        seconds = round(time.perf_counter() - started, 3)
        built = Library(target, tuple(archs), digest, FLAGS, platform.machine(), compiler.text, words, seconds, sha256)
        record = {key: value for key, value in asdict(built).items() if key != "path"}
        made.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        made.with_suffix(".log").write_text(result.stdout, encoding="utf-8")
        for suffix in (".log", ".so", ".json"):  # the record last: it vouches for the library
            made.with_suffix(suffix).replace(target.with_suffix(suffix))
    return built
