"""lutq checkpoints inside transformers: loaded, saved again and refused as they should be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lutq
import lutq.hf
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.linear import LutLinear
from lutq.quantize import quantize_checkpoint

PARTS = ("codes", "scales", "offsets", "zero_points")
CONFIGS = {
    "opt": QuantConfig(bits=3, method="greedy", group=64),
    "llama-tied": QuantConfig(bits=4, method="rtn", group=32, clip=False, head_bits=4),
    "qwen2": QuantConfig(bits=2, method="greedy", group=0, offsets=False, overrides={"layers\\.1\\..*o_proj": {"skip": True}}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tiny, tmp_path_factory):
    """A quantized checkpoint in three shards or more, of kept dtype float16. Shared: do not write into it."""
    out = tmp_path_factory.mktemp("hf") / request.param
    quantize_checkpoint(tiny(request.param), out, CONFIGS[request.param], device="cpu", shard_bytes=100_000)
    assert len(list(out.glob("*.safetensors"))) > 2, f"{request.param=}"
    return out


def read(folder):
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model):
    tokens = torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(tokens).logits.float()


def assert_same_tensors(got, expected, what):
    assert set(got) == set(expected), f"{what}: {set(got) ^ set(expected)}"
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, f"{what}: {name} {got[name].dtype} is not {tensor.dtype}"
        assert got[name].shape == tensor.shape, f"{what}: {name} {got[name].shape} is not {tensor.shape}"
        assert torch.equal(got[name], tensor), f"{what}: {name} differs"


@pytest.mark.parametrize("place", [{"": "cpu"}, "auto", None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_pretrained(checkpoint, dtype, place):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=place).eval()
    modules = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["modules"]
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, LutLinear)}
    assert set(quantized) == set(modules), f"{dtype=} {place=}"
    assert model.dtype == dtype, f"{dtype=} {place=} {model.dtype=}"
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}, f"{dtype=} {place=}"
    stored = read(checkpoint)
    for name, module in quantized.items():
        for part in PARTS:
            tensor = getattr(module, part)
            if tensor is not None:
                assert tensor.dtype == stored[f"{name}.{part}"].dtype, f"{name=} {part=} {dtype=} {place=} {tensor.dtype=}"
                assert torch.equal(tensor, stored[f"{name}.{part}"]), f"{name=} {part=} {dtype=} {place=}"
    expected = logits(lutq.load(checkpoint, device="cpu", dtype="float32"))
    error = ((logits(model) - expected).norm() / expected.norm()).item()
    bound = {torch.float32: 0, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert error <= bound, f"{dtype=} {place=} {error=}"


def test_kernels_are_compiled_at_load(checkpoint, monkeypatch):
    """Not at the first product, which would count as the prompt's time."""
    asked = []
    monkeypatch.setattr(lutq.hf, "working_backend", lambda backend, device: asked.append((backend, device.type)))
    lutq.load(checkpoint, device="cpu", backend="reference")
    assert set(asked) == {("reference", "cpu")}


def test_kernel_order_is_made_at_load(checkpoint, monkeypatch):
    """Once for each layer, by whatever loads: a product that torch compiles cannot make it."""
    made = []
    monkeypatch.setattr(LutLinear, "prepack", lambda self: made.append(self) or False)
    for load in (lambda: AutoModelForCausalLM.from_pretrained(checkpoint), lambda: lutq.load(checkpoint, device="cpu")):
        made.clear()
        layers = [module for module in load().modules() if isinstance(module, LutLinear)]
        assert layers
        assert list(map(id, made)) == list(map(id, layers))


def test_default_dtype_is_the_checkpoint_s(checkpoint):
    assert AutoModelForCausalLM.from_pretrained(checkpoint).dtype == torch.float16
    assert lutq.load(checkpoint, device="cpu").dtype == torch.float32, "float32 is what a CPU computes fast in"


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_save_pretrained_round_trip(checkpoint, tmp_path, dtype, size):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    before = logits(model)
    model.save_pretrained(tmp_path / "again", max_shard_size=size)
    files = list((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) == 1) == (size == "5GB"), f"{size=} {files=}"
    stored, config = read(checkpoint), json.loads((checkpoint / "config.json").read_text())
    guard = config["quantization_config"]["guard"]
    expected = {name: tensor if name.rpartition(".")[2] in PARTS else tensor.to(dtype) for name, tensor in stored.items()}
    assert expected[guard].shape == (0,), f"{guard=}"
    assert_same_tensors(read(tmp_path / "again"), expected, f"{dtype=} {size=}")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["quantization_config"] == config["quantization_config"], f"{dtype=} {size=}"
    loaded = lutq.load(tmp_path / "again", device="cpu", dtype=dtype)
    assert torch.equal(logits(loaded), before), f"{dtype=} {size=}"


def test_casts_leave_packed_tensors_alone(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model = torch.nn.Module.to(model, dtype)  # transformers' own refuses some of these
    stored = read(checkpoint)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in PARTS:
            assert tensor.dtype == stored[name].dtype, f"{name=} {tensor.dtype=}"
            assert torch.equal(tensor, stored[name]), f"{name=}"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_dequantize(checkpoint, dtype, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected = logits(model)
    plain = model.dequantize(dtype) if dtype else model.dequantize()
    assert not any(isinstance(module, LutLinear) for module in plain.modules()), f"{dtype=}"
    error = ((logits(plain.float()) - expected).norm() / expected.norm()).item()
    assert error <= (1e-2 if dtype == torch.bfloat16 else 1e-6), f"{dtype=} {error=}"
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text()), f"{dtype=}"
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32))
    assert torch.equal(again, logits(plain)), f"{dtype=}"


