"""The compiled library: found, compiled once, not trusted when damaged or stale; and whether the real kernels spill.

Most tests put a shell script in nvcc's place, which counts its runs and lets g++ compile the same source.
"""

import ctypes
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lutq.build
import lutq.compiler
from lutq.build import BUNDLED, UNFINISHED, build, cache_folder, library, library_path, read_library, source_hash
from lutq.cli import app
from lutq.compiler import DEFAULT_ARCHS, FAT_ARCHS, arch_flags, covers, find_compiler, host_compiler, parse_arch, resources
from lutq.errors import LutqError
from lutq.paths import PACKAGE, shipped

FAKE_NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; }
echo $$ >> {folder}/runs
{first}
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2; shift ;; -D*) define=$1 ;; *.cu) files="$files $1" ;; esac
  shift
done
echo "the compiler's log"
exec g++ -shared -fPIC "$define" -o "$out" -x c++ $files
"""
LIBRARY = '#include "answer.cuh"\nextern "C" const char* lutq_source_hash() { return LUTQ_SOURCE_HASH; }\n'
USE = "import sys; from pathlib import Path; from lutq.build import library; print(library((8, 0), Path(sys.argv[1])).answer())"

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
REAL = find_compiler() if host_compiler() else None
needs_nvcc = pytest.mark.skipif(REAL is None, reason="no nvcc (pip install 'lutq[nvcc]') or no g++")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTQ_CACHE", str(tmp_path / "cache"))
    library.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "library.cu").write_text(LIBRARY)
    (folder / "answer.cuh").write_text('extern "C" int answer() { return 42; }\n')
    return folder


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`fake(first)`: nvcc is a script that runs the shell commands `first` and then g++; returns how often it has compiled."""
    path = tmp_path / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))

    def runs():
        return len((tmp_path / "runs").read_text().split()) if (tmp_path / "runs").exists() else 0

    def install(first=":"):
        path.write_text(FAKE_NVCC.replace("{folder}", str(tmp_path)).replace("{first}", first))
        path.chmod(0o755)
        return runs

    install()
    return install


@pytest.fixture
def no_compiler(monkeypatch):
    return lambda: monkeypatch.setattr(lutq.compiler, "nvcc_paths", lambda: iter([Path("/no/such/nvcc")]))


