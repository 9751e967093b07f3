"""`lutq bench kernel` without a GPU: what is computed around the launches, and the whole run with made-up times."""

import contextlib
import importlib.util
import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import lutq.bench
import lutq.cuda
import lutq.timing
import lutq.trial
import lutq.tune
from lutq.bench import COLUMNS, columns, driver_version, layer_of, line, make_record, parse_shape
from lutq.cli import app
from lutq.config import LayerConfig
from lutq.cuda import Prepacked, prepack
from lutq.errors import LutqError
from lutq.launch import Gpu
from lutq.pack import Packed, dequantize, packed_shapes
from lutq.prepack import unpack_codes, unpack_records
from lutq.roofline import bars, curves, draw, require_matplotlib
from lutq.timing import Chain, Timing, copies, expected_us, launches, summarize
from lutq.trial import check_product, checked_rows, random_packed, rotating, select, traffic
from lutq.tune import merge, rows_table, threshold

CPU = torch.device("cpu")
MADE_UP = Gpu("NVIDIA Made Up", 132, 232448, True, True)
LAYERS = [layer_of(bits, grid, group) for bits in (1, 2, 3, 4) for grid in ("bcq", "uniform") for group in (64, 0)]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["bench", "kernel", *map(str, args)])


# Settings


@pytest.mark.parametrize("text", ["4096x14336", " 4096X14336 "])
def test_shape(text):
    assert parse_shape(text) == (4096, 14336)


@pytest.mark.parametrize("text", ["", "4096", "0x4", "4x-1", "4x4x4", "axb"])
def test_no_shape(text):
    with pytest.raises(LutqError, match=r"--shape is outputs x inputs, such as 4096x14336"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("bits", "grid", "expected"),
    [
        (1, "auto", ("bcq", False)),
        (3, "auto", ("bcq", False)),
        (4, "auto", ("uniform", True)),
        (4, "bcq", ("bcq", False)),
        (2, "uniform", ("uniform", True)),
    ],
)
def test_layer(bits, grid, expected):
    assert layer_of(bits, grid, 64) == LayerConfig(bits, 64, *expected)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--shape", "12"), "--shape is outputs x inputs"),
        (("--rows", 0), "--rows must be 1 or more, not 0"),
        (("--bits", 5), "bits must be 1, 2, 3 or 4; got 5"),
        (("--group", 100), "group must be a multiple of 32"),
        (("--grid", "round"), "--grid must be one of auto, bcq, uniform, not 'round'"),
        (("--repeats", 0), "--repeats must be 1 or more, not 0"),
        (("--tune", "--repeats", 0), "--repeats must be 1 or more, not 0"),
        (("--json", "no/x.json"), "no directory no for x.json: create it first"),
        (("--plot", "no/x.png"), "no directory no for x.png: create it first"),
        (("--plot", "x.txt"), "--plot writes .png, .pdf or .svg, not 'x.txt'"),
        (("--tune", "--json", "x.json"), "give it alone"),
        (("--tune", "--grid", "uniform"), "give it alone"),
        (("--tune", "--group", "64"), "give it alone"),
        pytest.param((), "torch sees no GPU here: `lutq doctor` says", marks=NO_GPU),
        pytest.param(("--tune",), "torch sees no GPU here: `lutq doctor` says", marks=NO_GPU),
        pytest.param(("--device", "cuda:7"), "torch sees no GPU here", marks=NO_GPU),
    ],
)
def test_one_sentence(invoke, tmp_path, args, words):
    result = invoke(*args)
    assert result.exit_code == 2, f"{args=} {result.output}"
    assert words in result.stderr, f"{args=} {result.stderr}"
    assert result.stderr.startswith("lutq: "), f"{args=} {result.stderr}"
    assert result.stderr.count("\n") == 1, f"{args=} {result.stderr}"
    assert not list(tmp_path.iterdir()), f"{args=}"


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LutqError, match="pip install matplotlib"):
        require_matplotlib(tmp_path / "x.png")


