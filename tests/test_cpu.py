"""The CPU kernel: products against float64 with every kind of vectors, threads and forks, and what happens without a compiler."""

import itertools
import os
import platform
import warnings

import pytest
import torch
from conftest import CPU_BACKEND, random_packed

import lutq.cpu
import lutq.ops
from lutq.config import LayerConfig
from lutq.cpu import LIMIT, multiply
from lutq.errors import LutqError
from lutq.linear import LutLinear
from lutq.ops import choose_backend, working_backend
from lutq.pack import dequantize

pytestmark = pytest.mark.skipif(CPU_BACKEND != "cpu", reason="no C++ compiler")
CPU = torch.device("cpu")
SHAPES = [(7, 1), (33, 172), (64, 576), (5, 2080)]
GRIDS = [("bcq", True), ("bcq", False), ("uniform", True), ("uniform", False)]


def check(N, K, layer, rows=(0, 1, 2, 3, 5, LIMIT, LIMIT + 1, 40)):
    """Products of some rows of x, and their error against float64."""
    packed = random_packed(N, K, layer)
    W, bias = dequantize(*packed, layer.group, layer.grid, K, torch.float64), torch.randn(N)
    for M in rows:
        x = torch.randn(K, M).T  # not contiguous
        y = multiply(x, packed, bias, layer.group, layer.grid)
        wanted = x.double() @ W.T + bias.double()
        assert y.shape == wanted.shape, f"{N=} {K=} {layer=} {M=}"
        error = (y - wanted).norm() / (wanted.norm() + x.double().norm() * W.norm() / K**0.5 + 1e-300)
        assert error < 2e-6, f"{N=} {K=} {layer=} {M=} {error=}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "offsets"), GRIDS)
def test_products(bits, grid, offsets):
    for (N, K), group in itertools.product(SHAPES, (0, 32, 96, 128)):
        check(N, K, LayerConfig(bits, group, grid, offsets))


@pytest.fixture
def other(monkeypatch, tmp_path):
    """`other(FLAG...)` has the kernel compiled with other flags than for this machine, for one test."""

    def use(*flags):
        monkeypatch.setenv("LUTQ_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(lutq.cpu, "FLAGS", (*(flag for flag in lutq.cpu.FLAGS if flag != "-march=native"), *flags))
        lutq.cpu.kernel.cache_clear()

    yield use
    lutq.cpu.kernel.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64")
@pytest.mark.parametrize("flags", [("-march=x86-64",), ("-mavx2", "-mfma", "-mf16c")], ids=["no vectors", "AVX2"])
def test_other_vectors(other, flags):
    if "avx2" not in lutq.cpu.machine() and "-mavx2" in flags:
        pytest.skip("no AVX2 here")
    other(*flags)
    for bits, (grid, offsets), group in itertools.product((1, 3, 4), GRIDS, (0, 64)):
        check(33, 172, LayerConfig(bits, group, grid, offsets), rows=(1, 4, 7, 40))


def test_subnormal_and_large_scales():
    layer = LayerConfig(3, 32)
    packed = random_packed(40, 96, layer)
    for factor in (2.0**-14, 6e-8 / packed.scales.max().item(), 60000 / packed.scales.abs().max().item()):
        scaled = packed._replace(scales=(packed.scales.float() * factor).half(), offsets=torch.zeros_like(packed.offsets))
        x = torch.randn(2, 96)
        wanted = x.double() @ dequantize(*scaled, 32, "bcq", 96, torch.float64).T
        found = multiply(x, scaled, None, 32, "bcq")
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item()), f"{factor=}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_through_the_layer(dtype):
    """Any dtype and leading dimensions; fp64 keeps its digits."""
    layer = LayerConfig(3, 64)
    packed = random_packed(48, 200, layer)
    module = LutLinear.from_packed(packed, 200, layer, torch.randn(48))
    module.bias.data = module.bias.data.to(dtype)
    x = torch.randn(2, 3, 200).to(dtype)
    y = module(x)
    wanted = x.double() @ module.dequantize(torch.float64).T + module.bias.double()
    assert (y.shape, y.dtype) == ((2, 3, 48), dtype)
    error = ((y.double() - wanted).norm() / wanted.norm()).item()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float64: 1e-12}[dtype], f"{error=}"