def start(sources):
    return subprocess.Popen([sys.executable, "-c", USE, sources], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


# The real compiler


@needs_nvcc
def test_real_compiler(sources, cache, capfd):
    (sources / "spill.cu").write_text("""
__global__ void __launch_bounds__(1024, 2) lut_spills(float* y, const float* x, int n) {
  float a[48];
#pragma unroll
  for (int i = 0; i < 48; i++) a[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 48; j++) y[j * n + threadIdx.x] = a[j] * a[(j * 7 + 1) % 48] + a[(j * 5 + 2) % 48];
}
__global__ void lut_fits(float* y) {
  __shared__ float t[64];
  t[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = t[63 - threadIdx.x];
}
""")
    assert library((9, 0), sources).answer() == 42
    assert "lutq: compiling the CUDA kernels for sm_90, once" in capfd.readouterr().err
    path, why = library_path((9, 0), sources)
    assert path.parent == cache, f"{path=}"
    assert why == f"compiled earlier into {cache}"
    kernels = {kernel.name: kernel for kernel in resources(path.with_suffix(".log").read_text())}
    spills, fits = kernels["_Z10lut_spillsPfPKfi"], kernels["_Z8lut_fitsPf"]
    assert spills.arch == fits.arch == "sm_90a"
    assert min(spills.spill_stores, spills.spill_loads, spills.stack) > 0, f"{spills}"
    assert (fits.stack, fits.spill_stores, fits.spill_loads, fits.shared) == (0, 0, 0, 256), f"{fits}"
    assert 0 < fits.registers < spills.registers <= 32, f"{fits} {spills}"


@needs_nvcc
def test_an_architecture_that_the_compiler_does_not_know(sources, cache):
    with pytest.raises(LutqError, match="Unsupported gpu architecture 'compute_999'") as error:
        build(["sm_999"], sources=sources)
    assert "pip install -U 'lutq[nvcc]'" in str(error.value)
    assert left_in(cache) == []


@pytest.fixture(scope="module")
def fat(tmp_path_factory):
    """The real kernels for every architecture."""
    if REAL is None:
        pytest.skip("no nvcc (pip install 'lutq[nvcc]') or no g++")
    if not any(shipped("kernels").glob("*.cu")):
        pytest.skip("there are no kernels yet")
    return build(FAT_ARCHS, out=tmp_path_factory.mktemp("fat"))


@pytest.mark.parametrize("arch", DEFAULT_ARCHS)
def test_kernels_do_not_spill(fat, arch):
    kernels = [kernel for kernel in resources(fat.path.with_suffix(".log").read_text()) if kernel.arch.rstrip("a") == arch]
    for name in ("lut_gemm", "lut_gemv", "bit_gemv", "fused_gemm", "6decode"):  # 6decode: a namespace, mangled
        assert any(name in kernel.name for kernel in kernels), f"{arch=}: no kernel named {name} among {len(kernels)}"
    bad = [kernel for kernel in kernels if kernel.stack + kernel.spill_stores + kernel.spill_loads]
    assert not bad, f"{arch=}: {len(bad)} of {len(kernels)} kernels use local memory:\n" + "\n".join(map(str, bad))


def test_fused_gemm_is_compiled_for_hopper_alone(fat):
    """And its products run beside other arithmetic: ptxas says so where it must wait for each of them."""
    log = fat.path.with_suffix(".log").read_text()
    kernels = [kernel for kernel in resources(log) if "fused_gemm" in kernel.name]
    assert {kernel.arch for kernel in kernels if kernel.registers > 32} == {"sm_90a"}
    assert "wgmma" not in log, [line for line in log.splitlines() if "wgmma" in line]


def test_bit_gemv_is_compiled_for_hopper_alone(fat):
    kernels = [kernel for kernel in resources(fat.path.with_suffix(".log").read_text()) if "bit_gemv" in kernel.name]
    assert {kernel.arch for kernel in kernels if kernel.registers > 32} == {"sm_90a"}


def test_lut_gemv_is_compiled_for_gpus_with_clusters(fat):
    kernels = [kernel for kernel in resources(fat.path.with_suffix(".log").read_text()) if "lut_gemv" in kernel.name]
    assert {kernel.arch for kernel in kernels if kernel.registers > 32} == {"sm_90a", "sm_100", "sm_120"}


def test_real_kernels_load_without_a_gpu(fat):
    assert lutq.build.load(fat).lutq_source_hash().decode() == source_hash(shipped("kernels"))


def entry_points(module):
    """Names of the library that a module of lutq calls, `{...}bit` being every number of bits."""
    found = set()
    for name in re.findall(r"\blutq_\w*(?:\{[^}]*\}bit)?", (PACKAGE / module).read_text(encoding="utf-8")):
        found |= {re.sub(r"\{.*\}", str(bits), name) for bits in range(1, 5)}
    return found


def test_entry_points_are_exported(fat):
    """Also those whose arguments are structures of their own: in a nameless namespace they would be lost without a word."""
    handle = ctypes.CDLL(str(fat.path))
    for module, count in (("cuda.py", 17), ("columns.py", 1), ("gpu_fit.py", 6), ("decode/steps.py", 5)):
        names = entry_points(module)
        assert len(names) == count, f"{module}: {sorted(names)}"
        missing = [name for name in sorted(names) if not hasattr(handle, name)]
        assert not missing, f"{module}: the library does not export {', '.join(missing)}"


# Finding


@needs_gxx
def test_compiled_once_and_found_again(sources, fake, cache):
    runs = fake()
    assert library_path((8, 0), sources) == (None, "the kernels are not compiled for sm_80 yet")
    assert runs() == 0, "library_path must not compile"
    first = library((8, 0), sources)
    assert library((8, 0), sources) is first
    library.cache_clear()
    assert library((8, 0), sources).answer() == 42
    assert library((8, 6), sources).answer() == 42, "machine code for 8.0 runs on 8.6"
    assert runs() == 1
    library((9, 0), sources)
    assert runs() == 2
    (name,) = [path.name for path in cache.glob("*.json") if json.loads(path.read_text())["archs"] == ["sm_80"]]
    record = json.loads((cache / name).read_text())
    assert record["source_hash"] == source_hash(sources)
    assert "release 13.0" in record["compiler"]
    assert "arch=compute_80,code=sm_80" in record["command"]
    assert record["seconds"] > 0
    assert (cache / name).with_suffix(".log").read_text() == "the compiler's log\n"


@needs_gxx
@pytest.mark.parametrize("file", ["library.cu", "answer.cuh", "new.cuh"])
def test_other_sources_are_another_library(sources, fake, file):
    runs = fake()
    library((8, 0), sources)
    with (sources / file).open("a") as out:
        out.write("// changed\n")
    library.cache_clear()
    assert library_path((8, 0), sources)[0] is None, f"{file=}"
    assert library((8, 0), sources).answer() == 42
    assert runs() == 2, f"{file=}"


@needs_gxx
def test_other_flags_are_another_library(sources, fake, monkeypatch):
    library((8, 0), sources)
    monkeypatch.setattr(lutq.build, "FLAGS", (*lutq.build.FLAGS, "-lineinfo"))
    assert library_path((8, 0), sources)[0] is None


@needs_gxx
def test_without_compiler_an_earlier_library_is_used(sources, fake, no_compiler):
    library((8, 0), sources)
    library.cache_clear()
    no_compiler()
    assert library((8, 9), sources).answer() == 42
    with pytest.raises(
        LutqError, match=r"no CUDA compiler \(nvcc\) to compile the kernels for sm_90: pip install 'lutq\[nvcc\]'"
    ):
        library((9, 0), sources)


@needs_gxx
def test_bundled_library(sources, fake, no_compiler, cache):
    runs = fake()
    made = build(["sm_80", "sm_90"], out=sources, sources=sources)
    assert sorted(path.name for path in sources.glob("lutq_cuda*")) == ["lutq_cuda.json", "lutq_cuda.log", "lutq_cuda.so"]
    assert made.path == sources / BUNDLED
    assert not cache.exists()
    no_compiler()
    assert library_path((9, 0), sources) == (made.path, "came with lutq")
    assert library((9, 0), sources).answer() == 42
    assert library_path((12, 0), sources)[0] is None, "no code for it"
    assert runs() == 1


@needs_gxx
def test_stale_bundled_library_is_ignored(sources, fake, cache):
    runs = fake()
    build(["sm_80"], out=sources, sources=sources)
    (sources / "answer.cuh").write_text('extern "C" int answer() { return 43; }\n')
    assert library_path((8, 0), sources)[0] is None
    assert library((8, 0), sources).answer() == 43
    assert library_path((8, 0), sources)[0].parent == cache
    assert runs() == 2


def test_no_gpu_older_than_ampere(sources):
    assert library_path((7, 5), sources) == (None, "its compute capability is 7.5, and the kernels need 8.0")
    with pytest.raises(LutqError, match=r"7\.5, and the kernels need 8\.0; use --backend reference"):
        library((7, 5), sources)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("LUTQ_CACHE", "~/kernels")
    assert cache_folder() == Path("/home/me/kernels")
    monkeypatch.delenv("LUTQ_CACHE")
    assert cache_folder() == Path("/xdg/lutq")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/lutq")


# Trust


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def replace(path, content):
    """Another file under the library's name, with a record that vouches for it."""
    path.write_bytes(content(path))
    record = json.loads(path.with_suffix(".json").read_text())
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(record))


