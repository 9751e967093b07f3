"""What the `cuda` backend decides in Python, against the text of kernels/*.cu and a stand-in for the compiled library.

The stand-in does in float64, from the same pointers, what the kernels promise; the kernels themselves are tested in tests/gpu.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU_BACKEND, random_packed

import lutq.cuda
import lutq.launch
import lutq.ops
from lutq.config import LayerConfig
from lutq.cuda import (
    DTYPES,
    FEW_INPUTS,
    GRIDS,
    LUT_LIMIT,
    Arguments,
    Prepacked,
    aligned,
    multiply_sums,
    prepack,
    properties,
    rows_limit,
)
from lutq.decode import products, reference
from lutq.decode.fusion import Fusion, Norm
from lutq.errors import LutqError
from lutq.launch import (
    EIGHT,
    FEW,
    FUSED,
    ONE,
    FusedPlan,
    GemvPlan,
    Gpu,
    bit_blocks,
    fused_plan,
    gemv_plan,
    plan,
    slabs,
    takes_gemv,
)
from lutq.ops import choose_backend, working_backend
from lutq.pack import Packed, dequantize
from lutq.paths import shipped
from lutq.prepack import PANEL, SLAB, TILE, UNIT, unpack_codes, unpack_records

H200 = Gpu("NVIDIA H200", 132, 227 << 10, True, True)
A100 = Gpu("NVIDIA A100", 108, 163 << 10, False, False)
RTX = Gpu("NVIDIA GeForce RTX 3090", 82, 99 << 10, False, False)
GPUS = [H200, A100, RTX]
FUSED_GPUS = [H200, Gpu("NVIDIA H100 PCIe", 114, 227 << 10, True, True)]
SOURCES = {path.name: path.read_text() for path in sorted(shipped("kernels").glob("*.cu*"))}
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


# The text of the kernels


@functools.cache
def found(pattern, file=None):
    """The only match of a regular expression in a source file, or in all of them."""
    text = "\n".join(SOURCES.values()) if file is None else SOURCES[file]
    matches = re.findall(pattern, text)
    assert len(matches) == 1, f"{pattern!r} is {len(matches)} times in {file or 'kernels/'}: {matches}"
    return matches[0]


def conditional(expression):
    """`a ? b ? c : d : e` without brackets in Python."""
    condition, mark, rest = expression.partition("?")
    if not mark:
        return expression
    depths = itertools.accumulate((c == "?") - (c == ":") for c in rest)
    end = next(i for i, depth in enumerate(depths) if depth < 0)
    return f"(({conditional(rest[:end])}) if ({condition}) else ({conditional(rest[end + 1 :])}))"


@functools.cache
def compiled(expression):
    """A C++ expression of integers for Python's eval."""
    expression = re.sub(r"\(size_t\)|\b(?:l|a|shape)\.", "", expression)
    expression = expression.replace("||", " or ").replace("&&", " and ").replace("/", "//")
    open_brackets = [""]
    for c in " ".join(expression.split()):
        if c == ")":
            c = f"({conditional(open_brackets.pop())})"
        if c == "(":
            open_brackets.append("")
        else:
            open_brackets[-1] += c
    return compile(conditional(*open_brackets), expression, "eval")


def value(expression, names):
    return eval(compiled(expression), {"__builtins__": {}}, dict(names))


def constants(declarations, names):
    """`A = 1, B = A * 2` -> names with A and B."""
    names = dict(names)
    for declaration in re.split(r",(?![^(]*\))", declarations):
        name, expression = declaration.split("=", 1)
        names[name.strip()] = value(expression, names)
    return names


def kernel_constants():
    names = constants(found(r"constexpr int (TILE = [^;]*);"), {})
    return constants(found(r"constexpr int (MAX_THREADS = [^;]*);"), names)


def modes():
    """Rows that a launch takes at most -> its mode, as the kernels call it."""
    return {rows: mode for mode, rows in constants(found(r"enum Mode \{([^}]*)\}"), {}).items()}


