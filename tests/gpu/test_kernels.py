"""The CUDA kernels against float64 on the dequantized weights, by the error of each row of x: ||y - ref|| / ||ref||.

Where random x leaves a row of y near zero by chance, ||ref|| is at least what it would be on average, see `Layer.floor`.
`lutq.cuda` says how exact each path is; `Layer.limit` says it again.
"""

import functools
import itertools

import pytest
import torch
from conftest import random_packed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lutq.cuda
import lutq.launch
from lutq.config import LayerConfig
from lutq.cuda import FEW_INPUTS, prepack, rows_limit
from lutq.decode import products, reference
from lutq.decode.fusion import Fusion, Norm
from lutq.errors import LutqError
from lutq.evaluate import evaluate
from lutq.hf import load
from lutq.launch import Gpu
from lutq.linear import LutLinear
from lutq.pack import Packed, dequantize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GROUPS = (32, 64, 96, 128, 256, 0)
ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 100, 300)
SHAPES = [(1, 1), (16, 33), (100, 257), (33, 576), (1, 4100), (100, 1), (16, 4100), (40, 1000)]
BIG = (512, 14336)
SINGLE, ROUNDED, DENSE_SINGLE = 2e-6, 5e-4, 1e-5
GRIDS = [(grid, offsets) for grid in ("bcq", "uniform") for offsets in (False, True)]
SMALL = Gpu("small", 82, 101376, False, False)


@pytest.fixture(params=["as measured", "lut_gemv"])
def one_row(request, monkeypatch):
    """A row of x by the kernel that is faster, and by lut_gemv wherever it takes the layer."""
    if request.param == "lut_gemv":
        monkeypatch.setattr(lutq.cuda, "bit_blocks", lambda *shape: 0)
        monkeypatch.setattr(lutq.launch, "GEMV_BITS", 1)
        monkeypatch.setattr(lutq.launch, "GEMV_LEAST", 0)
        monkeypatch.setattr(lutq.launch, "GEMV_MOST", {})
    lutq.launch.gemv_plan.cache_clear()
    yield
    lutq.launch.gemv_plan.cache_clear()


def draw(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


class Layer:
    """A packed matrix [N, K], in kernel order too, and its weights in float64. `change(packed)` edits it first."""

    def __init__(self, N, K, layer, seed=0, change=lambda packed: None):
        self.N, self.K, self.layer, self.packed = N, K, layer, random_packed(N, K, layer, seed, DEVICE)
        change(self.packed)
        self.ready = prepack(self.packed, layer)
        self.W = dequantize(*self.packed, layer.group, layer.grid, K, torch.float64)
        if N >= 8:
            self.size = self.W.norm().item() / K**0.5
        else:  # too few weights for an average: the terms they are sums of
            terms = self.packed.scales.double().abs().sum(0)
            terms = terms * 2**layer.bits if layer.grid == "uniform" else terms
            terms = terms if self.packed.offsets is None else terms + self.packed.offsets.double().abs()
            self.size = N**0.5 * terms.square().mean().sqrt().item()

    def __call__(self, x, bias=None, dtype=torch.float32):
        codes, records, wide = self.ready
        return torch.ops.lutq.linear_prepacked(x, codes, records, bias, self.N, *self.layer[:4], wide, dtype=dtype)

    def reference(self, x, bias=None):
        y = x.double() @ self.W.T
        return y if bias is None else y + bias.double()

    def floor(self, x):
        """[M]: the norm that a row of y has on average over random directions of x."""
        return x.double().norm(dim=-1) * self.size

    def errors(self, y, x, bias=None, reference=None):
        """[M], 0 for a row of zeros."""
        reference = self.reference(x, bias) if reference is None else reference
        scale = torch.maximum(reference.norm(dim=-1), self.floor(x)).clamp_min(1e-300)
        return (y.double() - reference).norm(dim=-1) / scale

    def mode(self, M, dtype):
        """4 with split tables of x, 8 with rounded tables or rounded weights, 0 where W is dequantized."""
        if self.ready.wide and self.layer.grid == "uniform":
            return 0
        at_once = 4 if M <= 4 or dtype == torch.float32 or self.K < FEW_INPUTS else 8
        gpu = lutq.cuda.properties(self.packed.codes.device)
        limit = rows_limit(gpu.name, self.layer.bits, gpu.fused)
        if not (at_once == 8 and gpu.fused and not self.ready.wide):
            limit = max(4, (min(limit, lutq.cuda.LUT_LIMIT) if gpu.fused else limit) * at_once // 8)
        return at_once if limit >= M else 0

    def limit(self, M, dtype):
        mode = self.mode(M, dtype)
        if mode == 0:
            single = self.ready.wide or dtype == torch.float32 or self.N * self.K < lutq.cuda.SMALL
            return DENSE_SINGLE if single else ROUNDED
        return ROUNDED if mode == 8 else SINGLE


class Verdict:
    """Errors of many products, fetched from the GPU together."""

    def __init__(self):
        self.cases = []

    def add(self, errors, limit, about):
        self.cases.append(
            (errors.amax() if errors.numel() else torch.zeros((), dtype=torch.float64, device=errors.device), limit, about)
        )

    def check(self):
        values = torch.stack([error for error, _, _ in self.cases]).tolist()
        wrong = [
            (v / limit, f"{about} {v=:.2e} {limit=:.0e}")
            for v, (_, limit, about) in zip(values, self.cases, strict=True)
            if not v <= limit
        ]
        assert not wrong, f"{len(wrong)} of {len(values)} products, among them:\n" + "\n".join(text for _, text in wrong[:12])


# Every format


def check_formats(bits, grid, offsets, shapes_of, rows=ROWS):
    verdict = Verdict()
    for i, group in enumerate(GROUPS):
        for N, K in shapes_of(i):
            made = Layer(N, K, LayerConfig(bits, group, grid, offsets), seed=i)
            for dtype in DTYPES:
                x = draw((max(rows), K), dtype, seed=bits)
                reference = made.reference(x)
                for M in rows:
                    y, about = made(x[:M]), f"{N=} {K=} {M=} {dtype=} {made.layer=}"
                    assert (y.shape, y.dtype) == ((M, N), torch.float32), f"{about} {y.shape=} {y.dtype=}"
                    verdict.add(made.errors(y, x[:M], reference=reference[:M]), made.limit(M, dtype), about)
        verdict.check()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "offsets"), GRIDS)