def no_library_but_the_hash(path):
    return json.loads(path.with_suffix(".json").read_text())["source_hash"].encode()


def library_of_other_sources(path):
    source = path.with_name("other.cpp")
    source.write_text('extern "C" const char* lutq_source_hash() { return "other"; }\nextern "C" int answer() { return 1; }\n')
    subprocess.run(["g++", "-shared", "-fPIC", "-o", source.with_suffix(".so"), source], check=True)
    return source.with_suffix(".so").read_bytes()


DAMAGE = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda path: os.truncate(path, 0),
    "torn record": lambda path: path.with_suffix(".json").write_text('{"archs": ["sm_8'),
    "foreign record": lambda path: path.with_suffix(".json").write_text("[1]"),
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "no library": lambda path: replace(path, no_library_but_the_hash),
    "other sources": lambda path: replace(path, library_of_other_sources),
}


@needs_gxx
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_library_is_compiled_again(sources, fake, kind):
    runs = fake()
    path = build(["sm_80"], sources=sources).path
    DAMAGE[kind](path)
    for expected in (2, 2):  # once, and the result is good
        process = start(sources)  # a new one: a loaded library would hide the damage
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "42\n"), f"{kind=} {process.returncode} {err}"
        assert runs() == expected, f"{kind=}"
    assert read_library(path) is not None


