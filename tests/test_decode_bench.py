"""`lutq bench decode` without a GPU: shapes, random models, what fits, records, the plot; what steps.py tells the kernels."""

import ctypes
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import MODELS

from lutq.config import LayerConfig
from lutq.cuda import FusionArguments
from lutq.decode import bench, chart, reference, steps
from lutq.decode.bench import block_bytes, check_memory, check_settings, columns, layer_for, line, needed_bytes
from lutq.decode.engine import Engine
from lutq.decode.measure import KINDS, Only
from lutq.decode.products import Sums
from lutq.decode.shape import Shape, shape_of
from lutq.decode.steps import FUNCTIONS, Kernels, plan
from lutq.decode.synthetic import layer_bytes, random_layer, read_config, synthetic_model
from lutq.decode.weights import weights_of
from lutq.errors import LutqError
from lutq.launch import Gpu
from lutq.linear import LutLinear
from lutq.pack import Packed, dequantize
from lutq.parallel import inboxes
from lutq.parallel.inboxes import Inboxes, inbox_bytes
from lutq.paths import shipped
from lutq.prepack import unpack_codes, unpack_records

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("bit_gemv.cuh", "inbox.cuh", "step.cuh", "decode.cu", "attention.cu")
TEXT = "".join((ROOT / "kernels" / name).read_text(encoding="utf-8") for name in SOURCES)
SHARED_THREADS = int(re.search(r" SHARED_THREADS = (\d+)", TEXT)[1])
H200 = Gpu("NVIDIA H200", 132, 232448, True, True)
PARAMETERS = {
    "opt-125m": 125e6,
    "opt-1.3b": 1.3e9,
    "opt-6.7b": 6.7e9,
    "opt-13b": 13e9,
    "opt-30b": 30e9,
    "opt-66b": 66e9,
    "opt-175b": 175e9,
    "llama-1-30b": 32.5e9,
    "llama-1-65b": 65.2e9,
    "llama-2-7b": 6.74e9,
    "llama-2-13b": 13.0e9,
    "llama-2-70b": 69.0e9,
    "llama-3-8b": 8.03e9,
    "llama-3-70b": 70.6e9,
}
LAYERS = [
    LayerConfig(3, 128, "bcq", False),
    LayerConfig(2, 64, "bcq", True),
    LayerConfig(1, 0, "bcq", False),
    LayerConfig(4, 128, "uniform", True),
    LayerConfig(3, 32, "uniform", False),
]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


# Shapes


def test_every_shape_has_its_parameters():
    names = {path.stem for path in (shipped("configs") / "models").glob("*.json")}
    assert names == set(PARAMETERS)
    for name, expected in PARAMETERS.items():
        config = read_config(name)
        shape = shape_of(config)
        blocks = shape.layers * block_bytes(shape, None) / 2
        kept = shape.vocabulary * shape.hidden * (1 if config.tie_word_embeddings else 2)
        assert abs(blocks + kept - expected) / expected < 0.03, f"{name}: {blocks + kept:.3e}"
        assert shape.hidden % 256 == 0, f"{name}: {shape}"


def test_sizes_of_the_issue():
    """Bytes of OPT-175B: 66 GB at 3 bits, which fits on a GPU of 141 GB; fp16 does not."""
    shape = shape_of(read_config("opt-175b"))
    three = needed_bytes(shape, True, layer_for(3, "auto", 128), 1, 512)
    assert 73e9 < three < 82e9, three
    assert needed_bytes(shape, True, None, 1, 512) > 320e9


@pytest.mark.parametrize(
    ("name", "reason"), [("no-such", "there is no shape 'no-such': .*llama-2-7b"), ("x.json", "there is no shape")]
)
def test_unknown_shapes(name, reason):
    with pytest.raises(LutqError, match=reason):
        read_config(name)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such"}'])
def test_files_that_are_no_shape(tmp_path, text):
    (tmp_path / "shape.json").write_text(text)
    with pytest.raises(LutqError, match="is no model config"):
        read_config(str(tmp_path / "shape.json"))