def test_products(bits, grid, offsets):
    """Every group meets three of the shapes, other ones for other bits."""
    check_formats(bits, grid, offsets, lambda i: [SHAPES[(i + bits + 3 * j) % len(SHAPES)] for j in range(3)])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "offsets"), GRIDS)
def test_products_of_real_size(bits, grid, offsets):
    check_formats(bits, grid, offsets, lambda i: [BIG] if GROUPS[i] in (32, 128, 0) else [], (1, 4, 8, 16, 17, 100))


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 300),
    K=st.integers(1, 1200),
    M=st.integers(1, 130),
    layer=st.builds(LayerConfig, st.integers(1, 4), st.sampled_from(GROUPS), st.sampled_from(("bcq", "uniform")), st.booleans()),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(N, K, M, layer, dtype, seed):
    made, x = Layer(N, K, layer, seed), draw((M, K), dtype, seed)
    error, limit = made.errors(made(x), x).max().item(), made.limit(M, dtype)
    assert error <= limit, f"{N=} {K=} {M=} {layer=} {dtype=} {seed=} {error=:.2e} {limit=:.0e}"


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_plans_of_a_small_gpu(bits, monkeypatch):
    """99 KB of shared memory and no clusters: other numbers of warps, and several waves of blocks."""
    monkeypatch.setattr(lutq.cuda, "properties", lambda device: SMALL)
    verdict = Verdict()
    for (N, K), group, (grid, offsets) in itertools.product([(33, 576), BIG, (6000, 300)], (32, 128), GRIDS):
        made = Layer(N, K, LayerConfig(bits, group, grid, offsets))
        for M, dtype in itertools.product((1, 4, 8, 16), DTYPES):
            x = draw((M, K), dtype)
            verdict.add(made.errors(made(x), x), made.limit(M, dtype), f"{N=} {K=} {M=} {dtype=} {made.layer=}")
    verdict.check()