@needs_gxx
def test_sources_without_the_hash_function(sources, fake, cache):
    (sources / "library.cu").write_text('extern "C" int answer() { return 1; }\n')
    with pytest.raises(LutqError, match="must define lutq_source_hash"):
        library((8, 0), sources)
    assert left_in(cache) == []


@needs_gxx
def test_library_that_lies_about_its_sources(sources, fake):
    made = build(["sm_80"], sources=sources)
    with pytest.raises(OSError, match="compiled from other sources"):
        lutq.build.load(dataclasses.replace(made, source_hash="0" * 64))


@needs_gxx
def test_sources_that_change_meanwhile(sources, fake, cache):
    fake(f"echo '// more' >> {sources}/answer.cuh")
    with pytest.raises(LutqError, match="changed while they were compiled: run it again"):
        build(["sm_80"], sources=sources)
    assert left_in(cache) == []


# Several processes


@needs_gxx
def test_processes_compile_once(sources, fake):
    runs = fake("sleep 1")
    processes = [start(sources) for _ in range(5)]
    results = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [(out, code) for out, _, code in results] == [("42\n", 0)] * 5, f"{results}"
    assert runs() == 1, f"{results}"
    assert sum("lutq: compiling" in err for _, err, _ in results) == 1, f"{results}"


@needs_gxx
def test_killed_builder_leaves_no_trace(sources, fake, tmp_path, cache):
    runs = fake(f"[ $(wc -l < {tmp_path}/runs) = 1 ] && touch $TMPDIR/tmpxft && exec sleep 100")
    process = start(sources)
    deadline = time.monotonic() + 60
    while not list(cache.glob(f"{UNFINISHED}*/tmpxft")):
        assert time.monotonic() < deadline, "the first compiler never began"
        time.sleep(0.02)
    waiting = start(sources)
    process.kill()
    process.communicate()
    try:
        out, err = waiting.communicate(timeout=60)
    finally:
        os.kill(int((tmp_path / "runs").read_text().split()[0]), signal.SIGKILL)  # the orphaned compiler
    assert (out, waiting.returncode) == ("42\n", 0), err
    assert runs() == 2
    assert len(left_in(cache)) == 3, f"{left_in(cache)}"
    assert not list(cache.glob(f"{UNFINISHED}*"))


# What goes wrong


@needs_gxx
@pytest.mark.parametrize("out", [None, "out"])
def test_failed_build(sources, fake, cache, tmp_path, out):
    fake("i=0; while [ $i -lt 30 ]; do i=$((i + 1)); echo \"line $i.\"; done; echo 'boom: no such thing' >&2; exit 1")
    with pytest.raises(LutqError) as error:
        build(["sm_80"], out=out and tmp_path / out, sources=sources)
    text = str(error.value)
    assert "do not compile with nvcc 13.0" in text
    assert "boom: no such thing" in text
    assert "line 30." in text
    assert "line 17." in text
    assert "line 16." not in text, text
    assert f"command: {tmp_path}/cuda/bin/nvcc -O3" in text
    assert "pip install -U 'lutq[nvcc]'" in text
    assert left_in(tmp_path / out if out else cache) == []


@needs_gxx
def test_unwritable_cache(sources, fake, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LutqError, match=r"cannot write compiled kernels to .*file/cache \(Not a directory\).* LUTQ_CACHE"):
        library((8, 0), sources)