# Random models


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(128, 512), (100, 300)])
def test_random_layers_are_in_kernel_order_and_keep_lengths(layer, N, K):
    torch.manual_seed(0)
    codes, records = random_layer(N, K, layer, torch.device("cpu"))
    assert codes.nbytes + records.nbytes == layer_bytes(N, K, layer)
    parts = unpack_records(records, N, K, layer)
    packed = Packed(unpack_codes(codes, N, K, layer.grid), parts["scales"], parts.get("offsets"), parts.get("zero_points"))
    W = dequantize(*packed, layer.group, layer.grid, K, torch.float32)
    x = torch.randn(K)
    gain = (W @ x).norm() / N**0.5 / (x.norm() / K**0.5)
    assert 0.6 < gain < 1.5, f"{layer=} {gain=}"
    assert W.isfinite().all()


def tiny_config(name):
    from transformers import AutoConfig

    kind, fields = MODELS[name]
    return AutoConfig.for_model(kind, **fields)


@pytest.mark.parametrize("name", ["opt", "llama", "llama-tied"])
@pytest.mark.parametrize("layer", [LAYERS[0], None], ids=str)
def test_random_models_run(name, layer):
    torch.manual_seed(0)
    model = synthetic_model(tiny_config(name), layer, torch.device("cpu"), torch.float32)
    quantized = [module for module in model.modules() if isinstance(module, LutLinear)]
    assert len(quantized) == (0 if layer is None else 2 * (6 if name == "opt" else 7))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name != "llama")
    for module in quantized:  # on the CPU they can only be multiplied in canonical order
        module.unpack()
    ids = torch.randint(0, 4096, (1, 20))
    logits = model(ids).logits
    assert logits.isfinite().all()
    assert 1e-2 < logits.std() < 1e2, f"{logits.std()=}"
    engine = Engine(weights_of(model), 20)
    engine.prompt(ids)
    torch.testing.assert_close(engine.logits, logits[:, -1], rtol=1e-3, atol=1e-3)


# What is measured


def test_kinds_of_work_are_all_of_it(monkeypatch):
    model = synthetic_model(tiny_config("llama"), None, torch.device("cpu"), torch.float32)
    engine = Engine(weights_of(model), 20)
    calls = []

    class Counting:
        def in_graph(self):
            return reference.in_graph()

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments[0] is engine.weights.head))

    engine.functions = Counting()
    engine.step()
    everything, parts = list(calls), []
    for kind in KINDS:
        calls.clear()
        engine.functions = Only(Counting(), kind, engine.weights.head)
        engine.step()
        parts.append(list(calls))
    assert sorted(call for part in parts for call in part) == sorted(everything)
    names = [{name for name, _ in part} for part in parts]
    assert names == [{"multiply"}, {"attention"}, {"embed", "norm", "activation", "choose"}, {"multiply"}]
    assert len(parts[0]) == 2 * 4
    assert parts[3] == [("multiply", True)]
    assert len(everything) == 2 * 8 + 4, "kernels of two blocks, and of the rest"