def test_the_device_must_be_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(LutqError, match="cannot use cpu: leave --device out"):
        lutq.timing.require_gpu("cpu")


# Copies, launches, times


@pytest.mark.parametrize(
    ("nbytes", "l2", "expected"),
    [(10, 100, 40), (100, 100, 5), (150, 100, 3), (199, 100, 3), (200, 100, 3), (401, 100, 2), (9**9, 1, 2)],
)
def test_copies(nbytes, l2, expected):
    count = copies(nbytes, l2)
    assert count == expected, f"{nbytes=} {l2=}"
    assert count == 40 or count * nbytes > 4 * l2, f"{nbytes=} {l2=} {count=}"


@pytest.mark.parametrize("count", [2, 3, 7, 40])
@pytest.mark.parametrize(("M", "us"), [(1, 2.0), (1, 30.0), (16, 5000.0), (17, 5000.0), (2048, 10.0)])
def test_launches(M, us, count):
    found = launches(M, us, count)
    assert found % count == 0, f"{M=} {us=} {count=} {found=}: every copy must wait for all others"
    assert found % 2 == 0, f"{M=} {us=} {count=} {found=}: the next replay must begin with the other buffer"
    assert found >= (20 if M <= 16 else 1), f"{M=} {us=} {count=} {found=}"
    assert found < max(200, 2000 / us, 20) + 2 * count, f"{M=} {us=} {count=} {found=}"
    assert found * us >= 2000 or found >= 200, f"{M=} {us=} {count=} {found=}"


def test_expected_time_grows_with_bytes_and_work():
    assert 4 < expected_us(8_000_000, 1, 4096, 4096) < 10
    assert expected_us(8_000_000, 2048, 4096, 4096) > 100


def test_summary():
    assert summarize([3.0, 1.0, 2.0, 9.0]) == Timing(2.5, 1.0, 9.0)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 64), (1, 96, 64), (1, 64, 96), (3, 96, 60), (3, 60, 96), (16, 33, 100)])
def test_chain(M, N, K):
    chain = Chain(M, N, K, CPU)
    for i in range(3):
        x, y = chain.x(i), chain.y(i)
        assert x.shape == (M, K), f"{M=} {N=} {K=}"
        assert y.shape == (M, N), f"{M=} {N=} {K=}"
        assert y.is_contiguous(), f"{M=} {N=} {K=}"
        assert x.stride(0) % 8 == 0, f"{M=} {N=} {K=}: rows on 16 bytes"
        assert x.stride(1) == 1, f"{M=} {N=} {K=}"
        assert x.data_ptr() % 16 == y.data_ptr() % 16 == 0, f"{M=} {N=} {K=}"
        before = x.clone()
        y.fill_(1000 + i)
        assert torch.equal(x, before), f"{M=} {N=} {K=}: a launch must not write what it reads"
        assert 0 < (chain.x(i + 1) == 1000 + i).sum() <= M * (K / 4 + 8), f"{M=} {N=} {K=}: launch i + 1 reads what i wrote"
    chain.check()
    chain.y(0)[-1, -1] = math.inf
    with pytest.raises(LutqError, match=f"{N}x{K}, M = {M} overflowed"):
        chain.check()
    chain.reset()
    chain.check()
    assert torch.equal(chain.buffers[0], chain.buffers[1])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("N", "K"), [(512, 512), (128, 512), (512, 128)])
def test_chains_neither_overflow_nor_vanish(layer, N, K):
    torch.manual_seed(0)
    W = dequantize(*random_packed(N, K, layer, CPU), layer.group, layer.grid, K)
    chain = Chain(1, N, K, CPU)
    for i in range(200):
        chain.y(i).copy_(chain.x(i).float() @ W.T)
    length = chain.y(199).float().square().mean().sqrt().item()
    chain.check()
    assert 0.1 < length < 10, f"{layer=} {N=} {K=} {length=}"