@needs_gxx
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_cache(sources, fake, cache):
    library((8, 0), sources)
    library.cache_clear()
    cache.chmod(0o555)
    try:
        assert library((8, 0), sources).answer() == 42, "reading is enough for what is there"
        with pytest.raises(LutqError, match=r"Permission denied.* LUTQ_CACHE"):
            library((9, 0), sources)
    finally:
        cache.chmod(0o755)


def test_no_host_compiler(sources, fake, monkeypatch):
    monkeypatch.setattr(lutq.compiler, "host_compiler", lambda: None)
    with pytest.raises(
        LutqError, match=r"nvcc and the CPU kernel need a C\+\+ compiler, and there is no g\+\+ on PATH: apt install g\+\+"
    ):
        build(["sm_80"], sources=sources)


def test_no_sources(tmp_path):
    with pytest.raises(LutqError, match=f"no CUDA sources in {tmp_path}: reinstall lutq"):
        library((8, 0), tmp_path)


# The compiler


def test_where_nvcc_is_looked_for(monkeypatch, tmp_path):
    site, path = tmp_path / "site", tmp_path / "path" / "nvcc"
    for file in (site / "nvidia" / "cu13" / "bin" / "nvcc", path):
        file.parent.mkdir(parents=True)
        file.write_text("#!/bin/sh\necho release 13.2\n")
        file.chmod(0o755)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [str(site / name)]})
    )
    monkeypatch.setenv("CUDA_HOME", "/home-of-cuda")
    monkeypatch.setenv("CUDA_PATH", "/path-of-cuda")
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    paths = [Path("/home-of-cuda/bin/nvcc"), Path("/path-of-cuda/bin/nvcc"), site / "nvidia" / "cu13" / "bin" / "nvcc", path]
    assert list(lutq.compiler.nvcc_paths()) == [*paths, Path("/usr/local/cuda/bin/nvcc")]
    found = find_compiler()
    assert found.path == paths[2], "the first that runs"
    assert found.version == (13, 2)
    assert found.library_flags() == []
    (site / "nvidia" / "cu13" / "lib").mkdir()
    (site / "nvidia" / "cu13" / "lib" / "libcudart_static.a").write_text("")
    assert found.library_flags() == [f"-L{site / 'nvidia' / 'cu13' / 'lib'}"]


def test_no_nvidia_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert list(lutq.compiler.nvcc_paths()) == [Path("/usr/local/cuda/bin/nvcc")]


@pytest.mark.parametrize(
    ("arch", "flag"),
    [
        ("sm_80", "arch=compute_80,code=sm_80"),
        ("sm_90", "arch=compute_90a,code=sm_90a"),
        ("sm_90a", "arch=compute_90a,code=sm_90a"),
        ("sm_120", "arch=compute_120,code=sm_120"),
        ("sm_100f", "arch=compute_100f,code=sm_100f"),
        ("compute_80", "arch=compute_80,code=compute_80"),
    ],
)
def test_arch_flags(arch, flag):
    assert arch_flags([arch]) == ["-gencode", flag], f"{arch=}"


@pytest.mark.parametrize(
    "arch", ["", "80", "sm80", "sm_", "sm_8", "sm_90A", "sm_90ab", "hopper", "sm_80,sm_90", "sm_80 -x", "lto_80"]
)
def test_misspelt_arch(arch):
    with pytest.raises(LutqError, match=r"unknown architecture .*: write sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"):
        parse_arch(arch)


def test_arch_too_old():
    with pytest.raises(LutqError, match="sm_75 is too old: the kernels need sm_80 or newer"):
        parse_arch("sm_75")


