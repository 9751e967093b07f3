"""Scales and offsets in 8 bits: the arithmetic of codes and units, and what of it reaches fits, layers, files and commands."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from conftest import random_packed
from safetensors.torch import load_file, save_file

import lutq
from lutq import scales, sensitivity, solve
from lutq.config import LayerConfig, QuantConfig
from lutq.errors import LutqError
from lutq.fit import fit, solve_layer
from lutq.info import describe
from lutq.linear import LutLinear
from lutq.pack import PARTS, dequantize, from_tensors, highest, in_eight_bits, stored_shapes, to_tensors
from lutq.prepack import pack_codes, pack_records
from lutq.quantize import quantize_checkpoint
from lutq.tunable import Tunable

DTYPES = [scales.SCALES, scales.OFFSETS]
LAYERS = [LayerConfig(3, 32), LayerConfig(2, 64, offsets=False), LayerConfig(1, 0), LayerConfig(4, 32, "uniform")]
LAYERS = [layer._replace(scale_bits=8) for layer in LAYERS]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(N, K, layer, seed=0):
    return in_eight_bits(random_packed(N, K, layer, seed))


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


# Codes and units


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_every_unit_comes_back(dtype):
    most = torch.iinfo(dtype).max
    units = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16)  # 0, subnormal and normal numbers
    units = units[units <= 65504 // most]
    assert len(units) > 20_000
    codes = torch.arange(0 if dtype == torch.uint8 else -most, most + 1, dtype=torch.int16).to(dtype)
    for part in units.split(2048):
        unit, wanted = (tensor.contiguous() for tensor in torch.broadcast_tensors(part[:, None], codes))
        wanted = torch.where(unit > 0, wanted, torch.zeros_like(wanted))
        values = scales.decode(wanted, unit)
        assert torch.isfinite(values).all(), f"{dtype=} {part[0]=}"
        exact = unit.numpy().astype(np.float64) * wanted.numpy()
        assert (values.numpy() == exact.astype(np.float16)).all(), f"{dtype=} {part[0]=}"
        assert torch.equal(scales.encode(values, unit, dtype), wanted), f"{dtype=} {part[0]=}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 2.0**-24, 3e-7, 1e-4, 0.03, 1.0, 700.0, 65504.0])
def test_units_are_the_least_that_reach(dtype, size):
    most = torch.iinfo(dtype).max
    values = gaussian(3, 40, 7)
    values = (values / values.abs().max() * size).half().float()
    values = values.abs() if dtype == torch.uint8 else values
    units = scales.units_of(values, dtype)
    assert units.shape == (3, 2), f"{units.shape=}"
    largest = torch.stack([part.abs().flatten(1).amax(1) for part in (values.flatten(1)[:, :256], values.flatten(1)[:, 256:])], 1)
    assert torch.equal(scales.largest(values), largest), f"{dtype=} {size=}"
    free = largest < 65000
    assert (most * units.double() >= largest * (1 - 1e-6))[free].all(), f"{dtype=} {size=}"
    less = (units.view(torch.int16) - 1).clamp(min=0).view(torch.float16).double()
    assert (most * less < largest)[free & (units > 0)].all(), f"{dtype=} {size=}: a smaller unit would do"
    unit = scales.spread(units, 40, 7)
    flat = units.numpy().repeat(256, axis=1)[:, :280].reshape(3, 40, 7)
    assert (unit.numpy() == flat).all(), f"{dtype=} {size=}"
    near = scales.nearest(values, unit, dtype)
    limit = 0.5 * unit.double() + near.double().abs() * 2.0**-11
    excess = (near.double() - values.double()).abs() - limit
    assert (excess <= 1e-9 * size)[values.abs() < 65000].all(), f"{dtype=} {size=} {excess.max()=}"
    assert torch.equal(scales.units_of(near, dtype)[units == 0], units[units == 0])
    assert torch.equal(scales.grown(units, near, dtype), units), f"{dtype=} {size=}: nothing has grown"


def test_outgrown_units_grow():
    values = torch.ones(1, 2, 256)
    values[0, 1] = 3
    units = scales.units_of(values, scales.SCALES)
    grown = scales.grown(units, values * torch.tensor([0.5, 1.01])[:, None], scales.SCALES)
    assert grown[0, 0] == units[0, 0], "units do not shrink"
    assert grown[0, 1] > units[0, 1]
    assert torch.equal(grown[:, 1], scales.units_of(values * 1.01, scales.SCALES)[:, 1])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(7, 100), (300, 172), (1, 20)])
def test_stored_tensors_come_back(layer, N, K):
    packed = rounded(N, K, layer)
    tensors = to_tensors(packed)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert found == stored_shapes(N, K, layer), f"{layer=} {N=} {K=}"
    again = from_tensors(tensors)
    assert same(to_tensors(again), tensors), f"{layer=} {N=} {K=}"
    for one, other in zip(highest(again), highest(packed), strict=True):
        assert (one is None and other is None) or torch.equal(one, other), f"{layer=} {N=} {K=}"
    unrounded = random_packed(N, K, layer)
    step = scales.spread(packed.scale_units, *unrounded.scales.shape[1:]).float()
    assert ((highest(packed).scales.float() - unrounded.scales.float()).abs() <= 0.63 * step).all(), f"{layer=} {N=} {K=}"


# Fits


@pytest.mark.parametrize("method", ["rtn", "greedy", "alternating"])
@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [0, 32, 64])
def test_plain_fits(method, has_offsets, bits, group):
    N, K = 40, 172
    W = gaussian(N, K) * torch.linspace(0.5, 2, N)[:, None]
    wide, narrow = (
        QuantConfig(bits=bits, group=group, method=method, offsets=has_offsets, symmetric=not has_offsets, scale_bits=scale_bits)
        for scale_bits in (16, 8)
    )
    about = f"{method=} {has_offsets=} {bits=} {group=}"
    layer = narrow.layer("x")
    packed = fit(W, layer, narrow)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in to_tensors(packed).items()}
    assert found == stored_shapes(N, K, layer), about
    read = highest(from_tensors(to_tensors(packed)))
    stored = dequantize(*read, group, layer.grid, K)
    assert torch.equal(stored, dequantize(*highest(packed), group, layer.grid, K)), about
    plain = dequantize(*fit(W, wide.layer("x"), wide), group, layer.grid, K)
    errors = [((W - Q).norm() / W.norm()).item() for Q in (plain, stored)]
    assert errors[1] < 1.015 * errors[0], f"{about} {errors=}"
    if method != "greedy":  # codes are chosen for the stored grids: no level is nearer
        g = group or 192
        signs = 2 * ((torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1)) & 1).double() - 1
        if method == "rtn":
            zeros = (2**bits - 1) / 2 if read.zero_points is None else read.zero_points.double()[..., None]
            levels = read.scales[0].double()[..., None] * (torch.arange(2.0**bits).double() - zeros)
        else:
            levels = torch.einsum("lb,bng->ngl", signs, read.scales.double())
            levels = levels if read.offsets is None else levels + read.offsets.double()[..., None]
        levels = levels.repeat_interleave(g, 1)[:, :K]
        least = (levels - W.double()[..., None]).abs().amin(-1)
        assert ((W - stored).double().abs() <= least + 1e-5).all(), about


def test_chunks_do_not_matter(monkeypatch):
    W, config = gaussian(30, 100), QuantConfig(group=32, iterations=1, scale_bits=8)
    whole = to_tensors(fit(W, config.layer("x"), config))
    for chunk in (100, 700, 2900):
        monkeypatch.setitem(lutq.fit.CHUNK, "cpu", chunk)
        assert same(to_tensors(fit(W, config.layer("x"), config)), whole), f"{chunk=}"


@pytest.mark.parametrize("method", ["rtn", "alternating"])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_rows_of_zeros(method, has_offsets):
    W = gaussian(20, 64)
    W[3:17] = 0
    config = QuantConfig(group=32, method=method, offsets=has_offsets, symmetric=not has_offsets, scale_bits=8)
    packed = highest(fit(W, config.layer("x"), config))
    Q = dequantize(*packed, 32, config.grid, 64)
    assert torch.equal(Q[3:17], W[3:17]), f"{method=} {has_offsets=} {Q[3:17].abs().max()=}"
    assert highest(fit(0 * W, config.layer("x"), config)).scales.float().abs().max() < 1e-6


@pytest.mark.parametrize(("bits", "group", "offsets"), [(1, 32, True), (2, 64, False), (3, 0, True), (4, 96, True)])
@pytest.mark.parametrize("sweeps", [0, 4])
def test_no_layer_is_worse_than_its_plain_fit_in_8_bits(bits, group, offsets, sweeps):
    random = torch.Generator().manual_seed(0)
    W, x = torch.randn(24, 96, generator=random), torch.randn(300, 96, generator=random) @ torch.randn(96, 96, generator=random)
    H, about = x.T @ x / 300, f"{bits=} {group=} {offsets=} {sweeps=}"
    found = {}
    for scale_bits in (16, 8):
        config = QuantConfig(bits=bits, group=group, method="feedback", offsets=offsets, sweeps=sweeps, scale_bits=scale_bits)
        packed, before, after = solve_layer(W, H, config.layer("fc1"), config)
        read = highest(from_tensors(to_tensors(packed)))
        exact = solve.loss(W.double(), dequantize(*read, group, "bcq", 96).double(), H.double()).sum()
        exact = (exact / solve.loss(W.double(), torch.zeros(24, 96).double(), H.double()).sum()).sqrt().item()
        assert after == pytest.approx(exact, rel=1e-3), f"{about} {scale_bits=} {after=} {exact=}"
        assert after <= before, f"{about} {scale_bits=} {after=} {before=}"
        found[scale_bits] = after
    assert found[8] < 1.03 * found[16], f"{about} {found=}"


def test_a_solve_that_does_harm_is_thrown_away(monkeypatch):
    W, H = gaussian(8, 64), torch.eye(64)
    config = QuantConfig(bits=2, group=32, method="feedback", scale_bits=8)
    worse = lutq.fit.descend_in_eight_bits

    def harm(W, H, start, g, sweeps, sizes):
        return worse(0 * W, H, start, g, sweeps, sizes)

    monkeypatch.setattr(lutq.fit, "descend_in_eight_bits", harm)
    packed, before, after = solve_layer(W, H, config.layer("x"), config)
    assert same(to_tensors(packed), to_tensors(fit(W, config.layer("x"), config)))
    assert before == after


# Tuning


def test_tuned_products_are_those_of_what_is_stored():
    layer, K = LayerConfig(3, 64, scale_bits=8), 160
    packed = rounded(40, K, layer)
    module, x = Tunable(packed, K, layer, None), gaussian(5, K, seed=1)
    assert same(to_tensors(module.packed()), to_tensors(packed)), "nothing was tuned, and it is not the same"
    with torch.no_grad():  # some outgrow their unit, some change their sign
        module.scales.mul_(1 + 0.3 * gaussian(*module.scales.shape, seed=2))
        module.scales[0, 3] *= -1
        module.offsets.mul_(1.2)
    stored = module.packed()
    values = highest(stored)
    assert (values.scales >= 0).all()
    assert torch.equal(module(x), x @ dequantize(*values, 64, "bcq", K).T), "what is tuned is not what is stored"
    read = highest(from_tensors(to_tensors(stored)))
    assert all(torch.equal(one, other) for one, other in zip(read[:3], values[:3], strict=True)), "not what 8 bits hold"
    assert same(to_tensors(Tunable(stored, K, layer, None).packed()), to_tensors(stored))


def test_gradients_pass_the_rounding():
    layer, K = LayerConfig(2, 32, scale_bits=8), 96
    packed, x, weight = rounded(6, K, layer), gaussian(9, K), gaussian(9, 6, seed=1)
    modules = Tunable(packed, K, layer, None), Tunable(highest(packed), K, layer._replace(scale_bits=16), None)
    for module in modules:
        (module(x) * weight).sum().backward()
    for one, other in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 3])
def test_codes_that_are_learned_follow_the_stored_grid(bits):
    layer, W = LayerConfig(bits, 32, scale_bits=8), gaussian(6, 100)
    module, x = Tunable(rounded(6, 100, layer), 100, layer, None, W), gaussian(9, 100, seed=1)
    with torch.no_grad():
        module.latent.copy_(W)
        module.scales.mul_(1.1)
        module.scales[0, :2] *= -1
        y, values = module(x), highest(module.packed())
    stored = dequantize(*values, 32, "bcq", 100)
    assert torch.allclose(y, x @ stored.T, atol=1e-4), f"{bits=}"
    assert len(set(stored[0, :32].tolist())) <= 2**bits


# Layers


def in_kernel_order(module):
    """The module in kernel order on the CPU, where it could not be multiplied."""
    packed = module.packed()
    module.kernel_codes = pack_codes(packed.codes, module.layer.grid)
    module.kernel_records = pack_records(packed, module.in_features, module.layer)
    for name in packed._fields:
        module._buffers[name] = None
    return module


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("N", "K"), [(7, 100), (130, 172)])
def test_layers_keep_what_is_stored(layer, N, K):
    packed, x = rounded(N, K, layer), gaussian(2, K)
    tensors, about = to_tensors(packed), f"{layer=} {N=} {K=}"
    module = LutLinear.from_packed(packed, K, layer)
    W = dequantize(*highest(packed), layer.group, layer.grid, K)
    assert torch.allclose(module(x), x @ W.T, rtol=1e-5, atol=1e-4), f"{about}: by the backend of this machine"
    module.backend = "reference"
    assert torch.equal(module(x), x @ W.T), about
    assert same(dict(module.state_dict()), tensors), about
    ordered = in_kernel_order(copy.deepcopy(module))
    assert ordered.codes is None, about
    assert same(dict(ordered.state_dict()), tensors), f"{about}: in kernel order"
    assert torch.equal(ordered.dequantize(), W), f"{about}: in kernel order"
    for moved in (ordered.bfloat16(), copy.deepcopy(module).half().double()):
        assert same(dict(moved.state_dict()), tensors), f"{about}: moved"
    other = in_kernel_order(LutLinear.from_packed(rounded(N, K, layer, seed=1), K, layer))
    other.load_state_dict(tensors)
    other.backend = "reference"
    assert torch.equal(other(x), x @ W.T), about
    assert "scale_bits=8" in repr(module)


def test_compiled_layer():
    torch.compiler.reset()
    layer = LAYERS[0]
    module, x = LutLinear.from_packed(rounded(7, 100, layer), 100, layer), gaussian(5, 100)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


# Files and commands

MIXED = {"group": 32, "iterations": 2, "scale_bits": 8, "overrides": {"(fc2|down_proj)$": {"scale_bits": 16, "bits": 2}}}
CASES = {
    "bcq": MIXED,
    "no offsets": MIXED | {"offsets": False, "group": 64, "head_bits": 4},
    "rtn": {"method": "rtn", "bits": 4, "group": 64, "scale_bits": 8},
    "rows": {"group": 0, "scale_bits": 8, "iterations": 2},
}


def quantization_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("case", "family"), list(zip(CASES, ("opt", "llama", "opt", "llama"), strict=True)))
def test_from_quantize_to_save_pretrained(tiny, tmp_path, family, case):
    config, out, about = QuantConfig(**CASES[case]), tmp_path / "out", f"{family=} {case=}"
    report = quantize_checkpoint(tiny(family), out, config, device="cpu")
    tensors, quantization = load_file(out / "model.safetensors"), quantization_of(out)
    assert quantization["format_version"] == 2, about
    stored, weights, wanted, saved = 0, 0, 0, 0
    for layer in report.layers:
        chosen, (N, K) = layer.layer, (layer.N, layer.K)
        assert quantization["modules"][layer.name].get("scale_bits", 16) == chosen.scale_bits, about
        parts = {name: tensors[f"{layer.name}.{name}"] for name in PARTS if f"{layer.name}.{name}" in tensors}
        stored += 8 * sum(tensor.nbytes for tensor in parts.values())
        G, planes = -(-K // (chosen.group or K)), chosen.bits if chosen.grid == "bcq" else 1
        fields = planes + (chosen.offsets and chosen.grid == "bcq")  # scales and BCQ offsets of a group
        units = 16 * -(-N * G // 256) * fields if chosen.scale_bits == 8 else 0
        zeros = 8 * N * G * (chosen.offsets and chosen.grid == "uniform")
        wanted += 32 * chosen.bits * N * -(-K // 32) + N * G * fields * chosen.scale_bits + units + zeros
        saved += N * G * fields * (16 - chosen.scale_bits) - units
        weights += N * K
        assert (parts["scales"].dtype == torch.uint8) == (chosen.scale_bits == 8), about
    assert stored == wanted, f"{about} {stored=} {wanted=}"
    bpw, card, described = f"{stored / weights:.3f} bits per weight", (out / "README.md").read_text(), describe(out, "cpu")
    assert f"with {bpw}" in report.summary(), about
    assert bpw in described, about
    words = re.compile(r"in 8 bits.* saves (\d\.\d{3}) bits per weight")
    for text in (report.summary(), card, described):
        assert float(words.search(text)[1]) == pytest.approx(saved / weights, abs=6e-4), f"{about} {saved / weights=}\n{text}"
    assert "scale_bits = 8" in card, about
    model = lutq.load(out, device="cpu", dtype="float16")
    for layer in report.layers:
        parts = {name: tensors[f"{layer.name}.{name}"] for name in PARTS if f"{layer.name}.{name}" in tensors}
        Q = dequantize(*highest(from_tensors(parts)), layer.layer.group, layer.layer.grid, layer.K)
        assert torch.equal(model.get_submodule(layer.name).dequantize(), Q), f"{about} {layer.name}"
    model.save_pretrained(tmp_path / "saved")
    assert same(load_file(tmp_path / "saved" / "model.safetensors"), tensors), about
    assert quantization_of(tmp_path / "saved")["modules"] == quantization["modules"], about
    assert quantization_of(tmp_path / "saved")["format_version"] == 2, about
    again, x = lutq.load(tmp_path / "saved", device="cpu", dtype="float16"), torch.arange(5)[None]
    with torch.inference_mode():
        assert torch.equal(again(x).logits, model(x).logits), about


def test_default_checkpoints_are_of_version_1(tiny, tmp_path):
    quantize_checkpoint(tiny("opt"), tmp_path / "out", QuantConfig(iterations=0), device="cpu")
    quantization = quantization_of(tmp_path / "out")
    assert quantization["format_version"] == 1
    assert all(fields.keys() == {"bits", "group", "grid", "offsets"} for fields in quantization["modules"].values())
    lutq.load(tmp_path / "out", device="cpu").save_pretrained(tmp_path / "saved")
    assert quantization_of(tmp_path / "saved")["modules"] == quantization["modules"]


def test_target_counts_the_units(tiny, tmp_path, monkeypatch):
    settings = {"group": 32, "iterations": 1, "target_bpw": 3.2, "scale_bits": 8, "calib_windows": 2, "calib_length": 32}
    settings |= {"overrides": {"q_proj$": {"scale_bits": 16}}}  # k and v have the same input and 8
    units = []
    monkeypatch.setattr(sensitivity, "measure", lambda *args, do=sensitivity.measure: units.extend(do(*args)) or units)
    report = quantize_checkpoint(tiny("llama"), tmp_path / "out", QuantConfig(**settings), device="cpu")
    bits = 8 * sum(layer.nbytes for layer in report.layers) / sum(layer.N * layer.K for layer in report.layers)
    assert 2.7 < bits <= 3.2, f"{bits=}"
    layers = {layer.name: layer for layer in report.layers}
    for unit in units:
        choice = next(choice for choice in unit.choices if choice.bits == layers[unit.names[0]].layer.bits)
        assert choice.size == 8 * sum(layers[name].nbytes for name in unit.names), f"{unit.names=} {choice=}"


LAYER = "model.decoder.layers.0.fc1"


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("sound") / "opt"
    quantize_checkpoint(tiny("opt"), out, QuantConfig(group=32, iterations=0, scale_bits=8), device="cpu")
    return out


DAMAGES = {
    "missing units": (lambda t, _: t.pop(f"{LAYER}.scale_units"), f"{LAYER}.scale_units .*missing"),
    "wrong shape": (lambda t, _: t.update({f"{LAYER}.offset_units": torch.zeros(9).half()}), f"{LAYER}.offset_units of shape"),
    "wrong dtype": (lambda t, _: t.update({f"{LAYER}.scale_units": torch.zeros(3, 3).bfloat16()}), f"{LAYER}.scale_units"),
    "codes of 16 bits": (lambda t, _: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].half()}), f"{LAYER}.scales"),
    "config without it": (lambda _, c: c["modules"][LAYER].pop("scale_bits"), f"{LAYER}.scales"),
    "another width": (lambda _, c: c["modules"][LAYER].update(scale_bits=4), "scale_bits must be 16 or 8; got 4"),
    "several precisions": (lambda _, c: c.update(lowest_bits=2), "with scales of 16 bits: quantize again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_8_bit_checkpoints_are_refused(sound, tmp_path, damage):
    change, message = DAMAGES[damage]
    tensors, config = load_file(sound / "model.safetensors"), json.loads((sound / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LutqError, match=message):
        lutq.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_bits": 4}, "scale_bits must be 16 or 8; got 4"),
        ({"scale_bits": "8"}, "scale_bits must be of type int"),
        ({"scale_bits": 8, "lowest_bits": 2}, "lowest_bits stores scales in 16 bits and scale_bits is 8"),
        ({"lowest_bits": 2, "overrides": {"fc1": {"scale_bits": 8}}}, "lowest_bits stores scales in 16 bits"),
        ({"overrides": {"fc1": {"scale_bits": 12}}}, "overrides.'fc1'.scale_bits must be 16 or 8; got 12"),
    ],
)
def test_settings_that_scales_do_not_have(settings, message):
    with pytest.raises(LutqError, match=message):
        QuantConfig(**settings)


def test_commands_with_8_bit_scales(tiny, tmp_path, lutq_command):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('scale_bits = 8\niterations = 1\n[overrides."fc2$"]\nscale_bits = 16\n')
    result = lutq_command("quantize", tiny("opt"), "--recipe", recipe, "--group", 64)
    assert result.returncode == 0, result.stderr
    assert re.search(r"scales +in 8 bits in 10 of 12 layers, which saves 0\.\d{3} bits per weight", result.stdout), result.stdout
    result = lutq_command("info")
    assert "scales in 8 bits in 10 of 12 layers" in result.stdout, f"{result.stdout} {result.stderr}"
    result = lutq_command("generate", "The old man", "--max-new-tokens", 3)
    assert result.returncode == 0, result.stderr
    result = lutq_command("quantize", tiny("opt"), "--scale-bits", 6)
    assert result.returncode == 2, result.stderr
    assert "scale_bits must be 16 or 8; got 6" in result.stderr