# Arguments


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "offsets"), GRIDS)
def test_fused(bits, grid, offsets):
    """But for the rounded weights the sums are those of fp32: in every mode, with any tail, whatever the launch."""
    gpu, found = lutq.cuda.properties(torch.device(DEVICE, 0)), lutq.cuda.kernels(torch.device(DEVICE, 0))
    if not gpu.fused:
        pytest.skip("fused_gemm needs a GPU of compute capability 9.0")
    verdict = Verdict()
    few = gpu._replace(processors=3)
    shapes = [(1, 300, 32), (64, 256, 128), (100, 576, 64), (130, 1000, 96), (200, 2080, 0), (700, 1024, 256)]
    for (N, K, group), dtype in itertools.product(shapes, DTYPES[:2]):
        layer = Layer(N, K, LayerConfig(bits, group, grid, offsets), seed=N)
        W = layer.W.half().double()
        for rows, processors in itertools.product(lutq.launch.FUSED, (gpu, few)):
            for M in (1, rows // 2 + 1, rows):
                x, bias = draw((M, K), dtype, seed=M), draw((N,), dtype, seed=N)
                y = torch.full((M, N), float("nan"), device=DEVICE)
                arguments = lutq.cuda.arguments(lutq.cuda.aligned(x), layer.ready, bias, y, layer.layer)
                lutq.cuda.run_fused(found, arguments, rows, layer.layer, processors)
                errors = layer.errors(y, x, reference=x.double() @ W.T + bias.double())
                verdict.add(errors, 5e-5, f"{N}x{K} {group=} {dtype} {rows=} {M=} on {processors.processors}")
    verdict.check()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "offsets"), GRIDS)
def test_bit_gemv(bits, grid, offsets):
    """By few blocks and by many, with any tail, in one pass over the inputs and in several."""
    gpu, found = lutq.cuda.properties(torch.device(DEVICE, 0)), lutq.cuda.kernels(torch.device(DEVICE, 0))
    if not lutq.cuda.bit_blocks(16, 128, LayerConfig(bits, 128, grid, offsets), gpu):
        pytest.skip("bit_gemv needs a GPU of compute capability 9.0")
    verdict = Verdict()
    shapes = [
        (1, 300, 0),
        (100, 1000, 128),
        (130, 1030, 384),
        (200, 2080, 0),
        (70, 4352, 256),
        (333, 9000, 128),
        (40, 40000, 128),
    ]
    for (N, K, group), dtype in itertools.product(shapes, DTYPES):
        layer = Layer(N, K, LayerConfig(bits, group, grid, offsets), seed=N)
        x, bias = draw((1, K), dtype, seed=K), draw((N,), dtype, seed=N)
        x[:, :: K // 5] = 0
        for blocks in {1, 3, lutq.cuda.bit_blocks(N, K, layer.layer, gpu)}:
            if blocks > -(-N // 16):
                continue
            y = torch.full((1, N), float("nan"), device=DEVICE)
            a = lutq.cuda.arguments(lutq.cuda.aligned(x), layer.ready, bias, y, layer.layer)
            lutq.cuda.run_bits(found, a, blocks)
            verdict.add(layer.errors(y, x, bias), SINGLE, f"{N}x{K} {group=} {dtype} {blocks=}")
    verdict.check()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "offsets"), GRIDS)