@pytest.mark.parametrize(
    ("archs", "yes", "no"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(9, 0), (10, 0), (12, 0)]),
        (["sm_89"], [(8, 9)], [(8, 0), (8, 6), (9, 0)]),
        (["sm_90"], [(9, 0)], [(8, 9), (10, 0)]),
        (["sm_100", "sm_90"], [(9, 0), (10, 0), (10, 3)], [(8, 0), (11, 0), (12, 0)]),
        (["sm_100a"], [(10, 0)], [(10, 3)]),
        (["sm_120"], [(12, 0), (12, 1)], [(10, 0)]),
        (["compute_80"], [(8, 0), (8, 9), (11, 0), (13, 0)], [(9, 0), (10, 0), (12, 0)]),
        (["compute_90"], [(10, 0), (12, 0)], [(8, 9), (9, 0)]),
        (FAT_ARCHS, [(8, 0), (8, 7), (9, 0), (10, 0), (11, 0), (12, 0), (12, 1), (13, 0)], []),
    ],
    ids=str,
)
def test_covers(archs, yes, no):
    for capability in (*yes, *no):
        assert covers(archs, capability) == (capability in yes), f"{archs=} {capability=}"


LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5lut_kPfi' for 'sm_80'
ptxas info    : Function properties for _Z5lut_kPfi
    160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 160 bytes cumulative stack size, 1024 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 9.939 ms
ptxas info    : Function properties for _Z6helperPfi
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z7spill_bPfPKfi' for 'sm_90a'
ptxas info    : Function properties for _Z7spill_bPfPKfi
    17448 bytes stack frame, 25456 bytes spill stores, 34280 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 17448 bytes cumulative stack size
ptxas info    : Compile time = 2633.657 ms
"""


def test_resources():
    assert resources(LOG) == [
        lutq.compiler.Kernel("_Z5lut_kPfi", "sm_80", registers=40, stack=160, shared=1024),
        lutq.compiler.Kernel("_Z6helperPfi", "sm_80", stack=8, spill_stores=4, spill_loads=12),
        lutq.compiler.Kernel("_Z7spill_bPfPKfi", "sm_90a", registers=32, stack=17448, spill_stores=25456, spill_loads=34280),
    ]
    assert resources("nvcc warning : something\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads") == []


# The verb


@pytest.fixture
def run(monkeypatch, sources):
    monkeypatch.setattr(lutq.build, "shipped", lambda folder: sources)
    monkeypatch.setattr("lutq.doctor.gpus", list)
    return lambda *args: CliRunner().invoke(app, ["build", *map(str, args)])


@needs_gxx
def test_verb(run, fake, cache, tmp_path):
    result = run("--arch", "sm_90", "--arch", "sm_80", "--arch", "sm_80")
    assert result.exit_code == 0, result.output
    assert "for sm_80, sm_90, compiled in" in result.stdout, result.stdout
    (path,) = cache.glob("*.so")
    assert result.stdout.startswith(f"{path}: "), result.stdout
    assert run("--arch", "sm_80", "--arch", "sm_90").exit_code == 0
    assert fake()() == 1, "it was there already"
    result = run("--out", tmp_path / "new" / "out")
    assert result.exit_code == 0, result.output
    assert read_library(tmp_path / "new" / "out" / BUNDLED).archs == (
        "compute_80", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120",
    )  # fmt: skip
    assert ctypes.CDLL(str(tmp_path / "new" / "out" / BUNDLED)).answer() == 42


@needs_gxx
def test_verb_compiles_for_the_gpus_here(run, fake, monkeypatch, cache):
    from lutq.doctor import Gpu

    monkeypatch.setattr(
        "lutq.doctor.gpus", lambda: [Gpu(i, "", capability, 0) for i, capability in enumerate([(9, 0), (8, 6), (9, 0)])]
    )
    result = run()
    assert result.exit_code == 0, result.output
    assert "for sm_86, sm_90, compiled" in result.stdout, result.stdout


def test_verb_without_compiler(run, no_compiler):
    no_compiler()
    result = run("--arch", "sm_80")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("lutq: there is no CUDA compiler (nvcc) to compile the kernels for sm_80: pip install"), (
        result.stderr
    )
    assert len(result.stderr.splitlines()) == 1, result.stderr


def test_verb_with_a_misspelt_arch(run, fake):
    result = run("--arch", "hopper")
    assert result.exit_code == 2, result.output
    assert "unknown architecture 'hopper'" in result.stderr


@needs_gxx
def test_verb_cannot_write(run, fake, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--out", tmp_path / "file" / "out")
    assert result.exit_code == 2, result.output
    assert "(Not a directory): choose another --out" in result.stderr, result.stderr