def test_what_is_not_finite_stays_so():
    layer = LayerConfig(2, 32)
    packed = random_packed(20, 64, layer)
    x = torch.randn(2, 64)
    x[0, 5] = torch.nan
    y = multiply(x, packed, None, 32, "bcq")
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.fixture
def threads():
    """`threads(n)` sets how many torch uses, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_and_forks_change_nothing(threads):
    layer = LayerConfig(3, 64)
    packed, x = random_packed(500, 256, layer), torch.randn(3, 256)
    wanted = multiply(x, packed, None, 64, "bcq")
    for count in (2, 5, 3):
        threads(count)
        for _ in range(20):
            assert torch.equal(multiply(x, packed, None, 64, "bcq"), wanted), f"{count=}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is the point
        child = os.fork()
    if child == 0:  # its parent's threads are not there
        same = torch.equal(multiply(x, packed, None, 64, "bcq"), wanted)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Building


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing known of the kernel, for one test."""

    def forget():
        lutq.cpu.kernel.cache_clear()
        working_backend.cache_clear()
        lutq.ops.failed.clear()

    monkeypatch.setenv("LUTQ_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def test_compiled_once(fresh, capfd):
    assert choose_backend() == ("cpu", "the fastest: products with the packed weights themselves")
    assert not fresh.exists(), "choosing compiles nothing"
    check(33, 172, LayerConfig(3, 32), rows=(1,))
    assert "compiling the CPU kernel" in capfd.readouterr().err
    lutq.cpu.kernel.cache_clear()
    check(33, 172, LayerConfig(3, 32), rows=(1,))
    assert capfd.readouterr().err == ""
    assert [path.suffix for path in fresh.glob("*cpu*")] == [".so"]


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setattr(lutq.cpu, "host_compiler", lambda: None)
    name, why = choose_backend()
    assert name == "reference"
    assert "because the CPU kernel cannot run: nvcc and the CPU kernel need a C++ compiler" in why, why
    with pytest.raises(LutqError, match=r"the CPU kernel cannot run: .*apt install g\+\+"):
        choose_backend("cpu")
    with pytest.warns(UserWarning, match=r"lutq runs without its CPU kernel: .*apt install g\+\+") as seen:
        assert [working_backend("auto", CPU) for _ in range(3)] == 3 * ["reference"]
    assert len(seen) == 1


def test_a_failed_build_says_why(fresh, monkeypatch, tmp_path):
    (tmp_path / "lut_cpu.cpp").write_text("int lutq_cpu_multiply( {")
    monkeypatch.setattr(lutq.cpu, "source", lambda: tmp_path / "lut_cpu.cpp")
    with pytest.raises(LutqError, match=r"(?s)the CPU kernel does not compile:.*error.*command: .*g\+\+"):
        working_backend("cpu", CPU)
    assert not list(fresh.glob("*.so"))
    with pytest.warns(UserWarning, match="lutq runs without its CPU kernel: the CPU kernel does not compile"):
        assert working_backend("auto", CPU) == "reference"


def test_a_damaged_library_says_what_to_do(fresh):
    path = lutq.cpu.compiled()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no library")
    with pytest.raises(LutqError, match=r"cannot be loaded .*remove it, and it is compiled anew"):
        lutq.cpu.kernel()


def test_backend_of_another_device():
    with pytest.raises(LutqError, match="backend 'cpu' needs the CPU and the device is meta"):
        choose_backend("cpu", "meta")


def test_structures_are_those_of_the_source():
    text = lutq.cpu.source().read_text(encoding="utf-8")
    for structure in (lutq.cpu.Weights, lutq.cpu.Product):
        body = text.split(f"struct {structure.__name__} {{")[1].split("};")[0]
        code = " ".join(line.split("//")[0] for line in body.splitlines())
        names = [name.split()[-1].lstrip("*") for part in code.split(";") for name in part.split(",") if name.strip()]
        assert names == [name for name, _ in structure._fields_], structure.__name__
