"""Corrections beside the planes: products and fits against float64, and layers that keep them through everything."""

import json

import pytest
import torch
from conftest import random_packed
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import lutq
import lutq.hf
from lutq import calib, residual, sensitivity
from lutq.config import LayerConfig, QuantConfig
from lutq.cuda import prepack
from lutq.decode.products import Module, Packed, join, product_of
from lutq.errors import LutqError
from lutq.fit import fit, solve_layer
from lutq.generate import Sampling, generate
from lutq.info import describe
from lutq.linear import LutLinear
from lutq.pack import OWN, Corrected, dequantize, from_tensors, highest, in_eight_bits, stored_shapes, to_tensors, weight
from lutq.parallel.ranks import Ranks
from lutq.quantize import quantize_checkpoint
from lutq.report import bits_per_weight
from lutq.residual import Residual
from lutq.tokens import load_tokenizer
from lutq.tunable import Tunable

SMALL = {"calib_windows": 4, "calib_length": 32, "rounds": 1, "sweeps": 1, "iterations": 1}
LAYERS = [
    LayerConfig(2, 32, outliers_per_row=3),
    LayerConfig(3, 64, "uniform", low_rank=4),
    LayerConfig(1, 0, "bcq", False, outliers_per_row=1, low_rank=2),
    LayerConfig(2, 32, scale_bits=8, outliers_per_row=2, low_rank=2),
]
LIMITS = {torch.float32: 2e-6, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_residual(N, K, layer, seed=0):
    """Corrections of the size of the weights of `random_packed`."""
    random = torch.Generator().manual_seed(seed)
    shapes = residual.residual_shapes(N, K, layer)
    tensors = {name: (0.5 * torch.randn(shape, generator=random)).to(dtype) for name, (shape, dtype) in shapes.items()}
    if layer.outliers_per_row:
        places = torch.rand(N, K, generator=random).topk(layer.outliers_per_row).indices.sort(1).values
        tensors["outlier_columns"] = places.to(tensors["outlier_columns"].dtype)
    return Residual(**tensors)


def random_form(N, K, layer, seed=0):
    packed = random_packed(N, K, layer, seed)
    return Corrected(in_eight_bits(packed) if layer.scale_bits == 8 else packed, random_residual(N, K, layer, seed))


def random_layer(N, K, layer, bias=True):
    vector = gaussian(N, seed=1) if bias else None
    return LutLinear.from_packed(random_form(N, K, layer), K, layer, vector)


def dense(form, K):
    """Corrections in float64, entry by entry."""
    values, columns, left, right = form
    N = len(values if values is not None else left)
    W = torch.zeros(N, K, dtype=torch.float64)
    if values is not None:
        for n in range(N):
            for value, column in zip(values[n].tolist(), columns[n].tolist(), strict=True):
                W[n, column] += value
    return W if left is None else W + left.double() @ right.double()


def problem(N, K, seed=0):
    """W with some weights far out, and second moments of correlated inputs."""
    W, x = gaussian(N, K, seed=seed), gaussian(4 * K, K, seed=seed + 1) @ gaussian(K, K, seed=seed + 2)
    W[torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < 0.02] *= 6
    H = x.T @ x / len(x)
    return W, H + 0.01 * H.diagonal().mean() * torch.eye(K)


def squared(E, H):
    """|E|^2 in the metric of H, float64."""
    E = E.double()
    return (E if H is None else E @ H.double()).mul(E).sum().item()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_product(dtype, layer):
    """Few and many rows: gathered, and with a dense V."""
    for N, K in ((33, 100), (64, 576)):
        module = random_layer(N, K, layer).to(dtype)
        W = dequantize(*module.packed(), layer.group, layer.grid, K).double() + dense(module.residual, K)
        assert torch.allclose(module.dequantize().double(), W, atol=1e-5), f"{N=} {K=} {layer=}"
        for shape in ((K,), (0, K), (1, K), (3, K), (2, 5, K), (300, K)):
            x = gaussian(*shape).to(dtype)
            y, expected = module(x), x.double() @ W.T + module.bias.double()
            about = f"{dtype=} {layer=} {N=} {K=} {shape=}"
            assert y.dtype == dtype, f"{about} {y.dtype=}"
            assert y.shape == expected.shape, f"{about} {y.shape=}"
            error = ((y.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
            assert error <= LIMITS[dtype], f"{about} {error=}"


def test_memory_of_a_product_is_bounded():
    """No tensor on the way has more numbers than W or y, however many rows there are."""
    layer, sizes = LayerConfig(2, 0, outliers_per_row=5), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel())
            return result

    corrections = random_residual(64, 320, layer)
    for M in (1, 8, 9, 100):
        x = gaussian(M, 320)
        sizes.clear()
        with Watch():
            residual.product(x, corrections)
        assert max(sizes) <= 64 * 320 + x.numel(), f"{M=} {sizes=}"


def test_outliers_are_the_least_squares_ones():
    E, H = problem(12, 70)
    columns = residual.outlier_columns(E, 32, 4)
    assert torch.equal(residual.outlier_values(E, None, columns), E.gather(1, columns))
    v = residual.outlier_values(E, H, columns)
    for n in range(12):
        at = columns[n]
        expected = torch.linalg.solve(H.double()[at][:, at], (E[n].double() @ H.double())[at])
        assert torch.allclose(v[n].double(), expected, rtol=1e-3, atol=1e-4), f"{n=} {v[n]=} {expected=}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual, "CHUNK", 40)
        assert torch.allclose(residual.outlier_values(E, H, columns), v, rtol=1e-5), "in parts"


@pytest.mark.parametrize(("N", "K"), [(20, 50), (50, 20), (32, 32)])
def test_low_rank_is_the_best_of_its_rank(N, K):
    E, H = problem(N, K)
    for metric in (None, H):
        L = torch.eye(K, dtype=torch.float64) if metric is None else torch.linalg.cholesky(H.double())
        singular = torch.linalg.svdvals(E.double() @ L)
        for R in (1, 3, 8):
            left, right = residual.low_rank(E, metric, R)
            found, best = squared(E - left @ right, metric), singular[R:].square().sum().item()
            about = f"{N=} {K=} {R=} metric {metric is not None}"
            assert best * (1 - 1e-6) <= found <= best * (1 + 1e-3), f"{about} {found=} {best=}"
            ratio = (left.square().mean() / right.square().mean()).sqrt().item()
            assert 0.5 < ratio < 2, f"{about}: factors of unlike size, {ratio=}"
    left, right = residual.low_rank(torch.zeros(N, K), None, 2)
    assert not (left @ right).any(), f"{N=} {K=}: nothing to correct"


@pytest.mark.parametrize(("K", "g"), [(96, 32), (100, 32), (100, 128)])
def test_planted_outliers_are_found_and_taken_out(K, g):
    W = gaussian(8, K).clamp(-2, 2) + 5
    places = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(n))[:3].sort().values for n in range(8)])
    planted = W.scatter(1, places, 40 * torch.tensor([1.0, -1.0, 1.0]).expand(8, 3))
    columns = residual.outlier_columns(planted, g, 3)
    assert torch.equal(columns, places), f"{K=} {g=}"
    rest = residual.without_outliers(planted, g, columns)
    for n in range(8):
        for k in range(K):
            group = [j for j in range(k // g * g, min(K, (k // g + 1) * g)) if j not in places[n]]
            expected = planted[n, group].mean() if k in places[n] else W[n, k]
            assert rest[n, k].item() == pytest.approx(expected.item(), rel=1e-5), f"{K=} {g=} {n=} {k=}"


@pytest.mark.parametrize("method", ["rtn", "greedy", "alternating", "feedback"])
@pytest.mark.parametrize(("outliers", "rank", "scale_bits"), [(2, 0, 16), (0, 3, 16), (2, 3, 16), (2, 3, 8)])
def test_the_error_is_never_larger_than_without(method, outliers, rank, scale_bits):
    for (N, K), bits, group in (((24, 96), 2, 32), ((96, 40), 3, 0), ((16, 100), 4, 64)):
        W, H = problem(N, K)
        config = QuantConfig(bits=bits, group=group, method=method, scale_bits=scale_bits, **SMALL)
        bare = config.layer("fc1")
        layer = bare._replace(outliers_per_row=outliers, low_rank=rank)
        about = f"{method=} {N=} {K=} {bits=} {group=} {layer=}"
        if method == "feedback":
            (with_, _, after), (without, _, _) = (solve_layer(W, H, one, config) for one in (layer, bare))
            size = squared(W, H)
            assert after == pytest.approx((squared(W - weight(with_, layer, K), H) / size) ** 0.5, rel=1e-3), about
        else:
            with_, without, H = fit(W, layer, config), fit(W, bare, config), None
        found, before = squared(W - weight(with_, layer, K), H), squared(W - weight(without, bare, K), H)
        assert found < before, f"{about} {found=} {before=}"
        stored = to_tensors(with_)
        assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == stored_shapes(N, K, layer), about
        again = to_tensors(from_tensors(stored))
        assert all(torch.equal(again[name], tensor) for name, tensor in stored.items()), about
        assert torch.allclose(
            weight(with_, layer, K).double(),
            dequantize(*highest(with_), group, layer.grid, K).double() + dense(with_.residual, K),
            atol=1e-5,
        ), about


def test_both_corrections_find_what_was_put_in():
    """A matrix that planes hold badly because of main directions and outliers: both together do far better than one alone."""
    for N, K in ((64, 128), (48, 100)):
        W, H = gaussian(N, K), problem(N, K)[1]
        W += 3 * gaussian(N, 2, seed=4) @ gaussian(2, K, seed=5)
        places = torch.stack([torch.randperm(K, generator=torch.Generator().manual_seed(n))[:2] for n in range(N)])
        W.scatter_add_(1, places, torch.full((N, 2), 25.0))
        config = QuantConfig(bits=2, group=64, method="feedback", **SMALL)
        for metric in (H, None):
            errors = {}
            for counts in ((0, 0), (2, 0), (0, 2), (2, 2)):
                layer = LayerConfig(2, 64, outliers_per_row=counts[0], low_rank=counts[1])
                alternating = QuantConfig(bits=2, group=64)
                form = fit(W, layer, alternating) if metric is None else solve_layer(W, metric, layer, config)[0]
                errors[counts] = squared(W - weight(form, layer, K), metric)
            about = f"{N=} {K=} metric {metric is not None} {errors=}"
            assert errors[2, 2] < 0.5 * min(errors[2, 0], errors[0, 2]), about
            assert max(errors[2, 0], errors[0, 2]) < errors[0, 0], about


def test_wide_layers_have_wider_columns():
    for K, dtype in ((32768, torch.int16), (32769, torch.int32)):
        W = torch.zeros(1, K)
        W[0, -1] = 1.0
        layer = LayerConfig(1, 0, outliers_per_row=1)
        assert residual.residual_shapes(1, K, layer)["outlier_columns"] == ((1, 1), dtype), K
        form = fit(W, layer, QuantConfig(bits=1, group=0, method="greedy"))
        assert form.residual.outlier_columns.dtype == dtype, K
        assert form.residual.outlier_columns.tolist() == [[K - 1]], K
        module = LutLinear.from_packed(form, K, layer)
        assert module((torch.arange(K) == K - 1).float()).item() == pytest.approx(1.0, abs=1e-3), K


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_corrections_keep_their_bits(layer):
    module = random_layer(33, 100, layer)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if name != "bias"}
    assert before.keys() == stored_shapes(33, 100, layer).keys()
    for moved in (module.to(torch.bfloat16), module.double(), module.half().to("cpu")):
        for name, tensor in before.items():
            assert torch.equal(moved.state_dict()[name], tensor), f"{layer=} {name}"
            assert moved.state_dict()[name].dtype == tensor.dtype, f"{layer=} {name}"
    other = random_layer(33, 100, layer)
    for name in before:
        other._buffers[name] = torch.zeros_like(other._buffers[name])
    other.load_state_dict(module.state_dict())
    x = gaussian(3, 100)
    assert torch.equal(other(x), module.float()(x)), f"{layer=}"
    assert f"outliers_per_row={layer.outliers_per_row}" in repr(module) or not layer.outliers_per_row, repr(module)


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[3], LayerConfig(3, 32, low_rank=2)], ids=str)
def test_tuning_sees_the_corrections(layer):
    """Outputs and gradients of x are those of the whole W; scales are tuned beside corrections that stay."""
    N, K = 6, 100
    form = random_form(N, K, layer)
    W = weight(form, layer, K)
    module, free = Tunable(form, K, layer, None), Tunable(form, K, layer, None, W + 0.01 * gaussian(N, K))
    x = gaussian(7, K).requires_grad_()
    y, target = module(x), gaussian(7, N, seed=3)
    assert torch.allclose(y, x @ W.T, atol=1e-4), f"{layer=}"
    (y * target).sum().backward()
    assert torch.allclose(x.grad, target @ W, atol=1e-4), f"{layer=}"
    assert torch.allclose(free(x), y, atol=1e-3), f"{layer=}: the codes moved before any step"
    for one in (module, free):
        for part, tensor in to_tensors(form).items():
            if part in Residual._fields:
                assert torch.equal(to_tensors(one.packed())[part], tensor), f"{layer=} {part}"
        assert torch.allclose(weight(one.packed(), layer, K), W, atol=1e-2), f"{layer=}"