def shared_bytes(N, K, M, mode, bits, group, how):
    """What lut_gemm asks for, from its own expressions."""
    names = kernel_constants() | {"BITS": bits, "M": M, **how._asdict()}
    names |= {name: rows for rows, name in modes().items()} | {"MODE": mode}
    divisor, large, small = found(
        r"a\.group % (\d+) == 0 \? by_mode<BITS, GRID, (\d+)>\(a, l\) : by_mode<BITS, GRID, (\d+)>\(a, l\)"
    )
    names["H"] = int(large) if group % int(divisor) == 0 else int(small)
    columns = found(r"(?s)struct Columns \{(.*?)\n\};")
    for declaration in re.findall(r"constexpr (?:int|bool) ([^;]*);", columns):
        names = constants(declaration, names)
    for first in ("STAGES", "CODES", "STAGE"):
        names = constants(found(rf"constexpr int ({first} = [^;]*);", "stream.cuh"), names)
    scratch = found(r"constexpr int scratch_bytes\(bool split\) \{ return ([^;]*); \}")
    names["scratch_bytes"] = lambda uses: value(scratch.replace("split", "uses"), {"uses": uses})
    names["tiles"] = -(-N // names["TILE"])
    launch = re.sub(r"//.*|Columns<[^<>]*>::", "", found(r"(?s)int launch\(const Linear& a, const Launch& l\) \{(.*?)\n\}"))
    for declarations in re.findall(r"const (?:int|size_t) ([^;]*);", re.sub(r"Stream<[^<>]*>::", "", launch)):
        names = constants(declarations, names)
    return names["bytes"]


def test_the_constants_are_those_of_the_kernels():
    names = kernel_constants()
    stages = constants(found(r"static constexpr int (STAGES = [^,]*)"), names)["STAGES"]
    scratch = int(found(r"scratch_bytes\(bool split\) \{ return split \? (\d+) : 0; \}"))
    assert (names["TILE"], names["PANEL"], names["UNIT"]) == (TILE, PANEL, UNIT)
    assert (names["MAX_THREADS"], scratch, stages) == (32 * lutq.launch.MAX_WARPS, lutq.launch.SCRATCH, lutq.launch.STAGES)
    assert modes() == {getattr(lutq.launch, name): name for name in ("ONE", "FEW", "EIGHT")}


def test_the_dtypes_and_grids_are_those_of_the_kernels():
    dtypes = constants(found(r"enum Dtype \{([^}]*)\}"), {})
    assert dtypes == {"F16": DTYPES[torch.float16], "BF16": DTYPES[torch.bfloat16], "F32": DTYPES[torch.float32]}
    assert constants(found(r"enum Grid \{([^}]*)\}"), {}) == {name.upper(): number for name, number in GRIDS.items()}


def struct_fields(name):
    """The fields of a struct of the kernels, as ctypes has them."""
    body = re.sub(r"//[^\n]*", "", found(rf"struct {name} \{{([^}}]*)\}};"))
    fields = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        kind, names = re.fullmatch(r"((?:const )?(?:unsigned )?\w+\*?)\s+([\w, ]+)", declaration).groups()
        ctype = ctypes.c_void_p if kind.endswith("*") else {"int64_t": ctypes.c_int64, "int": ctypes.c_int}[kind]
        fields += [(name.strip(), ctype) for name in names.split(",")]
    return fields


def test_arguments_are_the_struct():
    assert list(Arguments._fields_) == struct_fields("Linear")


def test_the_plan_of_fused_gemm_is_the_struct():
    assert list(FusedPlan._fields_) == struct_fields("Plan")


# plan


SHAPES = list(itertools.product((1, 16, 100, 4096, 14336, 128256), (1, 33, 512, 576, 4096, 14336)))


def launches():
    """Every number of rows in every mode that takes it."""
    return [(M, mode) for mode in (ONE, FEW, EIGHT) for M in range(1, mode + 1)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_plans_fit(gpu, bits):
    most = kernel_constants()["MAX_THREADS"]
    for (N, K), group in itertools.product(SHAPES, (32, 128)):
        for M, mode in launches():
            how, about = plan(N, K, mode, bits, group, gpu), f"{gpu=} {N=} {K=} {M=} {mode=} {bits=} {group=}"
            assert min(how) >= 1, f"{about} {how=}"
            assert how.blocks % how.split == 0, f"{about} {how=}"
            assert how.split == 1 or gpu.clusters, f"{about} {how=}"
            assert how.k_warps * how.n_warps * 32 <= most, f"{about} {how=}"
            assert how.blocks // how.split <= -(-N // (2 * TILE)), f"{about} {how=}"
            needed = shared_bytes(N, K, M, mode, bits, group, how)
            assert needed <= gpu.shared, f"{about} {how=} {needed=}"


def test_shared_bytes_by_hand():
    """The parsed formula once by hand, so that a wrong parse shows: two warps, 5 pairs of tiles for each of 100 clusters."""
    ring = 4 * 2 * (3 * 512 + 2 * 4 * 32)
    one = shared_bytes(16 * 1000, 4096, 1, ONE, 3, 128, lutq.launch.Plan(100, 1, 2, 1))
    assert one == 2 * (ring + 2048) + 10 * 2 * 16 * 4
    eight = shared_bytes(16 * 1000, 4096, 7, EIGHT, 3, 128, lutq.launch.Plan(200, 2, 2, 1))
    assert eight == 2 * ring + 10 * (2 * 128 + 16 * 7) * 4
    few = shared_bytes(16, 4096, 4, FEW, 1, 32, lutq.launch.Plan(1, 1, 1, 1))
    assert few == 4 * 2 * (512 + 8 * 2 * 32) + 2048 + 2 * 64 * 4


def test_no_plan_says_what_to_do():
    for M in (ONE, FEW, EIGHT):
        with pytest.raises(
            LutqError, match=r"Toy has too little shared memory for 4 bits in groups of 32: use --backend reference"
        ):
            plan(4096, 4096, M, 4, 32, Gpu("Toy", 10, 16 << 10, False, False))


def test_a_plan_needs_what_the_kernel_asks_for():
    """To the byte: with as much shared memory it is made again, with one byte less it is not."""
    for (N, K), bits, group, (M, mode) in itertools.product(SHAPES, (1, 3, 4), (32, 128), ((1, ONE), (4, FEW), (8, EIGHT))):
        how, about = plan(N, K, mode, bits, group, H200), f"{N=} {K=} {mode=} {bits=} {group=}"
        needed = shared_bytes(N, K, M, mode, bits, group, how)
        assert plan(N, K, mode, bits, group, H200._replace(shared=needed)) == how, f"{about} {how=} {needed=}"
        with contextlib.suppress(LutqError):
            assert plan(N, K, mode, bits, group, H200._replace(shared=needed - 1)) != how, f"{about} {how=} {needed=}"


# gemv_plan


GEMV_GPUS = [H200, Gpu("NVIDIA H100 PCIe", 114, 227 << 10, True, True), Gpu("NVIDIA B200", 148, 227 << 10, True, False)]
GEMV_SHAPES = list(itertools.product((1, 16, 100, 1100, 4096, 14336, 128256), (1, 1024, 1025, 2300, 4096, 14336)))


@pytest.fixture
def everywhere(monkeypatch):
    """lut_gemv for every layer that it takes."""
    monkeypatch.setattr(lutq.cuda, "bit_blocks", lambda *shape: 0)
    for name, most in (("GEMV_BITS", 1), ("GEMV_LEAST", 0), ("GEMV_MOST", {})):
        monkeypatch.setattr(lutq.launch, name, most)
    gemv_plan.cache_clear()
    yield
    gemv_plan.cache_clear()


def gemv_layers(bits):
    return [
        LayerConfig(bits, group, grid, offsets)
        for group, grid, offsets in itertools.product((0, 64, 128, 192), GRIDS, (False, True))
    ]


@functools.cache
def gemv_text(pattern):
    """C++ of lut_gemv.cuh for `constants`."""
    text = re.sub(r"//[^\n]*|\(unsigned\)|\bSlots::", "", found(pattern, "lut_gemv.cuh"))
    return text.replace("1ull", "1").replace("blockIdx.x", "block").replace("gridDim.x", "blocks")


@functools.cache
def gemv_constants():
    names = kernel_constants() | {"BCQ": GRIDS["bcq"], "UNIFORM": GRIDS["uniform"], "min": min, "max": max}
    for first in ("SLAB", "GEMV_THREADS", "HALF_TABLES", "RING"):
        names = constants(gemv_text(rf"\nconstexpr int ({first} = [^;]*);"), names)
    return names


def gemv_names(N, K, layer):
    """What lut_gemv derives from a layer, by its own expressions."""
    whole = layer.group or UNIT * -(-K // UNIT)
    divisor, large, small = found(
        r"a\.group % (\d+) == 0 \? launch_gemv<BITS, GRID, OFFSETS, (\d+)>[^?:]*: launch_gemv<BITS, GRID, OFFSETS, (\d+)>",
        "lut_gemv.cuh",
    )
    names = gemv_constants() | {"BITS": layer.bits, "GRID": GRIDS[layer.grid], "OFFSETS": layer.offsets, "group": whole}
    names["PIECES"] = 128 // int(large if whole % int(divisor) == 0 else small)
    for declarations in re.findall(r"constexpr int ([^;]*);", gemv_text(r"(?s)struct Slots \{(.*?)\n\};")):
        names = constants(declarations, names)
    return names | {"tiles": -(-N // TILE), "units": -(-K // UNIT)}


def gemv_launch(N, K, layer, how, partial=False):
    """What the launch of lut_gemv derives, from its own expressions; `refused` says that it does not launch."""
    body = gemv_text(r"(?s)int launch_gemv\([^)]*\) \{(.*?)\n\}")
    names = gemv_names(N, K, layer) | {"blocks": how.blocks, "split": how.split, "partial": partial}
    for declarations in re.findall(r"const (?:int|unsigned|size_t) ([^;]*);", body):
        names = constants(declarations, names)
    return names | {"refused": value(re.search(r"if \((.*)\) return cudaErrorInvalidValue;", body)[1], names)}


def gemv_shares(N, K, layer, how, partial=False):
    """What `Share` gives to every block: names that it derives, (slab, warp) -> halves of tiles."""
    body = gemv_text(r"(?s)struct Share \{(.*?)\n\};")
    of_all, first, summed, finished = re.search(r"(?s): (.*) \{\n(.*)if \(partial\) \{(.*)\} else \{(.*?)\}", body).groups()
    begin, end = re.findall(r"return ([^;]*);", body)
    whole = gemv_names(N, K, layer) | {"split": how.split, "blocks": how.blocks}
    whole["halves"] = value(re.search(r"halves\((.*?)\),", of_all)[1], whole)
    lines = [line.strip().removeprefix("const unsigned ") for line in (first + (summed if partial else finished)).split(";")]
    shares = []
    for block in range(how.blocks):
        names, halves = whole | {"block": block}, {}
        for declarations in filter(None, lines):
            names = constants(declarations, names)
        for slab, warp in itertools.product(range(names["slab"], names["slab_end"]), range(names["GEMV_WARPS"])):
            place = names | {"slab": slab, "warp": warp}
            halves[slab, warp] = range(value(begin, place), value(end, place), names["GEMV_WARPS"])
        shares.append((names, halves))
    return shares


def sums_plan(N, K, layer, gpu, monkeypatch):
    """How `multiply_sums` launches lut_gemv."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(lutq.cuda, "properties", lambda device: gpu)
        patch.setattr(lutq.cuda, "kernels", lambda device: None)
        patch.setattr(lutq.cuda, "run_gemv", lambda library, a, how, partial: seen.append(how))
        ready = Prepacked(torch.empty(0), torch.empty(0), False)
        multiply_sums(torch.empty(1, K), ready, torch.empty(1, N), N, layer)
    return seen[0]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("gpu", GEMV_GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gemv_plans_fit(gpu, bits, monkeypatch):
    for (N, K), layer in itertools.product(GEMV_SHAPES, gemv_layers(bits)):
        how, about = gemv_plan(N, K, layer, gpu), f"{gpu.name} {N=} {K=} {layer=}"
        assert how, about
        assert min(how) >= 1, f"{about} {how=}"
        assert how.blocks % how.split == 0, f"{about} {how=}"
        assert how.split <= slabs(K), f"{about} {how=}"
        assert how.blocks <= gpu.processors, f"{about} {how=}"
        assert how.blocks // how.split <= 2 * -(-N // TILE), f"{about} {how=}: a cluster without work"
        kernel = gemv_launch(N, K, layer, how)
        assert not kernel["refused"], f"{about} {how=}"
        assert kernel["bytes"] <= gpu.shared, f"{about} {how=} {kernel['bytes']=}"
        summed = sums_plan(N, K, layer, gpu, monkeypatch)
        assert summed.split == 1, f"{about} {summed=}"
        assert 1 <= summed.blocks <= min(gpu.processors, 2 * -(-N // TILE) * slabs(K)), f"{about} {summed=}"
        assert gemv_launch(N, K, layer, summed, partial=True)["bytes"] <= lutq.launch.GEMV_SHARED <= gpu.shared, about


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_gemv_plan_needs_what_the_kernel_asks_for(bits, monkeypatch):
    """To the byte: with as much shared memory it is made again, with one byte less it is not."""
    monkeypatch.setattr(lutq.launch, "GEMV_SHARED", 0)
    for (N, K), layer in itertools.product(GEMV_SHAPES, gemv_layers(bits)):
        how, about = gemv_plan(N, K, layer, H200), f"{N=} {K=} {layer=}"
        needed = gemv_launch(N, K, layer, how)["bytes"]
        assert gemv_plan(N, K, layer, H200._replace(shared=needed)) == how, f"{about} {how=} {needed=}"
        assert gemv_plan(N, K, layer, H200._replace(shared=needed - 1)) != how, f"{about} {how=} {needed=}"


def test_gemv_shared_bytes_by_hand():
    """The parsed formula once by hand, so that a wrong parse shows: 3 bits, 4 pairs of blocks for 101 halves of tiles."""
    ring = 131072 + 16 * (2 * 3 * 512 + 2 * (128 + 64))
    for layer, offsets in ((LayerConfig(3, 128, "bcq", False), 0), (LayerConfig(3, 128), 16 * 2 * 64)):
        one = gemv_launch(16 * 50 + 1, 4096, layer, GemvPlan(4, 1))["bytes"]
        two = gemv_launch(16 * 50 + 1, 4096, layer, GemvPlan(8, 2))["bytes"]
        assert one == ring + offsets + 16 + 26 * 32
        assert two == ring + offsets + 16 + (26 + 2 * 13) * 32
    uniform = gemv_launch(16, 64, LayerConfig(4, 64, "uniform"), GemvPlan(1, 1), partial=True)["bytes"]
    assert uniform == 131072 + 16 * (2 * 4 * 512 + 2 * 2 * (64 + 32)) + 16
    assert gemv_launch(16, 2048, LayerConfig(4, 64), GemvPlan(3, 3))["refused"]
    assert not gemv_launch(16, 2049, LayerConfig(4, 64), GemvPlan(3, 3))["refused"]


def test_the_constants_are_those_of_lut_gemv():
    names = gemv_constants()
    assert (names["GEMV_WARPS"], names["RING"], names["SLAB"]) == (lutq.launch.GEMV_WARPS, lutq.launch.TABLE_BYTES, SLAB)


@pytest.mark.parametrize("partial", [False, True], ids=["finished", "sums"])
def test_every_half_of_a_tile_has_one_block_and_warp(partial, monkeypatch, everywhere):
    """In every slab; and a launch has room for the sums of as many halves as a block finishes."""
    layer = LayerConfig(4, 128)
    for N, K in itertools.product((1, 16, 100, 1100, 9000), (1, 1024, 1025, 2300, 9000)):
        plans = [GemvPlan(split * clusters, split) for split in (1, 2, 3, 8) if split <= slabs(K) for clusters in (1, 2)]
        plans.append(gemv_plan(N, K, layer, H200))
        if partial:
            plans = [GemvPlan(1, 1), sums_plan(N, K, layer, H200, monkeypatch)]
        for how in plans:
            about, covered = f"{N=} {K=} {how=}", torch.zeros(slabs(K), 2 * -(-N // TILE), dtype=torch.int)
            launch = gemv_launch(N, K, layer, how, partial)
            for names, halves in gemv_shares(N, K, layer, how, partial):
                assert 0 <= names["slab"] < names["slab_end"] <= slabs(K), f"{about} {names['block']=}"
                for (slab, _), some in halves.items():
                    covered[slab, list(some)] += 1
                if partial:
                    continue
                kept = names["high"] - names["low"]
                assert 1 <= kept <= launch["halves"], f"{about} {names['block']=} {kept=}"
                ranks = [{"count": kept, "split": how.split, "rank": rank} for rank in range(how.split)]
                ends = [constants(gemv_text(r"const int (own = [^;]*);"), rank) for rank in ranks]
                assert sum(end["own"] for end in ends) == kept, f"{about} {kept=}"
                assert max(end["own"] for end in ends) == ends[0]["most"] <= launch["most"], f"{about} {kept=}"
            assert (covered == 1).all(), f"{about} {covered.unique()=}"


def test_every_row_is_in_a_half_of_a_tile():
    row_of = found(r"int row_of\(unsigned half, int i\) \{ return (.*); \}", "lut_gemv.cuh")
    rows = [value(row_of, gemv_constants() | {"half": half, "i": i}) for half in range(10) for i in range(8)]
    assert sorted(rows) == list(range(80))
    assert all(row // TILE == i // 16 for i, row in enumerate(rows))


def test_records_of_lut_gemv():
    """The kernel multiplies where it means to divide by the group size."""
    k = torch.arange(0, 65536, 32)
    for group in range(64, 8192, 64):
        per_group = gemv_launch(64, 65536, LayerConfig(3, group), GemvPlan(1, 1))["per_group"]
        assert torch.equal((k >> 5) * per_group >> 32, k // group), f"{group=}"


def test_layers_that_lut_gemv_does_not_take(everywhere):
    for bits, grid in itertools.product((1, 4), GRIDS):
        for group in (32, 96, 160):
            layer = LayerConfig(bits, group, grid)
            assert not takes_gemv(layer, H200), f"{layer=}"
            assert gemv_plan(4096, 4096, layer, H200) is None, f"{layer=}"
        for gpu in (A100, RTX, H200._replace(clusters=False), H200._replace(shared=H200.shared - 1)):
            assert gemv_plan(4096, 4096, LayerConfig(bits, 128, grid), gpu) is None, f"{bits=} {gpu=}"
        assert gemv_plan(4096, 4096, LayerConfig(bits, 128, grid), H200), f"{bits=} {grid=}"
        assert gemv_plan(1 << 24, 4096, LayerConfig(bits, 128, grid), H200) is None, f"{bits=} {grid=}: sums of too many rows"


def test_layers_that_lut_gemm_does_faster(monkeypatch, everywhere):
    """Of few bits, small, and large ones of some bits."""
    for name, limit in (("GEMV_BITS", 2), ("GEMV_LEAST", 100 * 1024), ("GEMV_MOST", {3: 200 * 1024})):
        monkeypatch.setattr(lutq.launch, name, limit)
    gemv_plan.cache_clear()
    for N, bits in ((100, ()), (101, (2, 3, 4)), (199, (2, 3, 4)), (200, (2, 4))):
        taken = [b for b in (1, 2, 3, 4) if gemv_plan(N, 1024, LayerConfig(b, 128), H200)]
        assert taken == list(bits), f"{N=} {taken=}"


# bit_blocks


@pytest.fixture
def bits_everywhere(monkeypatch):
    """bit_gemv for every layer that it takes."""
    monkeypatch.setattr(lutq.launch, "BIT_MOST", {})
    bit_blocks.cache_clear()
    yield
    bit_blocks.cache_clear()


BIT_SHAPES = list(itertools.product((1, 16, 100, 4096, 14336, 128256), (1, 129, 4096, 14336, 16385, 49152)))


def bit_layers(bits):
    return [LayerConfig(bits, group, grid, offsets) for group, grid, offsets in itertools.product((0, 128), GRIDS, (False, True))]


@functools.cache
def bit_text(pattern):
    """C++ of bit_gemv.cuh for `constants`."""
    return (
        re.sub(r"//[^\n]*|\(unsigned\)|\bSlot::", "", found(pattern, "bit_gemv.cuh"))
        .replace("1ull", "1")
        .replace("sizeof(float4)", "16")
    )


@functools.cache
def bit_constants():
    names = kernel_constants() | {"BCQ": GRIDS["bcq"], "UNIFORM": GRIDS["uniform"], "min": min}
    for first in ("BIT_WARPS", "BLOCK_INPUTS", "PASS_UNITS"):
        names = constants(bit_text(rf"\nconstexpr int ({first} = [^;]*);"), names)
    return names


def bit_launch(N, K, layer, blocks, gated=False):
    """What the launch of bit_gemv derives, from its own expressions: `Deal`, and the bytes of shared memory."""
    names = bit_constants() | {"BITS": layer.bits, "GRID": GRIDS[layer.grid], "OFFSETS": layer.offsets, "gated": gated}
    for_pass = bit_text(r"int bits_bytes\(int units\) \{ return ([^;]*); \}")
    names["bits_bytes"] = lambda units: value(for_pass, bit_constants() | {"units": units})
    names |= {"group": layer.group or UNIT * -(-K // UNIT), "tiles": -(-N // TILE), "units": -(-K // UNIT), "blocks": blocks}
    for declarations in re.findall(r"constexpr int ([^;]*);", bit_text(r"(?s)struct Slot \{(.*?)\n\};")):
        names = constants(declarations, names)
    body = (
        bit_text(r"(?s)int launch_bits\([^)]*\) \{(.*?)\n\}").replace("shape.units", "all_units").replace("fusion.gated", "gated")
    )
    names["all_units"] = names["units"]
    for declarations in re.findall(r"const int ([^;]*);", body):
        names = constants(declarations, names)
    fields = re.split(r",(?![^(]*\))", re.search(r"(?s)const Deal deal\{(.*?)\};", body)[1])
    deal = dict(zip(("deal_tiles", "deal_more", "deal_units", "deal_passes", "per_group"), fields, strict=True))
    for name, expression in deal.items():
        names[name] = value(expression, names)
    total = re.search(r"const size_t bytes = ([^;]*);", body)[1].replace("deal.", "deal_")
    return names | {"bytes": value(total, names)}


@pytest.mark.usefixtures("bits_everywhere")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bit_gemv_needs_what_it_asks_for(bits):
    """To the byte: with as much shared memory it runs, with one byte less it does not."""
    for (N, K), layer, together in itertools.product(BIT_SHAPES, bit_layers(bits), (1, 2)):
        N = together * TILE * -(-N // TILE) if together > 1 else N
        about, blocks = f"{N=} {K=} {layer=} {together=}", bit_blocks(N, K, layer, H200._replace(shared=1 << 30), together)
        assert 1 <= blocks <= min(H200.processors, -(-N // (TILE * together))), f"{about} {blocks=}"
        needed = bit_launch(N, K, layer, blocks, together > 1)["bytes"]
        assert bit_blocks(N, K, layer, H200._replace(shared=needed), together) == blocks, f"{about} {needed=}"
        assert bit_blocks(N, K, layer, H200._replace(shared=needed - 1), together) == 0, f"{about} {needed=}"
        assert needed <= H200.shared or N > 100000 or (together > 1 and K > 16384), f"{about} {needed=}: a layer of an LLM"


def test_bit_gemv_shared_bytes_by_hand():
    """The parsed formulas once by hand, so that a wrong parse shows: 65 units are two passes, whose bits are made by whole warps,
    and a block has 2 tiles, or 2 pairs of them.
    """
    ring = 16 * 4 * (3 * 512 + 2 * 4 * 32)
    launch = bit_launch(16 * 133, 65 * 256, LayerConfig(3, 128), 132)
    assert launch["bytes"] == ring + 72 * 528 + 16 * 16 + 2 * 16 * 64
    fields = ("deal_tiles", "deal_more", "deal_units", "deal_passes", "per_group")
    assert [launch[name] for name in fields] == [1, 1, 33, 2, 1 << 30]
    gated = bit_launch(32 * 133, 64 * 256, LayerConfig(3, 128), 132, gated=True)
    assert gated["bytes"] == ring + 128 * 528 + 16 * 16 + 4 * 16 * 64
    assert [gated[name] for name in fields] == [1, 1, 64, 1, 1 << 30]
    names = bit_constants()
    ours = (lutq.launch.BIT_WARPS, lutq.launch.BIT_STAGES, lutq.launch.PASS_UNITS, lutq.launch.BLOCK_BYTES)
    assert ours == tuple(names[name] for name in ("BIT_WARPS", "BIT_STAGES", "PASS_UNITS", "BLOCK_BYTES"))


def test_every_unit_of_a_tile_has_one_warp():
    """By `Share`: from one unit on, in the order of tiles, whatever the pass and however few there are."""
    derive, result = re.search(
        r"(?s)const unsigned ([^;]*);\s*([^;]*);", bit_text(r"(?s)struct Share \{(.*?)\n\};").split("unit_end(unit_end) {")[1]
    ).groups()
    for tiles, begin, end in itertools.product((1, 2, 7, 61), (0, 33), (34, 64)):
        covered, units = [], end - begin
        for warp in range(lutq.launch.BIT_WARPS):
            names = bit_constants() | {"tiles": tiles, "begin": begin, "unit_end": end, "warp": warp}
            names = constants(result, constants(derive, names))
            first = names["tile"] * units + names["unit"] - begin
            covered += range(first, first + names["items"])
            assert begin <= names["unit"] < end, f"{tiles=} {begin=} {end=} {warp=}"
        assert covered == list(range(tiles * units)), f"{tiles=} {begin=} {end=}"


@pytest.mark.usefixtures("bits_everywhere")
def test_layers_that_bit_gemv_does_not_take():
    for bits, grid in itertools.product((1, 2, 3, 4), GRIDS):
        for group in (32, 64, 192):
            assert bit_blocks(4096, 4096, LayerConfig(bits, group, grid), H200) == 0, f"{bits=} {group=}"
        for gpu in (A100, RTX, H200._replace(fused=False)):
            assert bit_blocks(4096, 4096, LayerConfig(bits, 128, grid), gpu) == 0, f"{bits=} {gpu=}"
        assert bit_blocks(1 << 24, 4096, LayerConfig(bits, 128, grid), H200) == 0, f"{bits=} {grid=}: sums of too many rows"
        assert bit_blocks(4096, 4096, LayerConfig(bits, 0, grid), H200) == 132, f"{bits=} {grid=}"


def test_layers_that_lut_gemm_does_faster_than_bit_gemv(monkeypatch, bits_everywhere):
    """Large ones of some bits."""
    monkeypatch.setattr(lutq.launch, "BIT_MOST", {2: 200 * 1024})
    for N, bits in ((199, (1, 2, 3, 4)), (200, (1, 3, 4))):
        taken = [b for b in (1, 2, 3, 4) if bit_blocks(N, 1024, LayerConfig(b, 128), H200)]
        assert taken == list(bits), f"{N=} {taken=}"


def test_records_of_bit_gemv():
    """The kernel multiplies where it means to divide by the group size."""
    k = torch.arange(0, 65536, 32)
    for group in range(128, 8192, 128):
        per_group = bit_launch(64, 65536, LayerConfig(3, group), 1)["per_group"]
        assert torch.equal((k >> 5) * per_group >> 32, k // group), f"{group=}"


# fused_plan


def fused_text(text):
    """C++ of fused_gemm.cuh for `constants`: N is a template's, a.N of the arguments is a_N."""
    text = re.sub(r"//[^\n]*|\(unsigned\)|\bplan\.", "", text).replace("1ull", "1")
    return re.sub(r"\b(a|z|shape)\.", r"\1_", text)


def kernel_most_groups(N):
    return value(found(r"constexpr int most_groups\(int N\) \{ return ([^;]*); \}"), {"N": N})


@functools.cache
def fused_constants():
    names = kernel_constants() | {"BCQ": GRIDS["bcq"], "UNIFORM": GRIDS["uniform"], "most_groups": kernel_most_groups}
    for first in ("GROUP_THREADS", "BLOCK", "KEPT_STRIDE", "MOST_STAGES"):
        names = constants(found(rf"constexpr int ({first} = [^;]*);"), names)
    return names


@functools.cache
def fused_statements():
    """Of the launch: declarations in order, the condition under which it is refused, and its threads."""
    body = found(r"(?s)int launch\(const Linear& a, const Plan& plan, cudaStream_t stream\) \{(.*?)\n\}")
    declarations, rest = fused_text(body).split("if (", 1)
    lines = [re.sub(r"^const (int|size_t) ", "", line.strip()) for line in declarations.split(";")]
    refused = re.match(r"(?s)(.*?)\)\s+return cudaErrorInvalidValue;", rest)[1]
    threads = re.search(r"groups \* GROUP_THREADS[^;,]*", rest)[0]
    return [line for line in lines if " = " in line], refused, threads


@functools.cache
def shape_initialisers():
    body = found(r"(?s)Shape\(const Linear& a, int split\)\s*:(.*?)\{\}")
    return [re.fullmatch(r"(\w+)\((.*?)\),?", line.strip()).groups() for line in fused_text(body).strip().splitlines()]


def fused_launch(N, K, rows, layer, how):
    """What the launch of fused_gemm derives, from its own expressions; `refused` says that it does not launch."""
    how = {name: getattr(how, name) for name, _ in FusedPlan._fields_}
    divisor, large, small = found(
        r"a\.group % (\w+) == 0\s*\? by_rows<BITS, GRID, (\w+)>\(a, rows, plan, stream\)\s*: by_rows<BITS, GRID, (\w+)>"
    )
    names = fused_constants() | {"a_N": N, "a_K": K, "a_group": layer.group or UNIT * -(-K // UNIT), "a_bits": layer.bits}
    names |= {"a_grid": GRIDS[layer.grid], "a_offsets": int(layer.offsets)}
    shape = names | {"split": how["split"]}
    for name, expression in shape_initialisers():
        shape[name] = value(expression, shape)
    names |= {f"shape_{name}": shape[name] for name, _ in shape_initialisers()} | how
    names |= {"BITS": layer.bits, "GRID": GRIDS[layer.grid], "N": rows}
    names["H"] = value(large if names["a_group"] % value(divisor, names) == 0 else small, names)
    statements, refused, threads = fused_statements()
    for declarations in statements:
        names = constants(declarations, names)
    return names | {"refused": value(refused, names), "threads": value(threads, names)}


@functools.cache
def shares(begin, count, parts):
    """[first, last) of every part of `count`, as the kernel divides them by the declaration that starts with `begin`."""
    declarations = fused_text(found(rf"const int ({begin} = \(unsigned\)z\.[^;]*);"))
    whole = {"z_panels": count, "z_units": count, "clusters": parts, "split": parts}
    divided = [constants(declarations, whole | {"cluster": i, "rank": i}) for i in range(parts)]
    first, last = (name.split("=")[0].strip() for name in declarations.split(","))
    return [(names[first], names[last]) for names in divided]


def assert_covers(parts, count, about):
    """Parts are [0, count) in order, none empty."""
    assert parts[0][0] == 0, about
    assert parts[-1][1] == count, about
    assert all(last == following for (_, last), (following, _) in itertools.pairwise(parts)), about
    assert all(first < last for first, last in parts), about


FUSED_SHAPES = list(
    itertools.product((1, 64, 65, 1000, 4096, 14336, 128256, 200000), (1, 256, 257, 513, 1024, 4096, 14336, 60000))
)


def fused_layers(bits):
    return [
        LayerConfig(bits, group, grid, offsets)
        for group, grid, offsets in itertools.product((0, 32, 96, 128, 384), GRIDS, (False, True))
    ]


@pytest.mark.parametrize("gpu", FUSED_GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_fused_plans_fit(gpu, bits):
    names = fused_constants()
    assert gpu.shared == 232448
    bounds = found(r"__launch_bounds__\(([^\n]*), 1\)\s+fused_gemm")
    for (N, K), layer, rows in itertools.product(FUSED_SHAPES, fused_layers(bits), FUSED):
        how, about = fused_plan(N, K, rows, layer, gpu), f"{gpu.name} {N=} {K=} {layer=} {rows=}"
        about += f" {[(name, getattr(how, name)) for name, _ in FusedPlan._fields_]}"
        kernel = fused_launch(N, K, rows, layer, how)
        groups = how.k_groups * how.n_groups
        assert min(getattr(how, name) for name, _ in FusedPlan._fields_) >= 1, about
        assert not kernel["refused"], about
        assert kernel["bytes"] <= gpu.shared, f"{about} {kernel['bytes']=}"
        assert kernel["threads"] <= value(bounds, kernel), f"{about} {kernel['threads']=}"
        assert how.stages & (how.stages - 1) == 0, f"{about}: stages are counted by masks"
        assert groups * how.stages <= min(32, names["MOST_STAGES"]), f"{about}: a lane for every barrier"
        assert how.slots <= min(32, names["MOST_SLOTS"]), about
        assert groups <= lutq.launch.MOST_GROUPS[rows], about
        assert how.builders <= 3, about
        assert kernel["z_slot"] % 128 == kernel["z_scales"] % 128 == kernel["z_stage"] % 16 == 0, about
        # all panels and units, and none without work
        clusters, panels = how.blocks // how.split, -(-N // PANEL)
        assert how.blocks == clusters * how.split, about
        by_cluster, by_rank = shares("first", panels, clusters), shares("begin", -(-K // UNIT), how.split)
        assert_covers(by_cluster, panels, about)
        assert_covers(by_rank, -(-K // UNIT), about)
        assert max(last - first for first, last in by_cluster) == kernel["z_most_panels"] >= how.n_groups, about
        assert max(end - begin for begin, end in by_rank) >= how.k_groups, about


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_fused_plan_needs_what_the_kernel_asks_for(bits):
    """To the byte: with as much shared memory it is made again, with one byte less it is not."""
    for (N, K), layer, rows in itertools.product(FUSED_SHAPES[::3], fused_layers(bits), FUSED):
        how, about = fused_plan(N, K, rows, layer, H200), f"{N=} {K=} {layer=} {rows=}"
        needed = fused_launch(N, K, rows, layer, how)["bytes"]
        assert bytes(fused_plan(N, K, rows, layer, H200._replace(shared=needed))) == bytes(how), f"{about} {needed=}"
        with contextlib.suppress(LutqError):
            assert bytes(fused_plan(N, K, rows, layer, H200._replace(shared=needed - 1))) != bytes(how), f"{about} {needed=}"


def test_fused_shared_bytes_by_hand():
    """The parsed formula once by hand: 2 x 2 warpgroups, 16 rows, 3 bits in groups of 128, 3 panels for each of 10 clusters."""
    how = FusedPlan(20, 2, 2, 2, 3, 2, 2, 2)
    kernel = fused_launch(64 * 30 - 5, 4096, 16, LayerConfig(3, 128), how)
    slot = 4 * 256 * 16 * 2 + 4 * 16 * 4
    ring = 4 * 2 * 2 * (3 * 2048 + 2 * 4 * 4 * 32)
    assert kernel["bytes"] == 512 + 2 * slot + ring + 2 * 3 * 16 * 68 * 4
    assert (kernel["threads"], kernel["refused"]) == (4 * 128 + 4 * 32, False)


def test_the_launch_refuses_what_would_not_fit():
    layer = LayerConfig(3, 128)
    for wrong in ({"k_groups": 4}, {"builders": 4}, {"slots": 9}, {"stages": 8}):
        fields = {"blocks": 2, "split": 2, "k_groups": 2, "n_groups": 2, "builders": 3, "item": 1, "stages": 2, "slots": 2}
        assert not fused_launch(64, 4096, 16, layer, FusedPlan(**fields))["refused"]
        assert fused_launch(64, 4096, 16, layer, FusedPlan(**fields | wrong))["refused"], f"{wrong=}"


def test_the_constants_are_those_of_fused_gemm():
    names, ours = fused_constants(), lutq.launch
    assert (names["BARRIER_BYTES"], names["KEPT_STRIDE"]) == (ours.BARRIER_BYTES, ours.KEPT_STRIDE)
    assert names["BARRIER_BYTES"] >= 2 * 8 * (names["MOST_STAGES"] + names["MOST_SLOTS"]), "two barriers of 8 bytes for each"
    assert tuple(map(int, re.findall(r"case (\d+): return launch<BITS, GRID, H, \1>", SOURCES["fused_gemm.cuh"]))) == FUSED
    assert found(r"plan\.builders > (\d+)\)\s+return") == str(ours.BUILDERS)
    assert {rows: kernel_most_groups(rows) for rows in FUSED} == ours.MOST_GROUPS


def test_records_of_fused_gemm():
    """The kernel multiplies where it means to divide by the group size, and a slot of the ring has room for an item's records."""
    k = torch.arange(0, 65536, 32)
    for group in range(32, 4096, 32):
        names = fused_launch(64, 65536, 16, LayerConfig(3, group), FusedPlan(1, 1, 1, 1, 3, 1, 2, 2))
        of = (k >> 5) * names["z_per_group"] >> 32 if names["z_per_group"] else k >> 5
        assert torch.equal(of, k // group), f"{group=}"
        for item in (1, 2):
            begin = torch.arange(0, 65536 - item * UNIT + 1, UNIT)
            most = (((begin + item * UNIT - 1) // group - begin // group) + 1).max().item()
            assert most <= item * UNIT // names["H"], f"{group=} {item=}"


def test_no_fused_plan_says_why():
    for rows in FUSED:
        with pytest.raises(
            LutqError, match="Toy has too little shared memory for 4 bits in groups of 32: use --backend reference"
        ):
            fused_plan(4096, 4096, rows, LayerConfig(4, 32), Gpu("Toy", 10, 16 << 10, True, True))


@pytest.mark.parametrize(
    ("capability", "clusters", "fused"),
    [((8, 0), False, False), ((8, 9), False, False), ((9, 0), True, True), ((10, 0), True, False), ((12, 0), True, False)],
)
def test_where_fused_gemm_runs(monkeypatch, capability, clusters, fused):
    found = SimpleNamespace(
        name="Toy", major=capability[0], minor=capability[1], multi_processor_count=10, shared_memory_per_block_optin=99
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert properties.__wrapped__(torch.device("cuda")) == Gpu("Toy", 10, 99, clusters, fused)


def test_rows_limit():
    for bits in (1, 2, 3, 4):
        for fused in (False, True):
            unknown = rows_limit("Abacus 9000", bits, fused)
            assert unknown >= EIGHT, f"{bits=} {fused=} {unknown=}"
            assert rows_limit("", bits, fused) == unknown, f"{bits=} {fused=}"
        assert rows_limit("", bits, False) < rows_limit("", bits, True), f"{bits=}: fused_gemm pays longer"
        assert rows_limit("NVIDIA H200", bits, True) >= EIGHT, f"{bits=}"


@pytest.mark.parametrize("content", ["{", "[1]", '{"NVIDIA H200": 1}', '{"NVIDIA H200": {"1": 16, "2": 16, "3": 16}}'])
def test_a_damaged_table_of_the_user(monkeypatch, tmp_path, content):
    own = tmp_path / "gpus.json"
    monkeypatch.setattr(lutq.cuda, "user_table", lambda: own)
    own.write_text(json.dumps({"Abacus 9000": {str(bits): 11 * bits for bits in (1, 2, 3, 4)}}))
    rows_limit.cache_clear()
    assert [rows_limit("Abacus 9000", bits, False) for bits in (1, 4)] == [11, 44]
    own.write_text(content)
    rows_limit.cache_clear()
    with pytest.raises(LutqError, match=r"gpus\.json is not a table of row limits: remove it"):
        rows_limit("NVIDIA H200", 4, True)
    monkeypatch.undo()
    rows_limit.cache_clear()


# aligned


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_aligned(dtype):
    base = torch.arange(4096.0).to(dtype)
    assert base.data_ptr() % 16 == 0, "torch aligns its tensors"
    per_16 = 16 // dtype.itemsize
    cases = {  # x, whether it may be used as it is
        "contiguous": (base[:320].view(5, 64), True),
        "rows apart": (base[:640].view(5, 128)[:, :64], True),
        "one row": (base[:64].view(1, 64), True),
        "rows the same": (base[:64].expand(5, 64), True),
        "an aligned offset": (base[per_16 : per_16 + 320].view(5, 64), True),
        "an odd offset": (base[1:321].view(5, 64), False),
        "K % 8": (base[:320].view(8, 40)[:, :36], False),
        "K = 1": (base[:5].view(5, 1), False),
        "rows 68 apart": (base[:340].view(5, 68)[:, :64], False),
        "transposed": (base[:320].view(64, 5).T, False),
        "every other input": (base[:640].view(5, 128)[:, ::2], False),
        "no rows": (base[:0].view(0, 64), True),
    }
    for name, (x, as_it_is) in cases.items():
        ready, about = aligned(x), f"{name} {dtype=}"
        assert torch.equal(ready, x), about
        assert ready.dtype == dtype, about
        assert ready.stride(1) == 1, f"{about} {ready.stride()=}"
        assert ready.stride(0) % 8 == 0, f"{about} {ready.stride()=}"
        assert ready.data_ptr() % 16 == 0, about
        assert not as_it_is or ready is x, f"{about}: copied in vain"
        if not as_it_is:
            rest = ready.as_strided((ready.shape[0], ready.stride(0)), ready.stride())[:, x.shape[1] :]
            assert not rest.any(), f"{about}: what pads K is not zero"


# multiply, prepack and check, on the stand-in


def at(address, dtype, *shape):
    """A tensor over memory, as a kernel would see it."""
    count = torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype).view(shape)


class StandIn:
    """The library in float64. `calls`: (a kernel of products, mode, M) and (dequantize, rows); `plans`: those of every mode.

    `factors`: kernel -> what its products come out times.
    """

    def __init__(self):
        self.calls, self.plans, self.factors = [], {}, {}

    def weight(self, a):
        layer = LayerConfig(a.bits, a.group, next(name for name, n in GRIDS.items() if n == a.grid), bool(a.offsets))
        P, U = -(-a.N // PANEL), -(-a.K // UNIT)
        G = -(-U * UNIT // a.group)
        record = 32 * (a.bits + a.offsets) if layer.grid == "bcq" else 32 + 16 * a.offsets
        codes, records = at(a.codes, torch.int32, P, U, 4, 128 * a.bits), at(a.records, torch.uint8, P, G, 4, record)
        packed = Packed(unpack_codes(codes, a.N, a.K, layer.grid), **unpack_records(records, a.N, a.K, layer))
        return dequantize(*packed, a.group, layer.grid, a.K, torch.float64)

    def __getattr__(self, name):
        kernel, bits = re.fullmatch(r"lutq_(lut_gemm|lut_gemv|bit_gemv|fused_gemm)_([1-4])bit", name).groups()
        return functools.partial(getattr(self, kernel), int(bits))

    def lut_gemm(self, bits, reference, mode, blocks, split, k_warps, n_warps, stream):
        a = reference._obj
        assert mode in (ONE, FEW) or (mode == EIGHT and list(DTYPES)[a.x_dtype] != torch.float32), f"{mode=} {a.x_dtype=}"
        return self.product("lut_gemm", bits, a, mode, (blocks, split, k_warps, n_warps))

    def lut_gemv(self, bits, reference, partial, blocks, split, stream):
        a = reference._obj
        assert a.group % 64 == 0, f"{a.group=}"
        assert blocks % split == 0, f"{blocks=} {split=}"
        assert split <= slabs(a.K), f"{split=} {a.K=}"
        if not partial.value:
            return self.product("lut_gemv", bits, a, ONE, (blocks, split))
        assert split == 1, f"{split=}"
        x, inputs = self.rows("sums", bits, a, ONE, (blocks, split)), SLAB * UNIT
        sums, W = at(partial.value, torch.float32, slabs(a.K), -(-a.N // TILE) * TILE), self.weight(a)
        for s, slab in enumerate(sums):
            part = slice(inputs * s, inputs * (s + 1))
            slab[: a.N] = W[:, part] @ x[0, part].double()
        return 0

    def bit_gemv(self, bits, linear, fusion, blocks, stream):
        a, by = linear._obj, fusion._obj
        assert a.group % 128 == 0, f"{a.group=}"
        assert 1 <= blocks <= -(-a.N // TILE) // (1 + by.gated), f"{blocks=} {a.N=}"
        if bytes(by) == bytes(lutq.cuda.ALONE):
            return self.product("bit_gemv", bits, a, ONE, (blocks,))
        x, W = self.rows("fused", bits, a, ONE, (blocks,)).double(), self.weight(a)
        bias = at(a.bias, list(DTYPES)[a.bias_dtype], a.N) if a.bias else 0
        norm = None
        if by.weight:
            assert list(DTYPES)[a.x_dtype] == torch.float32
            weight, shift = (at(address, list(DTYPES)[by.dtype], a.K) if address else None for address in (by.weight, by.shift))
            norm = Norm(weight, shift, by.eps, bool(by.centered))
        function = next((name for name, number in lutq.cuda.FUNCTIONS.items() if number == by.function), None)
        y = at(a.y, list(DTYPES)[a.y_dtype], 1, a.N // (1 + by.gated))
        how = Fusion(norm, function, bool(by.gated), bool(by.add))
        reference.fused(lambda x: x @ W.T + bias, x, y, how)
        return 0

    def fused_gemm(self, bits, reference, mode, how, stream):
        a = reference._obj
        assert mode in FUSED, f"{mode=}"
        assert list(DTYPES)[a.x_dtype] in (torch.float16, torch.bfloat16), f"{a.x_dtype=}"
        return self.product("fused_gemm", bits, a, mode, bytes(how._obj))

    def rows(self, kernel, bits, a, mode, how):
        """x of a launch."""
        assert a.bits == bits, f"{a.bits=} {bits=}"
        self.calls.append((kernel, mode, a.M))
        self.plans.setdefault((kernel, mode), set()).add(how)
        x_dtype = list(DTYPES)[a.x_dtype]
        assert 1 <= a.M <= mode, f"{a.M=} {mode=}"
        if x_dtype != torch.float32:  # read 16 bytes at a time
            assert a.x % 16 == 0, f"{a.x=}"
            assert a.M == 1 or a.x_stride % 8 == 0, f"{a.x_stride=}"
        return torch.stack([at(a.x + m * a.x_stride * x_dtype.itemsize, x_dtype, a.K) for m in range(a.M)])

    def product(self, kernel, bits, a, mode, how):
        x = self.rows(kernel, bits, a, mode, how)
        y = self.factors.get(kernel, 1.0) * (x.double() @ self.weight(a).T)
        if a.bias:
            y += at(a.bias, list(DTYPES)[a.bias_dtype], a.N)
        at(a.y, list(DTYPES)[a.y_dtype], a.M, a.N).copy_(y)
        return 0

    def lutq_dequantize(self, reference, first, last, stream):
        a = reference._obj
        w = self.weight(a)[16 * first : 16 * last]
        self.calls.append(("dequantize", len(w)))
        at(a.y, list(DTYPES)[a.y_dtype], *w.shape).copy_(w)
        return 0


LIMIT = 100  # of rows, on the stand-in's GPU


@pytest.fixture
def stand_in(monkeypatch):
    """A StandIn in the place of the library, on the CPU."""
    library = StandIn()
    monkeypatch.setattr(lutq.cuda, "kernels", lambda device: library)
    monkeypatch.setattr(lutq.cuda, "properties", lambda device: H200)
    monkeypatch.setattr(lutq.cuda, "rows_limit", lambda name, bits, fused: LIMIT)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype=None: mm(a.to(out_dtype or a.dtype), b.to(out_dtype or b.dtype)))
    return library


def multiply(x, packed, layer, bias=None, dtype=None):
    ready = prepack(packed, layer)
    return lutq.cuda.multiply(x, ready, bias, packed.codes.shape[1], layer, dtype)


# Which kernel


def lut(mode, *rows):
    return [("lut_gemm", mode, M) for M in rows]


def fused(mode, *rows):
    return [("fused_gemm", mode, M) for M in rows]


DENSE, BITS = [("dequantize", 33)], [("bit_gemv", ONE, 1)]
BY_FUSED = {1: lut(1, 1), 2: lut(4, 2), 3: lut(4, 3), 4: lut(4, 4), 5: lut(8, 5), 8: lut(8, 8), 9: fused(16, 9)}
BY_FUSED |= {16: fused(16, 16), 17: fused(32, 17), 32: fused(32, 32), 33: fused(64, 33), 64: fused(64, 64)}
BY_FUSED |= {65: fused(64, 64, 1), 72: fused(64, 64, 8), LIMIT: fused(64, 64, 36), LIMIT + 1: DENSE}
BY_EIGHTS = {1: lut(1, 1), 2: lut(4, 2), 4: lut(4, 4), 5: lut(8, 5), 8: lut(8, 8), 9: lut(8, 8, 1), 16: lut(8, 8, 8)}
BY_EIGHTS |= {33: lut(8, 8, 8, 8, 8, 1)}
BY_FOURS = {1: lut(1, 1), 2: lut(4, 2), 4: lut(4, 4), 5: lut(4, 4, 1), 8: lut(4, 4, 4), 9: lut(4, 4, 4, 1)}
# what may run -> rows of x -> launches with their modes and rows; see lutq/cuda.py. "a few": where the limit is fused_gemm's
LAUNCHES = {
    "fused": BY_FUSED,
    "eights": BY_EIGHTS | {LIMIT: lut(8, *[8] * 12, 4), LIMIT + 1: DENSE},
    "a few eights": BY_EIGHTS | {LUT_LIMIT: lut(8, *[8] * (LUT_LIMIT // 8)), LUT_LIMIT + 1: DENSE},
    "fours": BY_FOURS | {LIMIT // 2: lut(4, *[4] * 12, 2), LIMIT // 2 + 1: DENSE},
    "a few fours": BY_FOURS | {LUT_LIMIT // 2: lut(4, *[4] * (LUT_LIMIT // 8)), LUT_LIMIT // 2 + 1: DENSE},
    "dense": dict.fromkeys((1, 4, 5, 9, 64), DENSE),
}
HALF, SINGLE = (torch.float16, torch.bfloat16), (torch.float32,)
WAYS = [  # dtypes of x, K, GPU, grid, wide, what may run
    (HALF, FEW_INPUTS, H200, "bcq", False, "fused"),
    (HALF, FEW_INPUTS, H200, "uniform", False, "fused"),
    (HALF, FEW_INPUTS, A100, "bcq", False, "eights"),
    (HALF, FEW_INPUTS, H200._replace(fused=False), "uniform", False, "eights"),
    (HALF, FEW_INPUTS, H200, "bcq", True, "a few eights"),
    (HALF, FEW_INPUTS, H200, "uniform", True, "dense"),
    (HALF, FEW_INPUTS - 1, H200, "bcq", False, "a few fours"),
    (HALF, FEW_INPUTS - 1, A100, "uniform", False, "fours"),
    (HALF, FEW_INPUTS - 1, H200, "bcq", True, "a few fours"),
    (SINGLE, FEW_INPUTS, H200, "bcq", False, "a few fours"),
    (SINGLE, FEW_INPUTS, A100, "uniform", False, "fours"),
    (SINGLE, FEW_INPUTS, H200, "uniform", True, "dense"),
]


def launches_of(stand_in, x, ready, layer):
    stand_in.calls.clear()
    lutq.cuda.multiply(x, ready, None, 33, layer)
    return list(stand_in.calls)


@pytest.mark.parametrize(("dtypes", "K", "gpu", "grid", "wide", "way"), WAYS)
def test_which_kernel_runs(stand_in, monkeypatch, dtypes, K, gpu, grid, wide, way):
    monkeypatch.setattr(lutq.cuda, "properties", lambda device: gpu)
    layer = LayerConfig(3, 128, grid)
    ready = prepack(random_packed(33, K, layer), layer)._replace(wide=wide)
    for dtype, (M, expected) in itertools.product(dtypes, LAUNCHES[way].items()):
        expected = BITS if M == 1 and gpu.fused and way != "dense" else expected
        calls = launches_of(stand_in, torch.ones(M, K, dtype=dtype), ready, layer)
        assert calls == expected, f"{dtype=} {K=} {gpu=} {grid=} {wide=} {M=} {calls=}"


@pytest.mark.parametrize(
    ("limit", "most"),
    [  # rows_limit -> rows that are not dequantized: fused_gemm; 8 at a time on an A100; 4 at a time beside fused_gemm
        (200, (200, 200, 24)),
        (48, (48, 48, 24)),
        (40, (40, 40, 20)),
        (16, (16, 16, 8)),
        (8, (8, 8, 4)),
        (1, (4, 4, 4)),
    ],
)
def test_up_to_how_many_rows(stand_in, monkeypatch, limit, most):
    layer = LayerConfig(3, 128)
    ready = prepack(random_packed(33, FEW_INPUTS, layer), layer)
    monkeypatch.setattr(lutq.cuda, "rows_limit", lambda name, bits, fused: limit)
    monkeypatch.setattr(lutq.cuda, "LUT_LIMIT", 48)
    for (gpu, dtype), M in zip(((H200, torch.half), (A100, torch.half), (H200, torch.float)), most, strict=True):
        monkeypatch.setattr(lutq.cuda, "properties", lambda device, gpu=gpu: gpu)
        for rows in (M, M + 1):
            calls = launches_of(stand_in, torch.ones(rows, FEW_INPUTS, dtype=dtype), ready, layer)
            assert (calls == DENSE) == (rows > M), f"{limit=} {gpu.name} {dtype=} {rows=} {calls=}"


def test_a_mode_has_one_plan(stand_in):
    """Whatever M: it decides in which order a row is summed."""
    layer = LayerConfig(3, 128)
    ready = prepack(random_packed(33, FEW_INPUTS, layer), layer)
    for M in range(1, LIMIT + 1):
        launches_of(stand_in, torch.ones(M, FEW_INPUTS).half(), ready, layer)
    assert list(stand_in.plans) == [
        ("bit_gemv", ONE),
        *(("lut_gemm", mode) for mode in (4, 8)),
        *(("fused_gemm", mode) for mode in FUSED),
    ]
    assert all(len(plans) == 1 for plans in stand_in.plans.values()), f"{stand_in.plans=}"
    for rows in FUSED:
        how = bytes(fused_plan(33, FEW_INPUTS, rows, layer, H200))
        assert stand_in.plans["fused_gemm", rows] == {how}, f"{rows=}"


@pytest.mark.usefixtures("everywhere")
def test_which_kernel_runs_for_one_row(stand_in, monkeypatch):
    """lut_gemv for large layers that it takes, whatever the dtype, and lut_gemm for others and for more rows."""
    N, K, gemv = 33, FEW_INPUTS, [("lut_gemv", ONE, 1)]
    for bits, group, least, gpu, expected in (
        (3, 128, N * K - 1, H200, gemv),
        (4, 64, N * K - 1, H200._replace(fused=False), gemv),
        (3, 128, N * K, H200, lut(1, 1)),
        (2, 128, N * K - 1, H200, lut(1, 1)),
        (3, 32, N * K - 1, H200, lut(1, 1)),
        (3, 128, N * K - 1, A100, lut(1, 1)),
    ):
        monkeypatch.setattr(lutq.launch, "GEMV_BITS", 3)
        monkeypatch.setattr(lutq.launch, "GEMV_LEAST", least)
        monkeypatch.setattr(lutq.cuda, "properties", lambda device, gpu=gpu: gpu)
        gemv_plan.cache_clear()
        layer = LayerConfig(bits, group)
        ready = prepack(random_packed(N, K, layer), layer)
        for dtype in DTYPES:
            calls = launches_of(stand_in, torch.ones(1, K, dtype=dtype), ready, layer)
            assert calls == expected, f"{layer=} {least=} {gpu=} {dtype=} {calls=}"
        few = launches_of(stand_in, torch.ones(2, K).half(), ready, layer)
        assert few == lut(4, 2), f"{layer=} {least=} {gpu=} {few=}"


@pytest.mark.usefixtures("everywhere")
def test_wide_layers_and_one_row(stand_in):
    for grid, expected in (("bcq", [("lut_gemv", ONE, 1)]), ("uniform", DENSE)):
        layer = LayerConfig(3, 128, grid)
        ready = prepack(random_packed(33, 300, layer), layer)._replace(wide=True)
        assert launches_of(stand_in, torch.ones(1, 300).half(), ready, layer) == expected, f"{grid=}"


# The product


def expected_calls(M, K, dtype, N, group):
    way = "fused" if K >= FEW_INPUTS and dtype != torch.float32 else "fours"
    slices = [("dequantize", min(32, N - first)) for first in range(0, N, 32)]
    calls = BITS if M == 1 and group % 128 == 0 else LAUNCHES[way].get(M, DENSE)
    return slices if calls == DENSE else calls


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("grid", ["bcq", "uniform"])
@pytest.mark.parametrize("offsets", [False, True])
def test_multiply(stand_in, dtype, grid, offsets, monkeypatch):
    for bits, group, N, K in ((1, 0, 33, 100), (2, 32, 20, 64), (3, 128, 1, 300), (4, 96, 50, 1100)):
        layer = LayerConfig(bits, group, grid, offsets)
        packed = random_packed(N, K, layer)
        W = dequantize(*packed, group, grid, K, torch.float64)
        monkeypatch.setattr(lutq.cuda, "SLICE", K * 16 * 2)  # two tiles at a time
        monkeypatch.setattr(lutq.cuda, "SMALL", 0)
        for M, bias in itertools.product((1, 4, 5, 9, 32, 72, 100, 101), (False, True)):
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
            b = torch.randn(N, generator=torch.Generator().manual_seed(M)).to(dtype) if bias else None
            stand_in.calls.clear()
            y, about = multiply(x, packed, layer, b, torch.float32), f"{dtype=} {layer=} {N=} {K=} {M=} {bias=}"
            error = error_of(y, x, W, b)
            assert (y.shape, y.dtype) == ((M, N), torch.float32), about
            assert stand_in.calls == expected_calls(M, K, dtype, N, group), f"{about} {stand_in.calls=}"
            rounded = stand_in.calls[0][0] == "dequantize" and dtype != torch.float32
            assert error < (5e-4 if rounded else 1e-6), f"{about} {error=}"


def error_of(y, x, W, bias=None):
    """The largest error of y = x W^T + bias, relative to the product of absolute values."""
    wanted = x.double() @ W.T + (0 if bias is None else bias.double())
    return ((y.double() - wanted).abs() / (x.double().abs() @ W.abs().T)).max().item()


FUSIONS = {
    "norm": lambda by: Fusion(norm=by),
    "norm and function": lambda by: Fusion(norm=by, function="relu"),
    "all but a sum": lambda by: Fusion(by, "silu", True),
    "sum": lambda by: Fusion(add=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("centered", [False, True])
def test_products_that_do_more(stand_in, dtype, name, centered):
    N, K, layer, g = 96, 304, LayerConfig(3, 128, "bcq", True), torch.Generator().manual_seed(0)
    packed = random_packed(N, K, layer)
    W, weight, shift, bias = (
        dequantize(*packed, 128, "bcq", K, torch.float64),
        *(torch.randn(n, generator=g).to(dtype) for n in (K, K, N)),
    )
    fusion = FUSIONS[name](Norm(weight, shift if centered else None, 1e-5, centered))
    product = products.Packed(*prepack(packed, layer), bias, N, K, layer)
    assert product.fuses(1, dtype, fusion)
    x = torch.randn(1, K, generator=g).to(torch.float32 if fusion.norm else dtype)
    y = torch.randn(1, N // 2 if fusion.gated else N, generator=g)
    wanted = y.double()
    reference.fused(lambda x: x @ W.T + bias.double(), x.double(), wanted, fusion)
    reference.multiply(product, x, y, fusion)
    assert (y - wanted).norm() / wanted.norm() < 1e-6
    assert stand_in.calls == [("fused", ONE, 1)]


def test_what_products_do_not_do_besides(stand_in, monkeypatch):
    norm = Norm(torch.ones(304), None, 1e-5, False)
    every, one = [make(norm) for make in FUSIONS.values()], torch.float16
    shifted = norm._replace(bias=norm.weight)

    def fuses(N=96, K=304, group=128, wide=False, grid="bcq", M=1, dtype=one):
        layer = LayerConfig(3, group, grid, True)
        ready = prepack(random_packed(N, 304, layer), layer)._replace(wide=wide)
        return [products.Packed(*ready, None, N, K, layer).fuses(M, dtype, fusion) for fusion in every]

    assert all(fuses())
    assert all(fuses(wide=True))
    for change in ({"M": 2}, {"dtype": torch.float32}, {"group": 64}, {"grid": "uniform", "wide": True}):
        assert not any(fuses(**change)), f"{change}"
    every[0] = Fusion(norm=shifted)
    assert fuses() == [False, True, True, True], "an RMSNorm with a bias"
    every[0] = Fusion(norm=shifted._replace(centered=True))
    assert fuses(N=80) == [True, True, False, True], "pairs of tiles"
    assert fuses(K=16384) == [True] * 4
    assert fuses(K=16392) == [False, False, False, True], "one pass"
    assert fuses(K=300) == [False, False, False, True], "eight weights of a norm at a time"
    monkeypatch.setattr(lutq.cuda, "properties", lambda device: A100)
    assert not any(fuses())


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_multiply_eight_bits(stand_in, dtype):
    """As 4 bits with twice as many inputs, by the kernels that take those."""
    for (N, K), group in itertools.product(((33, 100), (20, 1100), (1, 640)), (0, 32, 128)):
        layer = LayerConfig(8, group, "uniform")
        packed = random_packed(N, K, layer)
        W = dequantize(*packed, group, "uniform", K, torch.float64)
        for M in (1, 4, 8, 32, 101):
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)
            b = torch.randn(N, generator=torch.Generator().manual_seed(M)).to(dtype)
            stand_in.calls.clear()
            y, about = multiply(x, packed, layer, b, torch.float32), f"{dtype=} {layer=} {N=} {K=} {M=}"
            assert stand_in.calls, about
            rounded = stand_in.calls[0][0] == "dequantize" and dtype != torch.float32
            assert error_of(y, x, W, b) < (5e-4 if rounded else 1e-6), about


ONE_ROW = [  # N, K, group
    (1, 100, 64),
    (33, 1024, 0),
    (50, 1100, 128),
    (64, 2072, 192),
]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("grid", "offsets"), list(itertools.product(GRIDS, (False, True))))
def test_multiply_one_row_by_lut_gemv(stand_in, dtype, grid, offsets):
    for (N, K, group), bits, bias in itertools.product(ONE_ROW, (1, 2, 3, 4), (False, True)):
        layer = LayerConfig(bits, group, grid, offsets)
        packed, x = random_packed(N, K, layer), torch.randn(1, K, generator=torch.Generator().manual_seed(N)).to(dtype)
        b = torch.randn(N, generator=torch.Generator().manual_seed(K)).to(dtype) if bias else None
        stand_in.calls.clear()
        y, about = multiply(x, packed, layer, b, torch.float32), f"{dtype=} {layer=} {N=} {K=} {bias=}"
        error = error_of(y, x, dequantize(*packed, group, grid, K, torch.float64), b)
        assert stand_in.calls == [("lut_gemv", ONE, 1)], f"{about} {stand_in.calls=}"
        assert error < 1e-6, f"{about} {error=}"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("grid", "offsets"), list(itertools.product(GRIDS, (False, True))))
def test_sums(stand_in, dtype, grid, offsets):
    """Each is the product with its slab of inputs, and the decode engine gets as many as it asks for."""
    for (N, K, group), bits in itertools.product(ONE_ROW, (1, 2, 3, 4)):
        layer = LayerConfig(bits, group, grid, offsets)
        packed, x = random_packed(N, K, layer), torch.randn(1, K, generator=torch.Generator().manual_seed(N)).to(dtype)
        W = dequantize(*packed, group, grid, K, torch.float64)
        product = products.Packed(*prepack(packed, layer), None, N, K, layer)
        about = f"{dtype=} {layer=} {N=} {K=}"
        partial = torch.full((-(-K // 1024), products.padded(N)), torch.nan)
        stand_in.calls.clear()
        multiply_sums(x, product.ready, partial, N, layer)
        assert stand_in.calls == [("sums", ONE, 1)], f"{about} {stand_in.calls=}"
        for s, (some, weights) in enumerate(zip(x.split(1024, 1), W.split(1024, 1), strict=True)):
            error = error_of(partial[s, :N], some, weights)
            assert error < 1e-6, f"{about} {s=} {error=}"
        assert product.slabs(1, dtype) == len(partial), f"{about}: {product.slabs(1, dtype)=}"
        again = torch.full_like(partial, torch.nan)
        product.sums_into(x, again)
        assert torch.equal(again[:, :N], partial[:, :N]), about
        error = error_of(partial[:, :N].sum(0), x, W)
        assert error < 1e-6, f"{about} {error=}"


@pytest.mark.usefixtures("everywhere")
def test_layers_without_sums(stand_in, monkeypatch):
    def slabs_of(layer, wide=False):
        ready = prepack(random_packed(33, 1100, layer), layer)._replace(wide=wide)
        return products.Packed(*ready, None, 33, 1100, layer).slabs(1, torch.half)

    assert slabs_of(LayerConfig(3, 128)) == slabs_of(LayerConfig(3, 128), wide=True) == 2
    assert slabs_of(LayerConfig(3, 32)) == slabs_of(LayerConfig(3, 96)) == 0
    assert slabs_of(LayerConfig(3, 128, "uniform"), wide=True) == 0
    monkeypatch.setattr(lutq.cuda, "properties", lambda device: A100)
    assert slabs_of(LayerConfig(3, 128)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_multiply_takes_any_strides_and_shapes(stand_in, dtype):
    N, K, layer = 20, 104, LayerConfig(3, 32)
    packed = random_packed(N, K, layer)
    W = dequantize(*packed, 32, "bcq", K, torch.float64)
    base = torch.randn(40 * K + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    inputs = {
        "vector": base[:K],
        "3-D": base[: 6 * K].view(2, 3, K),
        "transposed": base[: 6 * K].view(K, 6).T,
        "batch and tokens exchanged": base[: 6 * K].view(2, 3, K).transpose(0, 1),
        "every other input": base[: 6 * K].view(3, 2 * K)[:, ::2],
        "every other row": base[: 6 * K].view(6, K)[::2],
        "odd offset": base[1 : 6 * K + 1].view(6, K),
        "expanded": base[:K].expand(2, 3, K),
        "no rows": base[:0].view(0, K),
        "no rows of 3": base[:0].view(0, 3, K),
    }
    for name, x in inputs.items():
        y, about = multiply(x, packed, layer), f"{name} {dtype=}"
        assert (y.shape, y.dtype) == ((*x.shape[:-1], N), dtype), f"{about} {y.shape=} {y.dtype=}"
        assert torch.equal(y, (x.double() @ W.T).to(dtype)), about


def test_bf16_that_fp16_cannot_hold(stand_in, monkeypatch):
    """W dequantized: rows of x as large and as small as bf16 has them, and a row of zeros."""
    monkeypatch.setattr(lutq.cuda, "SMALL", 0)
    N, K, M, layer = 20, 104, 100, LayerConfig(3, 32)
    packed = random_packed(N, K, layer)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0] *= 1e34
    x[1] *= 1e-30
    x[2] = 0
    y = multiply(x, packed, layer, dtype=torch.float32).double()
    wanted = x.double() @ dequantize(*packed, 32, "bcq", K, torch.float64).T
    assert stand_in.calls == [("dequantize", N)]
    assert not y[2].any()
    wanted[2] = y[2] + 1e-30  # so that no norm is 0
    errors = (y - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors[[0, 1, *range(3, M)]].max() < 5e-4, f"{errors=}"


@pytest.mark.parametrize(
    ("layer", "scale", "wide"),
    [
        (LayerConfig(3, 32), 1.0, False),
        (LayerConfig(3, 32), 2.0e4, False),
        (LayerConfig(3, 32), 2.2e4, True),
        (LayerConfig(3, 32, offsets=False), 2.2e4, True),
        (LayerConfig(4, 32, "uniform"), 250.0, False),
        (LayerConfig(4, 32, "uniform"), 257.0, True),
        (LayerConfig(4, 32, "uniform", False), 4000.0, False),
        (LayerConfig(4, 32, "uniform", False), 65504.0, True),
        (LayerConfig(3, 32), float("inf"), True),
        (LayerConfig(3, 32), float("nan"), True),
    ],
)
def test_wide(layer, scale, wide):
    packed = random_packed(20, 100, layer)
    packed.scales.fill_(-0.0)
    packed.scales[:, 7, 2] = -scale
    if packed.offsets is not None:
        packed.offsets.fill_(1)
    assert prepack(packed, layer).wide is wide, f"{layer=} {scale=}"
    largest = dequantize(*packed, 32, layer.grid, 100, torch.float64).abs().max().item()
    assert wide or largest <= 65504, f"{layer=} {scale=} {largest=}"


@pytest.mark.parametrize("grid", ["bcq", "uniform"])
@pytest.mark.parametrize("M", [1, 100])
def test_wide_weights_stay_finite(stand_in, grid, M):
    layer = LayerConfig(3, 32, grid)
    packed = random_packed(20, 100, layer)
    packed.scales.fill_(6e4)
    x = torch.randn(M, 100, generator=torch.Generator().manual_seed(0)).half()
    y = multiply(x, packed, layer, dtype=torch.float32)
    wanted = x.double() @ dequantize(*packed, 32, grid, 100, torch.float64).T
    assert (y.double() - wanted).norm() / wanted.norm() < 1e-6


@pytest.mark.parametrize("gpu", [H200, A100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("kernel", ["lut_gemm", "lut_gemv", "bit_gemv"])
@pytest.mark.parametrize("factor", [1.0, 0.999, 0.0, float("nan")])
def test_the_check_of_a_new_library(stand_in, monkeypatch, gpu, kernel, factor):
    """It tries every kernel that the GPU runs for one row."""
    monkeypatch.setattr(lutq.cuda, "properties", lambda device: gpu)
    stand_in.factors[kernel] = factor
    tried = ["lut_gemm"] if gpu is A100 else ["lut_gemm", "lut_gemv", "bit_gemv"]
    good = factor == 1 or kernel not in tried
    wrong = pytest.raises(
        LutqError, match=rf"the CUDA kernels give wrong results on {gpu.name} \(off by .*\): use --backend reference"
    )
    with contextlib.nullcontext() if good else wrong:
        lutq.cuda.check(stand_in, torch.device("cpu"))
    assert [name for name, *_ in stand_in.calls] == (tried if good else tried[: tried.index(kernel) + 1])


@pytest.mark.parametrize("name", ["lutq_lut_gemm_3bit", "lutq_lut_gemv_3bit", "lutq_bit_gemv_3bit"])
def test_the_check_of_a_kernel_that_does_nothing(stand_in, monkeypatch, name):
    monkeypatch.setattr(stand_in, name, lambda *arguments: 0, raising=False)
    with pytest.raises(LutqError, match=r"wrong results on NVIDIA H200 \(off by nan\)"):
        lutq.cuda.check(stand_in, torch.device("cpu"))


@pytest.mark.usefixtures("everywhere")
def test_a_launch_that_fails_is_an_error(stand_in, monkeypatch):
    for name, M, group in (
        ("lutq_lut_gemm_3bit", 1, 32),
        ("lutq_lut_gemv_3bit", 1, 64),
        ("lutq_bit_gemv_3bit", 1, 128),
        ("lutq_fused_gemm_3bit", 9, 32),
        ("lutq_dequantize", LIMIT + 1, 32),
    ):
        layer = LayerConfig(3, group)
        with monkeypatch.context() as patch:
            if "bit_gemv" in name:
                patch.setattr(lutq.cuda, "bit_blocks", bit_blocks)
            patch.setattr(stand_in, name, lambda *arguments: 98, raising=False)
            with pytest.raises(RuntimeError, match="could not be launched: error 98"):
                multiply(torch.ones(M, FEW_INPUTS).half(), random_packed(20, FEW_INPUTS, layer), layer)


def test_kernel_order_by_hand(stand_in):
    """The type that prepack returns, and that the operator's backend is the same product."""
    layer = LayerConfig(2, 0, "uniform")
    packed, x = random_packed(20, 100, layer), torch.ones(3, 100)
    ready = prepack(packed, layer)
    assert isinstance(ready, Prepacked)
    shapes = ready.codes.shape, ready.records.shape
    assert shapes == ((1, 1, 4, 256), (1, 1, 4, 48)), f"{shapes=}"
    bias = torch.ones(20)
    y = lutq.ops.cuda(x, packed, bias, 0, "uniform")
    assert torch.equal(y, multiply(x, packed, layer, bias))


# Which backend


class Toolchain:
    """A GPU that is not there, on a machine whose nvcc may be missing."""

    def __init__(self, monkeypatch):
        self.set = monkeypatch.setattr
        self.set(torch.cuda, "get_device_capability", lambda *device: (9, 0))
        self.set(torch.cuda, "get_device_name", lambda *device: "Toy")
        self.compiler(False)

    def compiler(self, there):
        self.set("lutq.build.library_path", lambda *_: (None, "the kernels are not compiled for sm_90 yet"))
        self.set("lutq.compiler.find_compiler", lambda: "nvcc" if there else None)
        self.set("lutq.compiler.host_compiler", lambda: "g++" if there else None)

    def kernels(self, work):
        def kernels(device):
            if isinstance(work, Exception):
                raise work

        self.compiler(True)
        self.set(lutq.cuda, "kernels", kernels)


@pytest.fixture
def toolchain(monkeypatch):
    working_backend.cache_clear()
    monkeypatch.setattr(lutq.ops, "failed", {})
    yield Toolchain(monkeypatch)
    working_backend.cache_clear()


GPU = torch.device("cuda", 0)
NO_COMPILER = r"not compiled for sm_90 yet, and there is no compiler; pip install 'lutq\[nvcc\]' and a C\+\+ compiler"


def test_unknown_backend():
    for choose in (choose_backend, working_backend):
        with pytest.raises(LutqError, match=r"unknown backend 'abacus': use auto or reference, cpu, cuda"):
            choose("abacus", torch.device("cpu"))


def test_cuda_on_the_cpu():
    for device in ("cpu", torch.device("cpu"), "meta"):
        with pytest.raises(
            LutqError, match=rf"backend 'cuda' needs a GPU and the device is {device}: use --device cuda, or --back"
        ):
            choose_backend("cuda", device)
        assert choose_backend("reference", device)[0] == "reference"
        assert choose_backend("auto", device)[0] == (CPU_BACKEND if str(device) == "cpu" else "reference")


def test_cuda_on_the_cpu_by_the_operator():
    packed, layer = random_packed(20, 100, LayerConfig(3, 32)), LayerConfig(3, 32)
    with pytest.raises(LutqError, match="needs a GPU"):
        torch.ops.lutq.linear(torch.ones(1, 100), *packed, None, layer.group, layer.grid, "cuda")


@pytest.mark.parametrize("verb", ["generate", "eval-ppl", "info"])
def test_cuda_on_the_cpu_by_the_command(lutq_command, embedded, verb):
    arguments = {"generate": ["hello", "--model", embedded], "eval-ppl": ["wikitext2", "--model", embedded], "info": [embedded]}
    result = lutq_command(verb, *arguments[verb], "--backend", "cuda", "--device", "cpu")
    assert result.returncode == 2, f"{verb} {result.stdout=} {result.stderr=}"
    assert result.stderr.strip().endswith("use --device cuda, or --backend reference"), f"{verb} {result.stderr=}"
    assert len(result.stderr.splitlines()) == 1, f"{verb} {result.stderr=}"


def test_reference_is_given_as_asked(toolchain):
    assert choose_backend("reference", "cuda") == ("reference", "as asked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert working_backend("reference", GPU) == "reference"


def test_a_gpu_without_compiler(toolchain):
    name, why = choose_backend("auto", GPU)
    assert name == "reference"
    assert re.search(NO_COMPILER, why), why
    for choose in (choose_backend, working_backend):
        with pytest.raises(LutqError, match=NO_COMPILER):
            choose("cuda", GPU)
    with pytest.warns(UserWarning, match=NO_COMPILER) as caught:
        assert [working_backend("auto", GPU) for _ in range(3)] == 3 * ["reference"]
    assert len(caught) == 1, f"{[str(warning.message) for warning in caught]}"


def test_an_old_gpu(toolchain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    assert choose_backend("auto", GPU)[0] == "reference"
    with pytest.raises(LutqError, match=r"Toy is older than compute capability 8\.0"):
        choose_backend("cuda", GPU)


def test_a_gpu_with_compiler(toolchain):
    toolchain.kernels(work=True)
    assert choose_backend("auto", GPU)[0] == choose_backend("cuda", GPU)[0] == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert working_backend("auto", GPU) == working_backend("cuda", GPU) == "cuda"


def test_kernels_that_do_not_work(toolchain):
    """As `choose_backend` could not know: `auto` warns once and remembers it, `cuda` raises, before and after."""
    toolchain.kernels(work=LutqError("the CUDA kernels give wrong results on Toy: use --backend reference"))
    assert choose_backend("auto", GPU)[0] == "cuda"
    with pytest.raises(LutqError, match="wrong results on Toy: use"):
        working_backend("cuda", GPU)
    with pytest.warns(UserWarning, match="without its CUDA kernels: the CUDA kernels give wrong results on Toy: use") as caught:
        assert [working_backend("auto", GPU) for _ in range(3)] == 3 * ["reference"]
    assert len(caught) == 1, f"{[str(warning.message) for warning in caught]}"
    name, why = choose_backend("auto", GPU)
    assert name == "reference"
    assert "wrong results on Toy" in why, why
    with pytest.raises(LutqError, match="wrong results on Toy"):
        working_backend("cuda", GPU)
    assert choose_backend("auto", torch.device("cuda", 1))[0] == "cuda", "another GPU may do"