# One layer


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("N", "K"), [(256, 320), (96, 172)])
def test_random_layer(layer, N, K):
    packed = random_packed(N, K, layer, CPU)
    for name, (shape, dtype) in packed_shapes(N, K, layer).items():
        tensor = getattr(packed, name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), f"{layer=} {name=}"
    W = dequantize(*packed, layer.group, layer.grid, K)
    length = (torch.randn(64, K) @ W.T).square().mean().sqrt().item()
    assert 0.8 < length < 1.25, f"{layer=} {length=}"
    rest = packed.codes[..., -1] >> (K % 32 or 31)
    assert K % 32 == 0 or not rest.any(), f"{layer=}: bits past K are 0"


@pytest.mark.parametrize("N", [1, 16, 40, 256, 272, 4096, 49152, 49153])
def test_checked_rows(N):
    rows = checked_rows(N)
    assert rows == sorted(set(rows)), f"{N=}"
    assert len(rows) <= 256, f"{N=}"
    assert {0, min(15, N - 1), N - 1, (N - 1) // 16 * 16} <= set(rows), f"{N=}: the first and the last tile"
    assert len(rows) == N or len(rows) > 240, f"{N=} {len(rows)=}"
    assert rows == checked_rows(N), f"{N=}"


@pytest.mark.parametrize("layer", [LayerConfig(3, 64, "bcq", False), LayerConfig(4, 64, "uniform", True)])
def test_select(layer):
    packed = random_packed(40, 96, layer, CPU)
    rows = [0, 7, 39]
    whole, some = (dequantize(*part, layer.group, layer.grid, 96) for part in (packed, select(packed, rows)))
    assert torch.equal(whole[rows], some), f"{layer=}"


def test_traffic():
    layer = LayerConfig(3, 128, "bcq", False)
    assert traffic(4096, 4096, 1, layer) == 4096 * 4096 * 3 // 8 + 3 * 4096 * 32 * 2 + 2 * 8192
    layer = LayerConfig(4, 128, "uniform", True)
    assert traffic(256, 512, 8, layer) == 256 * 512 // 2 + 256 * 4 * 3 + 2 * 8 * (256 + 512)


def test_rotating():
    first = Prepacked(torch.arange(4), torch.arange(6), False)
    ready = rotating(first, 3)
    assert ready[0] is first
    assert len({w.codes.data_ptr() for w in ready}) == len({w.records.data_ptr() for w in ready}) == 3
    assert all(torch.equal(w.codes, first.codes) and torch.equal(w.records, first.records) for w in ready)


def oracle(x, ready, N, layer, dtype=None):
    """What the operator does on a GPU, from the same tensors."""
    K = x.shape[1]
    packed = Packed(unpack_codes(ready.codes, N, K, layer.grid), **unpack_records(ready.records, N, K, layer))
    W = dequantize(*packed, layer.group, layer.grid, K, torch.float64)
    return F.linear(x.double(), W).to(dtype or x.dtype)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("M", [1, 4, 5, 20])
def test_check(monkeypatch, layer, M):
    N, K = 300, 172
    packed = random_packed(N, K, layer, CPU)
    ready, x = prepack(packed, layer), torch.randn(M, K).half()
    monkeypatch.setattr(lutq.trial, "product", oracle)
    error = check_product(packed, ready, x, layer)
    assert error < (1e-7 if M <= 4 else 4e-4), f"{layer=} {M=} {error=}"
    off = 4e-6 if M <= 4 else 1e-3  # of one row of x; the others are right
    for wrong in (off, math.nan):
        factor = torch.ones(M, 1, dtype=torch.float64)
        factor[-1] += wrong
        monkeypatch.setattr(lutq.trial, "product", lambda *args, factor=factor: oracle(*args).double() * factor)
        with pytest.raises(LutqError, match=rf"wrong for {N}x{K}, M = {M}, {layer.bits} bits, {layer.grid} grid"):
            check_product(packed, ready, x, layer)


@pytest.fixture
def launched(monkeypatch):
    """Every launch of lut_gemm and fused_gemm that would be timed, once, in order."""
    calls = []

    def time_graph(launch, count, repeats, reset=None):
        for i in range(count):
            launch(i)
        return Timing(1.0, 1.0, 1.0)

    for module in (lutq.trial, lutq.tune):
        monkeypatch.setattr(module, "time_graph", time_graph)
    for run in ("run_lut", "run_fused"):
        monkeypatch.setattr(lutq.cuda, run, lambda found, a, *_: calls.append(a))
    monkeypatch.setattr(lutq.cuda, "kernels", lambda device: None)
    for module in (lutq.cuda, lutq.trial):
        monkeypatch.setattr(module, "properties", lambda device: MADE_UP)
    monkeypatch.setattr(lutq.trial, "rows_limit", lambda name, bits, fused: 64)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return calls


@pytest.mark.parametrize(("M", "N", "K"), [(1, 160, 96), (4, 96, 160), (16, 64, 56)])
def test_launches_of_a_layer(launched, M, N, K):
    layer = layer_of(3, "auto", 32)
    ready = rotating(prepack(random_packed(N, K, layer, CPU), layer), 3)
    lutq.trial.time_layer(ready, N, K, M, layer, 5)
    each = -(-M // 4)  # few inputs: 4 rows at a time
    count = launches(M, expected_us(traffic(N, K, M, layer), M, N, K), 3)
    assert len(launched) == each * count * (1 + 2), "the graph, and its replays one launch at a time"
    for i, a in enumerate(launched):
        assert (a.M, a.N, a.K, a.bits, a.group, a.bias) == (min(M, 4), N, K, 3, 32, None), f"{i=}"
        w = ready[i // each % 3]
        assert (a.codes, a.records) == (w.codes.data_ptr(), w.records.data_ptr()), f"{i=}"
    products = [(part[0].x, part[0].y) for part in (launched[i : i + each] for i in range(0, len(launched), each))]
    for i, (_, y) in enumerate(products):
        following = products[(i + 1) % len(products)][0]  # after the last, the first of the next replay
        assert following < y < following + 2 * M * launched[0].x_stride, f"{i=}: the next launch reads what this one writes"
        assert (y - following) % 16 == 0, f"{i=}"


@pytest.mark.parametrize(
    ("M", "limit", "expected"), [(1, 8, True), (4, 8, True), (8, 8, False), (16, 32, True), (17, 512, False)]
)
def test_chained(M, limit, expected):
    assert lutq.trial.chained(M, limit) == expected, f"{M=} {limit=}"


def test_many_rows_are_not_chained(monkeypatch, launched):
    layer, codes = layer_of(3, "auto", 32), []
    ready = rotating(prepack(random_packed(64, 96, layer, CPU), layer), 2)
    monkeypatch.setattr(lutq.trial, "product", lambda x, w, N, layer: codes.append((x.shape, w.codes.data_ptr())))
    lutq.trial.time_layer(ready, 64, 96, 17, layer, 5)
    assert codes[:3] == [((17, 96), ready[i].codes.data_ptr()) for i in (0, 1, 0)]
    assert not launched


def test_cublas(monkeypatch, launched):
    seen = []
    mm = torch.mm
    monkeypatch.setattr(lutq.trial, "l2_bytes", lambda device: 20_000)
    monkeypatch.setattr(
        torch, "mm", lambda x, w, out: seen.append((x.data_ptr(), w.data_ptr(), out.data_ptr())) or mm(x, w, out=out)
    )
    monkeypatch.setattr(F, "linear", lambda x, w: seen.append((x.data_ptr(), w.data_ptr(), None)))
    assert lutq.trial.time_cublas(96, 160, [1, 16, 32], 5, CPU) == {1: 1.0, 16: 1.0, 32: 1.0}
    assert len({w for _, w, _ in seen}) == copies(96 * 160 * 2, 20_000) == 3
    assert sum(out is None for _, _, out in seen) >= 2


def test_launches_of_tune(monkeypatch, launched):
    dense = []
    monkeypatch.setattr(lutq.tune, "N", 48)
    monkeypatch.setattr(lutq.tune, "K", 1024)
    monkeypatch.setattr(lutq.tune, "multiply_dense", lambda x, w, *_: dense.append((x.shape[0], w.codes.data_ptr())))
    layer = layer_of(4, "auto", 32)
    ready = rotating(prepack(random_packed(48, 1024, layer, CPU), layer), 2)
    assert lutq.tune.measure(ready, layer, 100, 5) == (1.0, 1.0)
    step, each = 64, 2
    assert [a.M for a in launched] == [64, 36] * (len(launched) // 2), "fused_gemm takes 64 rows at a time"
    assert [a.codes == ready[0].codes.data_ptr() for a in launched[: 2 * each]] == [True] * each + [False] * each
    assert [a.y - launched[0].y for a in launched[:each]] == [2 * 48 * step * i for i in range(each)]
    assert [a.x - launched[0].x for a in launched[:each]] == [2 * 1024 * step * i for i in range(each)]
    assert len(dense) * each == len(launched)
    assert dense[:3] == [(100, ready[i].codes.data_ptr()) for i in (0, 1, 0)]


# Records and the table

RECORD = make_record(4096, 8192, 16, LayerConfig(3, 128, "bcq", False), Timing(8.0, 7.5, 9.0), 24.0, 4000.0, 1.5e-4)


def test_record():
    assert list(RECORD) == [
        *("n", "k", "m", "bits", "group", "grid", "us", "us_min", "us_max", "bytes", "gbps", "percent_of_ceiling"),
        *("cublas_us", "relative_error"),
    ]
    assert RECORD["bytes"] == traffic(4096, 8192, 16, LayerConfig(3, 128, "bcq", False))
    assert RECORD["gbps"] == pytest.approx(RECORD["bytes"] / 8e-6 / 1e9)
    assert RECORD["percent_of_ceiling"] == pytest.approx(RECORD["gbps"] / 40)


def test_line():
    header, text = columns(COLUMNS), line(RECORD)
    cells = [f"{RECORD['gbps']:.0f}", f"{RECORD['percent_of_ceiling']:.1f}%", "24.00", "3.00x", "1.5e-04"]
    assert len(header) == len(text), f"{header}\n{text}"
    assert text.split() == ["4096x8192", *f"3 16 8.00 7.50 9.00 {RECORD['bytes'] / 1e6:.2f}".split(), *cells]
    large = RECORD | {"n": 49152, "k": 12288, "m": 2048, "us": 12345.67, "us_min": 12345.6, "us_max": 99999.9}
    assert len(line(large)) == len(header), "columns are wide enough for the largest case"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: gcc 13.3.0\n",
            "580.95.05",
        ),
        ("nothing", None),
    ],
)
def test_driver(tmp_path, text, expected):
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == expected
    assert driver_version(tmp_path / "missing") is None


# The whole run


@pytest.fixture
def made_up(monkeypatch):
    """A GPU that is the CPU: products by the oracle, times that count up, nothing launched."""
    ticks = itertools.count(1)

    def time_graph(launch, count, repeats, reset=None):
        assert count % 2 == 0
        us = float(next(ticks))
        return Timing(us, us - 0.5, us + 0.5)

    for module in (lutq.bench, lutq.cuda, lutq.trial, lutq.tune):
        for name, value in {
            "require_gpu": lambda device: CPU,
            "l2_bytes": lambda device: 10_000,
            "kernels": lambda device: None,
            "properties": lambda device: MADE_UP,
            "read_ceiling": lambda device, repeats: 4000.0,
            "time_graph": time_graph,
            "product": oracle,
            "run_lut": lambda *args: None,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Made Up")


def test_run(invoke, made_up, tmp_path):
    cases = ["--shape", "96x160", "--shape", "160x96", "--rows", 1, "--rows", 4, "--rows", 32, "--bits", 3, "--bits", 4]
    result = invoke(*cases, "--group", 64, "--json", "out.json", "--plot", "out.png")
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    lines = result.stdout.splitlines()
    assert lines[0] == "NVIDIA Made Up: reads 4000 GB/s at most (torch reductions, measured now)"
    assert lines[1].split()[:3] == ["shape", "bits", "M"]
    found = json.loads((tmp_path / "out.json").read_text())
    assert {*found} == {"gpu", "driver", "torch", "cuda", "lutq", "date", "read_ceiling_gbps", "records"}
    assert (found["gpu"], found["read_ceiling_gbps"], found["torch"]) == ("NVIDIA Made Up", 4000.0, torch.__version__)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"]), found["date"]
    names = [(r["n"], r["k"], r["bits"], r["m"]) for r in found["records"]]
    assert names == [(*s, b, M) for s in ((96, 160), (160, 96)) for b in (3, 4) for M in (1, 4, 32)], f"{names}"
    assert lines[2:] == [line(record) for record in found["records"]]
    for record in found["records"]:
        assert record["grid"] == ("uniform" if record["bits"] == 4 else "bcq"), f"{record}"
        assert (record["group"], record["us"] - record["us_min"]) == (64, 0.5), f"{record}"
    cublas = [record["cublas_us"] for record in found["records"]]
    assert cublas[:6] == [1.0, 2.0, 3.0] * 2, "measured once per shape and M"
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_an_interrupted_run_keeps_its_records(invoke, made_up, monkeypatch, tmp_path):
    calls = itertools.count()

    def interrupt(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return Timing(1.0, 1.0, 1.0)

    monkeypatch.setattr(lutq.bench, "time_layer", interrupt)
    result = invoke("--shape", "64x64", "--json", "out.json")
    assert result.exit_code == 130, f"{result.output}"
    assert len(json.loads((tmp_path / "out.json").read_text())["records"]) == 2


def test_out_of_memory(invoke, made_up, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lutq.bench, "time_cublas", fail)
    result = invoke("--shape", "64x64")
    assert result.exit_code == 2, f"{result.output}"
    assert "out of memory: 64x64 is too large for this GPU" in result.stderr, f"{result.stderr}"


# The plot


def results(shapes=((4096, 4096), (8192, 8192), (4096, 14336)), bits=(2, 3, 4), rows=(1, 16, 256)):
    records = []
    for (N, K), b, M in itertools.product(shapes, bits, rows):
        timing = Timing(N * K * b / 3e7 + M, 1.0, 2.0)
        records.append(make_record(N, K, M, layer_of(b, "auto", 128), timing, N * K / 1e6 + M / 2, 4000.0, 1e-4))
    return {"gpu": "NVIDIA Made Up", "date": "2026-11-22", "read_ceiling_gbps": 4000.0, "records": records}


def test_figures_of_the_plot():
    records = results(rows=(256, 1, 16))["records"]
    heights = bars(records)
    assert {b: len(values) for b, values in heights.items()} == {2: 3, 3: 3, 4: 3}
    first = next(r for r in records if (r["n"], r["k"], r["bits"], r["m"]) == (8192, 8192, 3, 1))
    assert heights[3][1] == first["percent_of_ceiling"]
    points = curves(records, (8192, 8192))
    assert [M for M, _ in points[3]] == [1, 16, 256]
    assert points[3][0][1] == first["cublas_us"] / first["us"]
    missing = [r for r in records if (r["n"], r["k"], r["bits"]) != (4096, 4096, 2)]
    assert bars(missing)[2][-1] is None or bars(missing)[2].count(None) == 1


@pytest.mark.parametrize(
    "result", [results(), results(((64, 64),), (1,), (3,)), results(bits=(1, 2, 3, 4))], ids=["usual", "one", "all"]
)
def test_draw(tmp_path, result):
    result = json.loads(json.dumps(result))
    file = tmp_path / "plot.png"
    draw(result, file)
    assert file.read_bytes().startswith(b"\x89PNG"), f"{file}"
    assert file.stat().st_size > 10_000, f"{file.stat()}"


def test_draw_nothing(tmp_path):
    with pytest.raises(LutqError, match="nothing to draw"):
        draw(results() | {"records": []}, tmp_path / "plot.png")


# --tune


@pytest.mark.parametrize(
    ("lut", "dense", "expected"),
    [
        ([10, 20, 30, 40], [35, 35, 35, 35], 48),
        ([10, 20, 30, 40], [50, 50, 50, 50], 64),
        ([10, 20, 30, 40], [5, 5, 5, 5], 16),
        ([10, 36, 30, 40], [35, 35, 35, 35], 48),  # one time is noise
    ],
)
def test_threshold(lut, dense, expected):
    times = dict(zip((16, 32, 48, 64), zip(lut, dense, strict=True), strict=True))
    assert threshold(times) == expected, f"{times=}"


def test_merge(tmp_path):
    file = tmp_path / "new" / "gpus.json"
    few, more, most = ({str(bits): rows for bits in (1, 2, 3, 4)} for rows in (16, 32, 64))
    merge(file, "A", few)
    merge(file, "B", more)
    merge(file, "A", most)
    assert json.loads(file.read_text()) == {"A": most, "B": more}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", "[1]", '{"A": ', '{"A": 1}', '{"A": {"1": 16}}'])
def test_merge_into_something_else(tmp_path, content):
    file = tmp_path / "gpus.json"
    file.write_text(content)
    with pytest.raises(LutqError, match="is not a table of row limits: remove it"):
        merge(file, "A", {"1": 16})
    assert file.read_text() == content


def test_rows_table():
    lines = rows_table({3: {16: (1.0, 2.25), 32: (3.0, 4.0)}, 4: {16: (5.0, 6.0), 32: (7.0, 8.0)}}).splitlines()
    assert lines[1].split() == ["16", "1.0", "2.2", "5.0", "6.0"], f"{lines}"
    assert re.split(r"\s{2,}", lines[0].strip())[1:3] == ["packed, 3 bits", "dense, 3 bits"], f"{lines}"


def test_tune(invoke, made_up, monkeypatch, tmp_path):
    monkeypatch.setenv("LUTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lutq.tune, "N", 64)
    monkeypatch.setattr(lutq.tune, "K", 128)
    monkeypatch.setattr(lutq.tune, "measure", lambda ready, layer, M, repeats: (M / 16 * layer.bits, 10.1))
    result = invoke("--tune")
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    limits = {"1": 160, "2": 80, "3": 48, "4": 40}
    assert json.loads((tmp_path / "cache" / "gpus.json").read_text()) == {"NVIDIA Made Up": limits}
    last = result.stdout.splitlines()[-1]
    assert last.startswith("packed up to these rows: 160 at 1 bits, 80 at 2 bits, 48 at 3 bits, 40 at 4 bits; written to ")
    assert last.endswith("gpus.json")
    assert len(result.stdout.splitlines()) == 1 + 1 + len(lutq.tune.ROWS) + 1, f"{result.stdout}"
    (tmp_path / "cache" / "gpus.json").write_text("[1]")
    monkeypatch.setattr(lutq.tune, "measure", lambda *about: pytest.fail("measured for nothing"))
    result = invoke("--tune")
    assert result.exit_code == 2, f"{result.output} {result.exception!r}"
    assert result.stderr.endswith("is not a table of row limits: remove it\n"), result.stderr