def test_what_does_not_fit_says_what_would(monkeypatch):
    config = read_config("llama-2-7b")
    shape = shape_of(config)
    three = layer_for(3, "auto", 128)

    def reason(free, layer, context=512):
        monkeypatch.setattr(bench, "free_memory", lambda device: free / 0.97)
        with pytest.raises(LutqError) as caught:
            check_memory(shape, config, layer, 1, context, torch.device("cpu"))
        return str(caught.value)

    monkeypatch.setattr(bench, "free_memory", lambda device: 10e9)
    check_memory(shape, config, three, 1, 512, torch.device("cpu"))
    assert re.fullmatch(r"it needs 14\.\d+ GB and cpu has 10.00 GB free: 4 bits would fit", reason(10e9, None))
    assert re.search(r"free: 2 bits or a context of 4\d\d would fit", reason(3.6e9, three))
    assert reason(1e8, three).endswith("nothing of this shape would fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("plain", [1], 100, torch.half), "--engine must be fast or graph, not 'plain'"),
        (("fast", [0], 100, torch.half), "--batch must be 1 to 16, and 1 for --engine graph, not 0"),
        (("fast", [17], 100, torch.half), "--batch must be 1 to 16, and 1 for --engine graph, not 17"),
        (("graph", [2], 100, torch.half), "1 for --engine graph, not 2"),
        (("fast", [1], 99, torch.half), "--replays must be 100 or more, not 99"),
        (("fast", [1], 100, torch.float32), "--dtype must be float16 or bfloat16 for --engine fast, not float32"),
        (("fast", [1], 100, torch.half, Path("no/such/x.json")), "no directory"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(LutqError, match=message):
        check_settings(*settings)


def a_record(**fields):
    record = {"model": "llama-2-7b", "bits": 3, "batch": 1, "context": 512, "ms": 1.25, "ms_p99": 1.31, "engine": "fast"}
    record |= {"tokens_per_second": 800.0, "bytes": 3.5e9, "percent_of_ceiling": 61.0, "memory_bytes": 3.9e9, "gpus": 1}
    record |= {"kinds_ms": dict(zip(KINDS, (1.0, 0.1, 0.08, 0.06), strict=True)), "prompt_tokens": 512, "first_token_ms": 30.0}
    return record | fields


def test_lines_fit_under_their_titles():
    title, row = columns(list(bench.COLUMNS)), line(a_record())
    assert len(title) == len(row)
    assert " ".join(row.split()) == "llama-2-7b 3 1 512 1.250 1.310 800 3.50 61.0% 80% 8% 6% 5% 3.90 30.0"
    assert " ".join(line(a_record(kinds_ms={})).split()) == "llama-2-7b 3 1 512 1.250 1.310 800 3.50 61.0% 3.90 30.0"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    result = {"gpu": "X", "date": "2026-01-01", "read_ceiling_gbps": 4500.0, "records": [a_record(), a_record(bits=16, batch=8)]}
    assert chart.bars(result["records"], 4500.0)[1] == ("llama-2-7b\n16 bits, batch 8", 16, 1.25, pytest.approx(3.5e9 / 4.5e9))
    chart.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(LutqError, match="nothing to draw"):
        chart.draw(result | {"records": []}, tmp_path / "plot.png")


def test_bench_with_everything_but_a_gpu(monkeypatch, tmp_path):
    """The whole command over stand-ins for what times and launches."""

    def fake_measure(name, layer, batch, context, kind, replays, gpu, dtype):
        if name == "opt-6.7b":
            raise LutqError("there is no compiler")
        if name == "opt-1.3b":
            raise bench.UnfitError("it needs 9 GB and cuda:0 has 8 GB free: 2 bits would fit")
        return a_record(model=name, bits=layer.bits if layer else 16, batch=batch, context=context)

    monkeypatch.setattr(bench, "require_gpu", lambda device: torch.device("cpu"))
    monkeypatch.setattr(
        bench, "environment", lambda gpu, ceiling: {"gpu": "X", "read_ceiling_gbps": ceiling, "date": "2026-01-01"}
    )
    monkeypatch.setattr(bench, "read_ceiling", lambda gpu, repeats: 4500.0)
    monkeypatch.setattr(bench, "measure", fake_measure)
    monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
    lines = []
    shapes = ["llama-2-7b", "opt-1.3b", "opt-125m"]
    result = bench.bench(shapes, [3, 16], batch=[1, 8], json_file=tmp_path / "x.json", echo=lines.append)
    assert [(r["model"], r["bits"], r["batch"]) for r in result["records"]] == [
        (name, bits, batch) for name in ("llama-2-7b", "opt-125m") for bits in (3, 16) for batch in (1, 8)
    ]
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert result["records"][1]["tokens_per_second"] == 8000 / 1.25
    assert math.isclose(result["records"][0]["percent_of_ceiling"], 100 * 3.5e9 / 1.25e6 / 4500)
    assert lines.count("opt-1.3b, 3 bits, batch 1: it needs 9 GB and cuda:0 has 8 GB free: 2 bits would fit") == 1
    with pytest.raises(LutqError, match="there is no compiler"):
        bench.bench(["opt-125m", "opt-6.7b"], [3], echo=lines.append)
    with pytest.raises(LutqError, match="nothing of what was asked for fits"):
        bench.bench(["opt-1.3b"], echo=lines.append)


def test_bench_needs_a_gpu(lutq_command):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    result = lutq_command("bench", "decode", "--shape", "opt-125m", "--synthetic")
    assert result.returncode == 2
    assert "torch sees no GPU here" in result.stderr, result.stderr


# What steps.py says to the kernels

STRUCTURES = {
    "Result": steps.ResultArguments,
    "Embedding": steps.EmbeddingArguments,
    "Inboxes": steps.InboxesArguments,
    "Norm": steps.NormArguments,
    "Activation": steps.ActivationArguments,
    "Choice": steps.ChoiceArguments,
    "Attention": steps.AttentionArguments,
    "Fusion": FusionArguments,
}


def fields_of(name):
    """(field, kind) of a structure in the text of the kernels."""
    body = re.sub(r"//[^\n]*", "", re.search(rf"struct {name} \{{(.*?)\}};", TEXT, re.DOTALL)[1])
    found = []
    for declaration in body.split(";"):
        if match := re.match(r"\s*(const )?(\w+)\s*(.*)", declaration, re.DOTALL):
            for field in match[3].split(","):
                kind = "pointer" if "*" in field or "*" in match[3].split(",")[0] else match[2]
                found.append((field.replace("*", "").strip(), kind))
    return found


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_those_of_the_kernels(name):
    kinds = {"pointer": ctypes.c_void_p, "int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}
    kinds |= {"Result": steps.ResultArguments, "Inboxes": steps.InboxesArguments}
    found = [(field, kinds[kind]) for field, kind in fields_of(name)]
    found = [("inbox", kind * inboxes.MOST_RANKS) if field == "inbox[MOST_RANKS]" else (field, kind) for field, kind in found]
    assert found == list(STRUCTURES[name]._fields_)


def test_numbers_are_those_of_the_kernels():
    functions = re.search(r"enum Function \{(.*?)\}", TEXT)[1]
    assert {key.lower(): int(value) for key, value in re.findall(r"(\w+) = (\d)", functions)} == FUNCTIONS
    assert set(FUNCTIONS) == set(reference.FUNCTIONS)
    assert f"MOST_CLUSTER = {steps.MOST_CLUSTER};" in TEXT
    assert f"MOST_RANKS = {inboxes.MOST_RANKS}," in TEXT
    assert ctypes.sizeof(steps.InboxesArguments) == 8 * inboxes.MOST_RANKS + 8 + 16, "no padding"
    threads = int(re.search(r"NORM_THREADS = (\d+)", TEXT)[1])
    assert 4 * 8 * threads == steps.MOST_HIDDEN


@pytest.mark.parametrize("clusters", [True, False])
def test_plans_fill_the_gpu_and_are_allowed(clusters):
    gpu = H200._replace(clusters=clusters)
    for heads, kv_heads in ((32, 32), (32, 8), (64, 8), (40, 40), (52, 52), (96, 96), (9, 3), (12, 12), (5, 1), (7, 1), (24, 8)):
        for batch in (1, 2, 8, 16):
            for capacity in (64, 512, 2048, 8192, 131072):
                found = plan(batch, heads, kv_heads, capacity, gpu)
                units, about = batch * heads // found.rows, f"{heads=} {kv_heads=} {batch=} {capacity=} {found=}"
                assert heads // kv_heads % found.rows == 0, about
                assert found.cluster in ((1, 2, 4, 8) if clusters else (1,)), about
                blocks = units * found.cluster * found.spread
                assert blocks <= max(units, steps.BLOCKS * gpu.processors), about
                if capacity >= 512 and heads >= 32:
                    assert blocks >= 128, about
    assert plan(1, 32, 32, 512, H200) == (1, 8, 1), "LLaMA-2-7B"


def test_norms_that_read_sums_are_shared():
    for K in (8, 96, 256, 520, 576, 768, 4096, 5120, 9216, 12288, 16384):
        blocks = steps.shared_by(K, H200)
        assert blocks in (1, 2, 4, 8), f"{K=} {blocks=}"
        assert 8 * SHARED_THREADS * blocks >= K, f"{K=} {blocks=}: more than the threads of the kernel"
        assert blocks == 1 or blocks * steps.SHARE <= K, f"{K=} {blocks=}"
    assert steps.shared_by(4096, H200) == 8
    assert steps.shared_by(4096, H200._replace(clusters=False)) == 1


@pytest.mark.parametrize("clusters", [True, False])
def test_norms_that_wait_for_other_gpus_run_at_once(clusters):
    gpu, sums = H200._replace(clusters=clusters), Sums(torch.empty(2, 16), None)
    for K in (8, 512, 4096, 8200, 16384):
        for M in range(1, steps.MOST_BATCH + 1):
            blocks = steps.cluster_of(torch.empty(M, K), M, K, True, gpu)
            assert 2 * M * blocks <= gpu.processors, f"{K=} {M=} {blocks=}"
            assert blocks in (1, steps.shared_by(K, gpu)), f"{K=} {M=} {blocks=}: too few threads"
            assert steps.cluster_of(torch.empty(M, K), M, K, False, gpu) == 1
        assert steps.cluster_of(sums, 1, K, False, gpu) == steps.shared_by(K, gpu)
    assert steps.cluster_of(torch.empty(3, 8192), 3, 8192, True, gpu) == (8 if clusters else 1)


def test_inboxes_are_told_to_the_kernels():
    found = Inboxes([4096, 8192, 12288], 2, 1 << 17, torch.device("cpu"))
    a = found.at(5)
    assert list(a.inbox) == [4096, 8192, 12288, *[None] * 5]
    assert (a.step, a.rank, a.world, a.turn, a.most) == (found.step.data_ptr(), 2, 3, 5, 1 << 17)
    assert found.step.tolist() == [0]
    most = steps.MOST_BATCH * steps.MOST_HIDDEN
    for world in range(2, inboxes.MOST_RANKS + 1):
        assert inbox_bytes(world, most) % (2 << 20) == 0, "what lutq_inbox_make takes"


def test_results_are_told_to_the_kernels():
    rows = torch.empty(3, 40, dtype=torch.float16)
    found = steps.result(rows[:, 8:32])
    assert (found.data, found.bias, found.stride, found.slabs) == (rows.data_ptr() + 16, None, 40, 0)
    whole = Sums(torch.empty(4, 48)[:, :40], torch.empty(40, dtype=torch.float16))
    found = steps.result(whole.split([16, 24], dim=1)[1].unflatten(1, (-1, 8)))
    assert (found.data, found.bias) == (whole.slabs.data_ptr() + 64, whole.bias.data_ptr() + 32)
    assert (found.stride, found.slabs) == (48, 4)
    found = steps.result(None)
    assert (found.data, found.bias, found.stride, found.slabs) == (None, None, 0, 0)


def test_what_the_kernels_do_not_take():
    kernels = object.__new__(Kernels)
    shape = Shape("llama", 4096, 32, 8, 128, 11008, 32, 32000, 4096, "silu", True)
    assert kernels.reason(shape, torch.float16, 16) is None
    for change, dtype, batch, words in (
        ({}, torch.float32, 1, "float16 and bfloat16, not float32"),
        ({"head_size": 24}, torch.float16, 1, "not 24"),
        ({"head_size": 256}, torch.float16, 1, "not 256"),
        ({"hidden": 100}, torch.float16, 1, "multiples of 8"),
        ({"hidden": 32768}, torch.float16, 1, "16384 at most"),
        ({"inner": 172}, torch.float16, 1, "multiples of 8"),
        ({}, torch.float16, 17, "16 sequences at most, not 17"),
    ):
        changed = Shape(**{**shape.__dict__, **change})
        assert words in kernels.reason(changed, dtype, batch), f"{change=} {dtype=} {batch=}"