def test_generate(embedded):
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    inputs = tokenizer(["The old man", "It was a dark and stormy"], return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=2)
    assert output.shape == (2, inputs.input_ids.shape[1] + 8), f"{output.shape=}"
    assert torch.equal(output[:, : inputs.input_ids.shape[1]], inputs.input_ids)


def test_without_lutq_it_fails_loudly(embedded, tmp_path):
    # transformers warns about a quant_method it does not know and goes on with random weights, but for the guard
    code = f"""
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.from_pretrained({str(embedded)!r})
tokens = AutoTokenizer.from_pretrained({str(embedded)!r})("The old man").input_ids
print("readable", config.hidden_size, config.quantization_config["quant_method"], len(tokens), flush=True)
assert not any(name.partition(".")[0] == "lutq" for name in sys.modules)
AutoModelForCausalLM.from_pretrained({str(embedded)!r})
print("loaded")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout == "readable 256 lutq 4\n", f"{result.stdout=} {result.stderr=}"
    assert result.returncode != 0, f"{result.stdout=} {result.stderr=}"
    assert "size mismatch" in result.stderr.lower() or "mismatched" in result.stderr.lower(), f"{result.stderr=}"


def test_guard(checkpoint):
    guard = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["guard"]
    assert read(checkpoint)[guard].shape == (0,), f"{guard=}"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert guard not in model.state_dict(), f"{guard=}"
    assert isinstance(model.get_submodule(guard.removesuffix(".weight")), LutLinear), f"{guard=}"


LAYER = "model.decoder.layers.0.fc1"


# name -> (what to change in quantization_config, what the message must say)
CONFIG_DAMAGES = {
    "newer format": (lambda c: c.update(format_version=3), "format version 3.*pip install --upgrade lutq"),
    "unknown field": (lambda c: c.update(rotation="hadamard"), "rotation.*pip install --upgrade lutq"),
    "unknown layer field": (lambda c: c["modules"][LAYER].update(residual=1), "residual"),
    "missing layer field": (lambda c: c["modules"][LAYER].pop("bits"), "bits"),
    "unknown grid": (lambda c: c["modules"][LAYER].update(grid="trellis"), "trellis"),
    "bits out of range": (lambda c: c["modules"][LAYER].update(bits=5), "bits"),
    "bits of a wrong type": (lambda c: c["modules"][LAYER].update(bits="3"), "bits"),
    "group of a wrong type": (lambda c: c["modules"][LAYER].update(group="64"), "group"),
    "group negative": (lambda c: c["modules"][LAYER].update(group=-32), "group"),
    "modules no table": (lambda c: c.update(modules=[LAYER]), "modules"),
    "layer no table": (lambda c: c["modules"].update({LAYER: 3}), "modules"),
    "no such layer": (lambda c: c["modules"].update({"model.decoder.fc9": c["modules"][LAYER]}), "fc9"),
    "not a Linear": (lambda c: c["modules"].update({"model.decoder": c["modules"][LAYER]}), "model.decoder"),
    "other bits": (lambda c: c["modules"][LAYER].update(bits=2), f"config.json asks for {LAYER}.codes"),
    "other group": (lambda c: c["modules"][LAYER].update(group=32), f"config.json asks for {LAYER}.scales"),
    "layer not listed": (lambda c: c["modules"].pop(LAYER), LAYER),
}
# name -> (what to change in the tensors, what the message must say)
NORM = "model.decoder.final_layer_norm.weight"
TENSOR_DAMAGES = {
    "unknown tensor": (lambda t: t.update({f"{LAYER}.perm": torch.arange(96)}), f"{LAYER}.perm"),
    "missing codes": (lambda t: t.pop(f"{LAYER}.codes"), f"{LAYER}.codes .*missing"),
    "missing offsets": (lambda t: t.pop(f"{LAYER}.offsets"), f"{LAYER}.offsets .*missing"),
    "missing bias": (lambda t: t.pop(f"{LAYER}.bias"), f"{LAYER}.bias"),
    "missing norm": (lambda t: t.pop(NORM), NORM),
    "wrong shape": (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:, 1:].clone()}), f"{LAYER}.scales"),
    "wrong shape of a kept tensor": (lambda t: t.update({NORM: torch.ones(95).half()}), NORM),
    "wrong dtype of codes": (lambda t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].long()}), f"{LAYER}.codes"),
    "wrong dtype of scales": (lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"].float()}), f"{LAYER}.scales"),
}


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("sound") / "opt"
    quantize_checkpoint(tiny("opt"), out, CONFIGS["opt"], device="cpu")
    return out


@pytest.mark.parametrize("damage", [*CONFIG_DAMAGES, *TENSOR_DAMAGES])
def test_damaged_checkpoints_are_refused(sound, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    if damage in CONFIG_DAMAGES:
        change, message = CONFIG_DAMAGES[damage]
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
    else:
        change, message = TENSOR_DAMAGES[damage]
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LutqError, match=message):
        lutq.load(folder, device="cpu")
    with pytest.raises(LutqError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