FILES = {
    "alternating": ("opt", {"bits": 2, "group": 64, "outliers": 2.5, "low_rank": 3, "head_bits": 3}),
    "rtn": ("llama-tied", {"bits": 3, "group": 32, "method": "rtn", "outliers": 1.0}),
    "feedback": (
        "llama",
        {"bits": 2, "group": 32, "method": "feedback", "outliers": 2.0, "low_rank": 2, "scaling": True} | SMALL,
    ),
    "scales in 8 bits": (
        "opt",
        {"bits": 2, "group": 32, "method": "feedback", "outliers": 2.0, "low_rank": 2, "scale_bits": 8} | SMALL,
    ),
}


@pytest.fixture(scope="module", params=FILES)
def file(request, tiny, tmp_path_factory):
    """(directory, report) of a checkpoint with corrections, in several shards. Shared: do not write into it."""
    family, settings = FILES[request.param]
    return quantized(tiny(family), tmp_path_factory.mktemp("residual") / "out", settings, shard_bytes=100_000)


def quantized(source, out, settings, **options):
    text, name = calib.calibration_text("books")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calib, "calibration_text", lambda _: (text[:6000], name))
        return out, quantize_checkpoint(source, out, QuantConfig(**settings), device="cpu", **options)


def read(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_a_checkpoint_is_loaded_and_saved_bit_for_bit(file, tmp_path):
    out, report = file
    stored, model = read(out), lutq.load(out, device="cpu")
    half = lutq.load(out, device="cpu", dtype="bfloat16").state_dict()
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    for layer in report.layers:
        parts = stored_shapes(layer.N, layer.K, layer.layer)
        assert layer.layer.corrected, layer.name
        for part in parts:
            key = f"{layer.name}.{part}"
            assert torch.equal(model.state_dict()[key], stored[key]), key
            assert model.state_dict()[key].dtype == stored[key].dtype, key
            assert torch.equal(again[key], stored[key]), key
            assert torch.equal(half[key], stored[key]), key
            assert half[key].dtype == stored[key].dtype, key
    for folder in (out, tmp_path / "again"):
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["format_version"] == 2, folder
    different = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()
    codes = [tensor for tensor in different if tensor.dtype in (torch.uint8, torch.int8) and report.config.scale_bits == 8]
    wanted = sum(tensor.nbytes for tensor in different) + sum(tensor.nbytes for tensor in codes)  # scales become fp16
    assert lutq.hf.model_bytes(out, torch.float32, lutq.hf.check_checkpoint(out).layers()) == wanted
    tokens = torch.randint(3, 4096, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(tokens).logits
        assert torch.equal(lutq.load(tmp_path / "again", device="cpu")(tokens).logits, logits)
        for name in [layer.name for layer in report.layers]:
            module = model.get_submodule(name)
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight, linear.bias = torch.nn.Parameter(module.dequantize()), module.bias
            model.set_submodule(name, linear)
        assert torch.allclose(model(tokens).logits, logits, atol=1e-3), "forward and dequantize differ"


def test_everything_is_counted(file, tiny):
    out, report = file
    names, weights = [layer.name for layer in report.layers], sum(layer.N * layer.K for layer in report.layers)
    parts = {f"{name}.{part}" for name in names for part in OWN}
    stored = {key: tensor for key, tensor in read(out).items() if key in parts}
    total = 8 * sum(tensor.nbytes for tensor in stored.values()) / weights
    assert total == pytest.approx(bits_per_weight(report.layers))
    card, described = (out / "README.md").read_text(), describe(out, "cpu")
    for text in (report.summary(), card, described):
        assert f"{total:.3f}" in text, f"{total=} {text}"
        for title, prefix in (("outliers", "outlier_"), ("low rank", "low_rank_")):
            bits = 8 * sum(tensor.nbytes for key, tensor in stored.items() if f".{prefix}" in key) / weights
            assert "saves -" not in text, f"corrections are no part of what 8 bits save: {text}"
            lines = [line for line in text.splitlines() if title in line and "in fp16 beside the planes" in line]
            assert len(lines) == (bits > 0), f"{title} {text}"
            assert not lines or f"{bits:.3f} bits per weight" in lines[0], f"{bits=} {lines}"
    model = lutq.load(out, device="cpu")
    for layer in report.layers:  # the figures of each layer are those of the whole W
        assert layer.error < layer.norm, layer.name
    if report.config.method == "rtn":
        original = lutq.load(tiny(report.source), device="cpu")
        for layer in report.layers:
            W = original.get_submodule(layer.name).weight
            error = (model.get_submodule(layer.name).dequantize() - W).square().sum().item()
            assert layer.error == pytest.approx(error, rel=1e-4), layer.name


def test_engines_on_the_cpu(file):
    out, _ = file
    model, tokenizer = lutq.load(out, device="cpu"), load_tokenizer(out)
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    texts = {name: generate(model, tokenizer, "a b", sampling, engine=name).text for name in ("plain", "graph", "fast")}
    assert len(set(texts.values())) == 1, texts


def in_kernel_order(layer, seed=0):
    """A layer as on a GPU, on the CPU, where it could not be multiplied."""
    module = LutLinear.from_packed(random_form(64, 128, layer, seed), 128, layer)
    module.kernel_codes, module.kernel_records, module.wide = prepack(module.packed(), layer)
    for name in ("codes", "scales", "offsets", "zero_points"):
        module._buffers[name] = None
    return module


def test_the_fast_engine_asks_corrected_layers_themselves():
    """Layers in kernel order are read as planes only where there is nothing beside these, alone and joined."""
    bare, corrected = LayerConfig(3, 32), LayerConfig(3, 32, outliers_per_row=2)
    assert isinstance(product_of(in_kernel_order(bare)), Packed)
    assert isinstance(product_of(in_kernel_order(corrected)), Module)
    assert [type(one) for one in join([in_kernel_order(bare, i) for i in range(3)])] == [Packed]
    assert [type(one) for one in join([in_kernel_order(corrected, i) for i in range(3)])] == [Module] * 3
    mixed = join([in_kernel_order(bare), in_kernel_order(corrected)])
    assert [type(one) for one in mixed] == [Packed, Module]
    module = in_kernel_order(LAYERS[0])
    before = random_layer(64, 128, LAYERS[0], bias=False)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), f"{name} changed in kernel order"
    assert torch.equal(module.dequantize(), before.dequantize())


def test_layers_without_corrections_are_stored_as_before(tiny, tmp_path):
    quantize_checkpoint(tiny("opt"), tmp_path / "out", QuantConfig(bits=2, method="greedy"), device="cpu")
    modules = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules"]
    for name, fields in modules.items():
        assert fields == {"bits": 2, "group": 128, "grid": "bcq", "offsets": True}, name
    assert not [key for key in read(tmp_path / "out") if key.rpartition(".")[2] in Residual._fields]


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_target_counts_corrections(tiny, tmp_path, monkeypatch, scale_bits):
    settings = SMALL | {"method": "greedy", "group": 64, "outliers": 2.0, "scale_bits": scale_bits}
    units = []
    monkeypatch.setattr(sensitivity, "measure", lambda *args, do=sensitivity.measure: units.extend(do(*args)) or units)
    out, report = quantized(tiny("opt"), tmp_path / "out", settings | {"target_bpw": 3.5})
    assert 3.0 < bits_per_weight(report.layers) <= 3.5
    chosen = {layer.name: layer for layer in report.layers}
    for unit in units:
        choice = next(choice for choice in unit.choices if choice.bits == chosen[unit.names[0]].layer.bits)
        assert choice.size == 8 * sum(chosen[name].nbytes for name in unit.names), unit.names
    assert all(
        module.layer.outliers_per_row for module in lutq.load(out, device="cpu").modules() if isinstance(module, LutLinear)
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"outliers": 5}, "outliers must be a percentage up to 3.0, where they cost a bit a weight; not 5.0"),
        ({"target_ms": 1.0, "low_rank": 2}, "target_ms counts the products with planes and low_rank adds others"),
        ({"target_ms": 1.0, "outliers": 1.0}, "target_ms counts the products with planes and outliers adds others"),
        ({"bits": 4, "lowest_bits": 2, "outliers": 1.0}, "outliers corrects one precision and lowest_bits asks for several"),
        ({"bits": 4, "lowest_bits": 2, "low_rank": 2}, "low_rank corrects one precision and lowest_bits asks for several"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(LutqError, match=words.replace("(", r"\(")):
        QuantConfig(**settings)


def test_what_does_not_fit(tiny, tmp_path, monkeypatch):
    with pytest.raises(LutqError, match=r"low_rank is 49 and .* has 96 outputs of 96 inputs: use 48 at most"):
        quantize_checkpoint(tiny("opt"), tmp_path / "out", QuantConfig(low_rank=49), device="cpu")
    settings = {"bits": 2, "method": "greedy", "outliers": 0.01, "low_rank": 48}
    out, report = quantized(tiny("opt"), tmp_path / "out", settings)
    assert {layer.layer.outliers_per_row for layer in report.layers} == {1}, "one in every row at least"
    monkeypatch.setattr(lutq.hf, "current", lambda: Ranks(0, 2))
    with pytest.raises(LutqError, match="has corrections beside its planes, which processes cannot share: use one"):
        lutq.load(out, device="cpu")
    monkeypatch.undo()
    config = json.loads((out / "config.json").read_text())
    name = report.layers[0].name
    for change, words in (
        ({"outliers_per_row": -1}, "values this version does not know"),
        ({"low_rank": True}, "values this version does not know"),
        ({"outliers_per_row": 2}, f"config.json asks for {name}.outlier_values of shape"),
        ({"low_rank": 0}, f"{name}.low_rank_left is not a tensor this version of lutq knows"),
        ({"corrections": 1}, "modules is not as lutq writes it"),
    ):
        fields = config["quantization_config"]["modules"][name]
        changed = config | {"quantization_config": config["quantization_config"] | {"modules": {name: fields | change}}}
        if len(report.layers) > 1:
            changed["quantization_config"]["modules"] |= {
                other: f for other, f in config["quantization_config"]["modules"].items() if other != name
            }
        (out / "config.json").write_text(json.dumps(changed))
        with pytest.raises(LutqError, match=words):
            lutq.load(out, device="cpu")


def test_commands(tiny, lutq_command, tmp_path):
    flags = ("--bits", "2", "--method", "greedy", "--outliers", "1.5", "--low-rank", "2", "--out", "out", "--device", "cpu")
    done = lutq_command("quantize", tiny("opt"), *flags)
    assert done.returncode == 0, done.stderr
    assert "outliers          1 to 3 weights of each row in fp16 beside the planes" in done.stdout, done.stdout
    assert "low rank          rank 2 in fp16 beside the planes" in done.stdout, done.stdout
    done = lutq_command("info", "out", "--device", "cpu")
    assert "low rank: rank 2 in fp16 beside the planes" in done.stdout, done.stdout
    done = lutq_command("generate", "The", "--model", "out", "--max-new-tokens", "3", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    done = lutq_command("quantize", tiny("opt"), "--outliers", "4", "--out", "other")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("lutq: outliers must be a percentage"), done.stderr