def test_bit_gemv_and_more(monkeypatch, bits, grid, offsets):
    """With a norm of x, a function of the outputs, gates and what was there before, by few blocks and by many."""
    gpu, verdict = lutq.cuda.properties(torch.device(DEVICE, 0)), Verdict()
    if not lutq.cuda.bit_blocks(16, 128, LayerConfig(bits, 128, grid, offsets), gpu):
        pytest.skip("bit_gemv needs a GPU of compute capability 9.0")
    shapes = [(32, 304, 0), (160, 1000, 128), (704, 4096, 128), (96, 16384, 256), (1056, 1288, 384)]
    for (N, K, group), dtype, processors in itertools.product(shapes, DTYPES[:2], (3, gpu.processors)):
        some = gpu._replace(processors=processors)
        monkeypatch.setattr(lutq.cuda, "properties", lambda device, some=some: some)
        layer = Layer(N, K, LayerConfig(bits, group, grid, offsets), seed=N)
        weight, shift, bias = draw((K,), dtype, seed=1), draw((K,), dtype, seed=2), draw((N,), dtype, seed=3)
        rms, centered = Norm(weight, None, 1e-5, False), Norm(weight, shift, 1e-5, True)
        fusions = [Fusion(norm=rms), Fusion(norm=centered, function="relu"), Fusion(rms, "silu", True), Fusion(add=True)]
        fusions += [
            Fusion(centered._replace(bias=None), "gelu_tanh", True),
            Fusion(norm=centered, add=True),
            Fusion(function="gelu"),
        ]
        for i, fusion in enumerate(fusions):
            x = 3 * draw((1, K), torch.float32 if fusion.norm else dtype, seed=K) + 2
            x[:, :: K // 5] = 0
            found = draw((1, N // 2 if fusion.gated else N), torch.float32, seed=4)
            wanted = found.double()
            product = products.Packed(*layer.ready, bias if i % 2 else None, N, K, layer.layer)
            assert product.fuses(1, dtype, fusion), f"{N}x{K} {group=} {fusion=}"
            product.fused_into(x, found, fusion)
            reference.fused(functools.partial(layer.reference, bias=product.bias), x.double(), wanted, fusion)
            error = (found.double() - wanted).norm() / wanted.norm()
            verdict.add(error[None], 5e-6, f"{N}x{K} {group=} {dtype} {processors=} fusion {i}")
    verdict.check()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "offsets"), GRIDS)
def test_gemv(bits, grid, offsets):
    """In clusters of any size, with any tail, by few blocks and by many; and as sums, which leave nothing out of their N."""
    gpu, found = lutq.cuda.properties(torch.device(DEVICE, 0)), lutq.cuda.kernels(torch.device(DEVICE, 0))
    if not lutq.launch.takes_gemv(LayerConfig(bits, 128, grid, offsets), gpu):
        pytest.skip("lut_gemv needs a GPU with clusters and 227 KB of shared memory")
    verdict = Verdict()
    shapes = [(1, 300, 64), (100, 1000, 128), (130, 1030, 192), (200, 2080, 0), (70, 4352, 256), (333, 9000, 128)]
    for (N, K, group), dtype in itertools.product(shapes, DTYPES):
        layer = Layer(N, K, LayerConfig(bits, group, grid, offsets), seed=N)
        x, bias, parts = draw((1, K), dtype, seed=K), draw((N,), dtype, seed=N), lutq.launch.slabs(K)
        for split in (split for split in (1, 2, 3, 4, 7, 8) if split <= parts):
            for clusters in (1, 3, 12):
                y = torch.full((1, N), float("nan"), device=DEVICE)
                a = lutq.cuda.arguments(lutq.cuda.aligned(x), layer.ready, bias, y, layer.layer)
                lutq.cuda.run_gemv(found, a, lutq.launch.GemvPlan(split * clusters, split))
                about = f"{N}x{K} {group=} {dtype} {split=} {clusters=}"
                verdict.add(layer.errors(y, x, bias), SINGLE, about)
        summed = 0 if lutq.cuda.bit_blocks(N, K, layer.layer, gpu) else parts
        assert lutq.cuda.sum_parts(layer.ready, N, K, layer.layer, gpu) == summed, f"{K=} {parts=}"
        partial = torch.full((parts, -(-N // 16) * 16), float("nan"), device=DEVICE)
        lutq.cuda.multiply_sums(x, layer.ready, partial, N, layer.layer)
        verdict.add(layer.errors(partial.double().sum(0)[None, :N], x), SINGLE, f"sums {N}x{K} {group=} {dtype}")
    verdict.check()


@pytest.mark.usefixtures("one_row")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias(dtype, bias_dtype):
    """In any dtype, with y in fp32 and in the dtype of x, which rounds once more (twice where fp16 is multiplied by fp16)."""
    verdict, ulp = Verdict(), {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}[dtype]
    for (grid, offsets), M in itertools.product(GRIDS, (1, 4, 8, 16, 17, 100)):
        made = Layer(100, 257, LayerConfig(3, 64, grid, offsets))
        x, bias = draw((M, 257), dtype), 30 * draw(100, seed=1).to(bias_dtype)
        for out, extra in ((torch.float32, 0.0), (None, 2 * ulp)):
            y, about = made(x, bias, out), f"{M=} {dtype=} {bias_dtype=} {out=} {made.layer=}"
            assert y.dtype == (out or dtype), about
            verdict.add(made.errors(y, x, bias), made.limit(M, dtype) + extra, about)
    verdict.check()


@pytest.mark.usefixtures("one_row")
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_and_shapes(dtype):
    verdict = Verdict()
    for K, layer in ((104, LayerConfig(3, 32)), (99, LayerConfig(4, 0, "uniform")), (576, LayerConfig(2, 128, offsets=False))):
        made, base = Layer(100, K, layer), draw(120 * K + 1, dtype)
        inputs = {
            "vector": base[:K],
            "3-D": base[: 6 * K].view(2, 3, K),
            "odd offset": base[1 : 6 * K + 1].view(6, K),
            "odd offset, one row": base[1 : K + 1].view(1, K),
            "batch and tokens exchanged": base[: 6 * K].view(2, 3, K).transpose(0, 1),
            "expanded": base[:K].expand(2, 3, K),
            "many and 3-D": base[: 120 * K].view(6, 20, K),
        }
        for M in (1, 3, 8, 16, 60):
            inputs |= {
                f"transposed, {M=}": base[: M * K].view(K, M).T,
                f"every other input, {M=}": base[: 2 * M * K].view(M, 2 * K)[:, ::2],
                f"every other row, {M=}": base[: 2 * M * K].view(2 * M, K)[::2],
                f"part of a row, {M=}": base[: 2 * M * K].view(M, 2 * K)[:, 3 : K + 3],
            }
        for name, x in inputs.items():
            y, about = made(x, dtype=None), f"{name} {K=} {dtype=} {layer=}"
            assert (y.shape, y.dtype) == ((*x.shape[:-1], 100), dtype), f"{about} {y.shape=} {y.dtype=}"
            rows = x.reshape(-1, K)
            verdict.add(made.errors(made(x).view(-1, 100), rows), made.limit(len(rows), dtype), about)
        for shape in ((0, K), (2, 0, K), (0, 3, K)):
            y = made(torch.zeros(shape, dtype=dtype, device=DEVICE), dtype=None)
            assert (y.shape, y.dtype) == ((*shape[:-1], 100), dtype), f"{shape=} {dtype=} {y.shape=}"
    verdict.check()


def test_opcheck():
    made = Layer(33, 100, LayerConfig(3, 32))
    for M, dtype, out in itertools.product((0, 1, 5, 100), DTYPES, (None, torch.float32)):
        tensors = (draw((M, 100), dtype), made.ready.codes, made.ready.records, draw(33, dtype))
        arguments = (*tensors, made.N, *made.layer[:4], made.ready.wide)
        results = torch.library.opcheck(torch.ops.lutq.linear_prepacked.default, arguments, {"dtype": out})
        assert set(results.values()) == {"SUCCESS"}, f"{M=} {dtype=} {out=} {results=}"


# Numbers at the edges


def huge(shape, dtype):
    if dtype == torch.float16:
        return (2e4 * draw(shape)).clamp(-6e4, 6e4).half()
    return (1e30 * draw(shape)).to(dtype)


def tiny(shape, dtype):
    return ((6e-8 if dtype == torch.float16 else 1e-30) * (3 * draw(shape)).round()).to(dtype)


def outlier(shape, dtype):
    x = draw(shape, dtype)
    x[:, shape[1] // 3] = 1e4
    return x


def sparse(shape, dtype):
    x = draw(shape, dtype)
    return torch.where(draw(shape, seed=1) > 1, x, 0)


def positive(shape, dtype):
    return draw(shape).abs().to(dtype)  # equal weights times random signs would cancel


def plain(shape, dtype):
    return draw(shape, dtype)


def fill(**values):
    """A change of packed tensors: `scales=0.5` fills what is there by that name."""

    def change(packed):
        for name, value in values.items():
            if getattr(packed, name) is not None:
                getattr(packed, name).fill_(value)

    return change


def subnormal(packed):
    """Scales and offsets a few times 2^-24, the least that fp16 has."""
    packed.scales.copy_(packed.scales.float().mul(4).ceil().mul(2.0**-24))
    if packed.offsets is not None:
        packed.offsets.copy_(packed.offsets.float().mul(2).round().mul(2.0**-24))


EDGES = {
    "huge x": (huge, lambda packed: None),
    "tiny x": (tiny, lambda packed: None),
    "one outlier": (outlier, lambda packed: None),
    "mostly zero": (sparse, lambda packed: None),
    "all signs +": (positive, fill(codes=-1)),
    "all signs -": (positive, fill(codes=0)),
    "no scales": (plain, fill(scales=0)),
    "subnormal scales": (plain, subnormal),
    "huge scales": (plain, fill(scales=6e4)),
}


@pytest.mark.usefixtures("one_row")
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edges(name, dtype, monkeypatch):
    """As for a large layer: the weights are dequantized to fp16, where uniform levels of 2^-25 would be lost."""
    inputs, change = EDGES[name]
    monkeypatch.setattr(lutq.cuda, "SMALL", lutq.cuda.SMALL if name == "subnormal scales" else 0)
    verdict = Verdict()
    for bits, (grid, offsets), (N, K, group) in itertools.product(
        (1, 2, 3, 4), GRIDS, [(100, 257, 32), (40, 1024, 128), (40, 1100, 64)]
    ):
        made = Layer(N, K, LayerConfig(bits, group, grid, offsets), change=change)
        assert name in ("huge scales", "subnormal scales") or not made.ready.wide, f"{made.layer=} {made.ready.wide=}"
        for M in (1, 3, 4, 5, 8, 9, 16, 17, 100):
            x = inputs((M, K), dtype)
            y, about = made(x), f"{name} {N=} {K=} {M=} {dtype=} {made.layer=}"
            assert y.isfinite().all(), f"{about}: not finite"
            verdict.add(made.errors(y, x), made.limit(M, dtype), about)
    verdict.check()


@pytest.mark.usefixtures("one_row")
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_input_gives_the_bias(dtype):
    for bits, (grid, offsets), M in itertools.product((1, 2, 3, 4), GRIDS, (1, 4, 8, 16, 17, 100)):
        made, bias = Layer(100, 257, LayerConfig(bits, 64, grid, offsets)), draw(100)
        x, about = torch.zeros(M, 257, dtype=dtype, device=DEVICE), f"{M=} {dtype=} {made.layer=}"
        assert not made(x).any(), about
        assert torch.equal(made(x, bias), bias.expand(M, 100)), about


@pytest.mark.usefixtures("one_row")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(dtype, poison):
    for bits, (grid, offsets), group in itertools.product((1, 2, 3, 4), GRIDS, (32, 128)):
        made = Layer(100, 600, LayerConfig(bits, group, grid, offsets))
        for M in (1, 2, 4, 5, 8, 16, 17, 33, 100):
            x, about = draw((M, 600), dtype), f"{M=} {dtype=} {poison=} {made.layer=}"
            before, row = made(x), M // 2
            for k in (0, 299, 599):
                bad = x.clone()
                bad[row, k] = poison
                y = made(bad)
                assert not y[row].isfinite().any(), f"{about} {k=}: finite numbers from one that is not"
                y[row] = before[row]
                assert torch.equal(y, before), f"{about} {k=}: other rows changed"


# The same bits


@pytest.mark.usefixtures("one_row")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(100, 257, 32), (2048, 4096, 128)])
def test_runs_are_equal(dtype, shape):
    N, K, group = shape
    for bits, (grid, offsets) in itertools.product((1, 2, 3, 4), (GRIDS[1], GRIDS[3])):
        made = Layer(N, K, LayerConfig(bits, group, grid, offsets))
        for M in (1, 4, 8, 16, 17, 100):
            x = draw((M, K), dtype)
            first = made(x)
            differ = torch.stack([(made(x) != first).any() for _ in range(100)]).sum().item()
            assert differ == 0, f"{N=} {K=} {M=} {dtype=} {made.layer=}: {differ} of 100 runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "bits", "group"),
    [(100, 257, 3, 32), (512, 4096, 4, 128), (14336, 4096, 3, 32), (8192, 8192, 4, 32)],
)
def test_a_row_is_the_same_in_another_batch(dtype, N, K, bits, group):
    """Within every mode; the large shapes fill the shared memory of an H200."""
    made, x = Layer(N, K, LayerConfig(bits, group)), draw((32, K), dtype)
    for low, most in ((2, 4), (5, 8), (9, 16), (17, 32)):
        high = max((M for M in range(low, most + 1) if made.mode(M, dtype)), default=0)
        whole = made(x[:high])
        for M in range(low, high + 1):
            about = f"{N=} {K=} {bits=} {group=} {dtype=} {M=} {high=}"
            assert torch.equal(made(x[:M]), whole[:M]), f"{about}: other bits in fewer rows"
            other = torch.cat([draw((M - 1, K), dtype, seed=9) * 5, x[:1]])
            assert torch.equal(made(other)[-1], whole[0]), f"{about}: other bits among other rows"


# As a module


def module_of(N, K, layer, bias=True, seed=0):
    vector = draw(N, torch.float16, seed) if bias else None
    module = LutLinear.from_packed(random_packed(N, K, layer, seed, DEVICE), K, layer, vector)
    module.backend = "cuda"
    return module


def check_packed(actual, expected, about):
    """Packed tensors, or dicts of them, are equal bit for bit."""
    actual, expected = (t._asdict() if isinstance(t, Packed) else t for t in (actual, expected))
    for name in Packed._fields:
        a, b = actual.get(name), expected.get(name)
        assert (a is None) == (b is None), f"{about} {name}"
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{about} {name} {a.dtype=} {a.shape=}"
            assert torch.equal(a.cpu(), b.cpu()), f"{about} {name}"


MODULES = [
    LayerConfig(3, 32),
    LayerConfig(4, 128, "uniform"),
    LayerConfig(1, 0, offsets=False),
    LayerConfig(2, 64, "uniform", False),
]


@pytest.mark.parametrize("layer", MODULES)
def test_prepack_and_back(layer):
    module, twin, about = module_of(100, 257, layer), module_of(100, 257, layer), f"{layer=}"
    packed, dense, x = module.packed(), module.dequantize(), draw((3, 257), torch.float16)
    keys = set(module.state_dict())
    assert module.prepack(), about
    assert module.prepack(), f"{about}: a second time"
    assert [name for name in Packed._fields if getattr(module, name) is not None] == [], f"{about}: canonical tensors are kept"
    y = module(x)
    assert torch.equal(y, twin(x)), f"{about}: the first product prepacks, too"
    assert twin.kernel_codes is not None, about
    state = module.state_dict()
    assert set(state) == keys, f"{about} {set(state)=}"
    check_packed(state, packed, f"{about} state dict")
    check_packed(module.packed(), packed, f"{about} packed()")
    assert torch.equal(module.dequantize(), dense), about
    module.cpu()
    assert module.kernel_codes is None, about
    assert module.codes.device.type == "cpu", about
    check_packed(module.packed(), packed, f"{about} on the CPU")
    module.cuda()
    assert torch.equal(module(x), y), f"{about}: there and back"
    module.bfloat16()
    check_packed(module.packed(), packed, f"{about} after a cast")
    other = module_of(100, 257, layer, seed=1)
    module.half().prepack()
    module.load_state_dict(other.state_dict(), strict=True)
    check_packed(module.packed(), other.packed(), f"{about} after load_state_dict")
    assert torch.equal(module(x), other(x)), f"{about} after load_state_dict"


def test_a_prepacked_layer_takes_what_its_packed_tensors_take():
    for layer in MODULES:
        N = K = 4096
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        module = module_of(N, K, layer, bias=False)
        canonical = sum(t.numel() * t.dtype.itemsize for t in module.packed() if t is not None)
        module.prepack()
        taken = torch.cuda.memory_stats()["requested_bytes.all.current"] - before
        assert taken <= 1.02 * canonical + 4096, f"{layer=} {taken=} {canonical=}"
        del module


@pytest.mark.usefixtures("one_row")
@pytest.mark.parametrize("M", [1, 4, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_captured(M, dtype):
    module, x = module_of(100, 257, LayerConfig(3, 32)), draw((M, 257), dtype)
    module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for seed in (1, 2, 3):
        x.copy_(draw((M, 257), dtype, seed))
        graph.replay()
        assert torch.equal(y, module(x)), f"{M=} {dtype=} {seed=}"


def test_first_use_inside_capture():
    module_of(16, 32, LayerConfig(3, 32)).prepack()  # so that the kernels themselves are there
    module, x = module_of(100, 256, LayerConfig(3, 32)), draw((1, 256), torch.float16)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(LutqError, match=r"call prepack\(\) or the model once before"), torch.cuda.graph(graph):
        module(x)
    assert module.kernel_codes is None
    assert module(x).isfinite().all()


@pytest.mark.usefixtures("one_row")
def test_two_streams():
    """Products that run side by side do not share memory."""
    made = [Layer(512, 2048, LayerConfig(bits, 128), seed=bits) for bits in (3, 4)]
    inputs = [[draw((M, 2048), torch.float16, seed=10 * i + M) for M in (1, 3, 8, 16, 100)] for i in range(2)]
    alone = [[layer(x) for x in xs] for layer, xs in zip(made, inputs, strict=True)]
    streams = [torch.cuda.Stream() for _ in made]
    torch.cuda.synchronize()
    for turn in range(20):
        found = [[], []]
        for j in range(len(inputs[0])):
            for i, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[i].append(made[i](inputs[i][j]))
        torch.cuda.synchronize()
        for i, j in itertools.product(range(2), range(len(inputs[0]))):
            assert torch.equal(found[i][j], alone[i][j]), f"{turn=} stream {i} M={len(inputs[i][j])}"
        del found


def test_layers_in_a_row():
    """A kernel may start before its predecessor has ended, but reads only what that has written."""
    chain = [module_of(2048, 2048, LayerConfig(bits, 128), bias=False, seed=bits) for bits in (1, 2, 3, 4, 3, 2)]
    for module in chain:
        module.scales.mul_(0.01)  # about as large as its input is what a layer gives then
        module.offsets.mul_(0.01)
    for M, dtype in itertools.product((1, 4, 8, 16), DTYPES):
        x = y = draw((M, 2048), dtype)
        for module in chain:
            y = module(y)
            torch.cuda.synchronize()
        apart = y
        assert apart.isfinite().all(), f"{M=} {dtype=}"
        for repeat in range(30):
            y = x
            for module in chain:
                y = module(y)
            assert torch.equal(y, apart), f"{M=} {dtype=} {repeat=}"


def test_canonical_tensors():
    """The operator on what has just been reordered gives the bits of the layer that was long before."""
    for layer, M in itertools.product(MODULES, (1, 4, 8, 16, 100)):
        made, bias = Layer(512, 2048, layer), draw(512, torch.float16)
        x = draw((M, 2048), torch.float16)
        expected = made(x, bias, None)
        for repeat in range(10):
            y = torch.ops.lutq.linear(x, *made.packed, bias, layer.group, layer.grid, "cuda")
            assert torch.equal(y, expected), f"{layer=} {M=} {repeat=}"


@pytest.mark.parametrize("layer", MODULES[:2])
def test_compiled(layer):
    torch.compiler.reset()
    module = module_of(100, 257, layer)
    module.prepack()
    compiled = torch.compile(module, fullgraph=True)
    for shape in ((1, 257), (5, 257), (2, 3, 257), (100, 257)):
        x = draw(shape, torch.float16)
        assert torch.equal(compiled(x), module(x)), f"{layer=} {shape=}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_devices():
    """The current device is the first one all the time."""
    for layer in MODULES:
        first = module_of(100, 257, layer)
        second = module_of(100, 257, layer).to("cuda:1")
        for M, dtype in itertools.product((1, 4, 16, 100), DTYPES):
            x = draw((M, 257), dtype)
            y = second(x.to("cuda:1"))
            assert y.device == torch.device("cuda:1"), f"{layer=} {M=} {dtype=} {y.device=}"
            assert torch.equal(y.cpu(), first(x).cpu()), f"{layer=} {M=} {dtype=}"
        check_packed(second.packed(), first.packed(), f"{layer=}")
        second.to("cuda:0")
        assert torch.equal(second(draw((1, 257))), first(draw((1, 257)))), f"{layer=}: moved to the other"


# A model


def test_saved_from_the_gpu(embedded, tmp_path):
    model = load(embedded, device="cuda", dtype="float16", backend="cuda")
    assert all(module.kernel_codes is not None for module in model.modules() if isinstance(module, LutLinear))
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (embedded, tmp_path))
    assert set(before) == set(after)
    packed = [name for name in before if name.rsplit(".", 1)[-1] in Packed._fields]
    assert len(packed) >= 72, f"{len(packed)=}"  # 24 layers, three tensors each
    for name in packed:
        assert before[name].dtype == after[name].dtype, f"{name} {after[name].dtype=}"
        assert torch.equal(before[name], after[name]), name
    again = load(tmp_path, device="cuda", dtype="float16", backend="cuda")
    tokens = torch.tensor([[2, 100, 200, 300]], device="cuda")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("float16", 2e-2), ("bfloat16", 1e-1)])
def test_logits(embedded, dtype, limit):
    """Of so few tokens that every path but the dense one is taken, and then that, against the reference in fp32."""
    models = [load(embedded, device="cuda", dtype=d, backend=b) for d, b in ((dtype, "cuda"), ("float32", "reference"))]
    for M in (1, 2, 4, 5, 8, 16, 30, 200):
        tokens = torch.randint(4, 4000, (1, M), generator=torch.Generator().manual_seed(M)).cuda()
        with torch.inference_mode():
            actual, expected = (model(tokens).logits.double() for model in models)
        error = ((actual - expected).norm() / expected.norm()).item()
        assert error < limit, f"{M=} {dtype=} {error=:.2e}"


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("float16", 2e-3)])
def test_perplexity(embedded, dtype, limit):
    """Relative, against the reference in fp32."""
    options = {"dataset": "wikitext2", "model": str(embedded), "max_windows": 8, "device": "cuda", "progress": False}
    (expected,) = evaluate(**options, dtype="float32", backend="reference")
    (actual,) = evaluate(**options, dtype=dtype, backend="cuda")
    assert (actual.backend, expected.backend) == ("cuda", "reference")
    error = abs(actual.perplexity / expected.perplexity - 1)
    assert error < limit, f"{dtype=} {actual.perplexity=} {expected.perplexity=}"


def test_generate(embedded, run_lutq):
    command = (
        "generate",
        "The old man walked",
        "--model",
        embedded,
        "--device",
        "cuda",
        "--temperature",
        0,
        "--max-new-tokens",
        20,
    )
    results = {backend: run_lutq(*command, "--backend", backend, "--dtype", "float32") for backend in ("cuda", "reference")}
    for backend, result in results.items():
        assert result.returncode == 0, f"{backend} {result.stderr=}"
        assert result.stdout.startswith("The old man walked"), f"{backend} {result.stdout=}"
    texts = [result.stdout.split("\n[prompt")[0] for result in results.values()]
    assert texts[0] == texts[1], f"{texts=}"
