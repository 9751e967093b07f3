"""Every layout that checkpoints come in gives the same tensors, and a pickle never runs."""

import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import OPT_TINY
from safetensors.torch import load_file, save_file

from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.quantize import quantize_checkpoint
from lutq.source import Source
from lutq.structure import match_tensors, read_structure

CHEAP = QuantConfig(bits=2, method="greedy", group=64)
LAYOUTS = ("safetensors", "safetensors-sharded", "bin", "bin-sharded", "bin-legacy", "bin-legacy-sharded")


def write(folder, like, state, layout):
    """A checkpoint directory of `state` with the config and tokenizer of the directory `like`."""
    folder.mkdir()
    for path in like.iterdir():
        if "safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    kind, _, rest = layout.partition("-")
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = list(state)
    parts = [names[i::3] for i in range(3)] if "sharded" in rest else [names]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"{stem}.{suffix}" if len(parts) == 1 else f"{stem}-{i + 1:05}-of-00003.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        tensors = {name: state[name].contiguous() for name in part}
        if kind == "safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / file, _use_new_zipfile_serialization="legacy" not in rest)
    if len(parts) > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layouts(tiny, tmp_path, layout, dtype):
    like = tiny("llama")
    state = {name: tensor.to(dtype) for name, tensor in load_file(like / "model.safetensors").items()}
    folder = write(tmp_path / "model", like, state, layout)
    source = Source(folder)
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    assert source.name == "model", f"{source.name=} {layout=}"
    assert sorted(source.keys) == sorted(state), f"{layout=} {dtype=}"
    assert source.nbytes == sum(path.stat().st_size for path in weights), f"{layout=} {dtype=}"
    for name, tensor in state.items():
        assert source.shape(name) == tuple(tensor.shape), f"{name=} {layout=} {dtype=}"
        read = source.tensor(name)
        assert read.dtype == dtype, f"{name=} {layout=} {read.dtype=}"
        assert torch.equal(read, tensor), f"{name=} {layout=} {dtype=}"


def test_layouts_quantize_alike(tiny, tmp_path):
    like = tiny("opt")
    state = load_file(like / "model.safetensors")
    quantize_checkpoint(like, tmp_path / "expected", CHEAP)
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    for layout in LAYOUTS[1:]:
        folder = write(tmp_path / layout, like, state, layout)
        quantize_checkpoint(folder, tmp_path / f"{layout}-out", CHEAP)
        assert (tmp_path / f"{layout}-out" / "model.safetensors").read_bytes() == expected, f"{layout=}"


@pytest.mark.parametrize("spelling", ["as transformers", "without prefix", "prefix twice", "without prefix, with head"])
@pytest.mark.parametrize("name", ["opt", "opt-postnorm", "llama", "llama-tied"])
def test_prefixes(tiny, tmp_path, name, spelling):
    # facebook/opt-*.bin has decoder.layers.0..., transformers wants model.decoder.layers.0...
    like = tiny(name)
    wanted = load_file(like / "model.safetensors")
    strip, add = spelling.startswith("without"), "model." if spelling == "prefix twice" else ""
    spelled = {(key.removeprefix("model.") if strip else add + key): tensor for key, tensor in wanted.items()}
    embedding = next(tensor for key, tensor in wanted.items() if key.endswith("embed_tokens.weight"))
    if spelling.endswith("head") and "lm_head.weight" not in wanted:
        spelled["lm_head.weight"] = embedding.clone()  # facebook/opt-350m has the tied head, too
    folder = write(tmp_path / "model", like, spelled, "bin")
    source = Source(folder)
    structure = read_structure(source.config)
    names, ignored = match_tensors(structure, source)
    assert set(names) == set(structure.tensors), f"{name=} {spelling=}"
    assert set(ignored) <= {"lm_head.weight"}, f"{name=} {spelling=} {ignored=}"
    for key, tensor in wanted.items():
        assert torch.equal(source.tensor(names[key]), tensor), f"{key=} {name=} {spelling=}"
    for key, other in structure.tied.items():
        assert torch.equal(source.tensor(names[key]), wanted[other]), f"{key=} {name=} {spelling=}"


def test_prefix_quantizes_alike(tiny, tmp_path):
    like = tiny("opt")
    state = load_file(like / "model.safetensors")
    facebook = write(tmp_path / "facebook", like, {key.removeprefix("model."): t for key, t in state.items()}, "bin-legacy")
    quantize_checkpoint(like, tmp_path / "expected", CHEAP)
    quantize_checkpoint(facebook, tmp_path / "out", CHEAP)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes(), f"{file=}"


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_extra_buffers_are_ignored_and_reported(tiny, tmp_path, layout):
    like = tiny("llama")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)}
    state = load_file(like / "model.safetensors")
    folder = write(tmp_path / "model", like, state | extra, layout)
    report = quantize_checkpoint(folder, tmp_path / "out", CHEAP)
    assert sorted(report.ignored) == sorted(extra), f"{layout=} {report.ignored=}"
    assert "rotary_emb.inv_freq" in report.summary(), f"{layout=} {report.summary()}"
    quantize_checkpoint(like, tmp_path / "expected", CHEAP)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected" / "model.safetensors").read_bytes(), (
        layout
    )


class Payload:
    """Unpickling this makes a directory."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "inside a state dict"])
def test_malicious_pickle_does_not_run(tiny, tmp_path, form):
    like, target = tiny("opt"), tmp_path / "payload-ran"
    folder = write(tmp_path / "model", like, {"a": torch.zeros(1)}, "bin")
    file = folder / "pytorch_model.bin"
    if form == "bare pickle":
        file.write_bytes(pickle.dumps(Payload(target), protocol=2))  # that of torch.save
    else:
        content = (
            load_file(like / "model.safetensors") | {"extra": Payload(target)}
            if form == "inside a state dict"
            else Payload(target)
        )
        torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(LutqError, match=r"pytorch_model\.bin is damaged or not a plain state dict"):
        Source(folder)
    assert not target.exists(), f"{form=}: the payload ran"
    from lutq.hf import load

    with pytest.raises(LutqError):
        load(folder)
    assert not target.exists(), f"{form=}: the payload ran in load"
    pickle.loads(pickle.dumps(Payload(target)))
    assert target.exists(), "the payload is harmless, so this test shows nothing"


@pytest.mark.parametrize("content", [[1, 2], {"a": "text"}, torch.zeros(3)], ids=["list", "dict of str", "tensor"])
def test_bin_that_is_no_state_dict(tiny, tmp_path, content):
    folder = write(tmp_path / "model", tiny("opt"), {"a": torch.zeros(1)}, "bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(LutqError):
        match_tensors(read_structure(Source(folder).config), Source(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cut_short(tiny, tmp_path, layout):
    folder = write(tmp_path / "model", tiny("opt"), load_file(tiny("opt") / "model.safetensors"), layout)
    file = max([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(LutqError, match=file.name):
        quantize_checkpoint(folder, tmp_path / "out", CHEAP)
    assert not (tmp_path / "out").exists(), f"{layout=}"


@pytest.mark.parametrize("layout", ["safetensors-sharded", "bin-sharded"])
def test_missing_shard(tiny, tmp_path, layout):
    folder = write(tmp_path / "model", tiny("opt"), load_file(tiny("opt") / "model.safetensors"), layout)
    shard = next(path for path in folder.iterdir() if "-00002-" in path.name)
    shard.unlink()
    with pytest.raises(LutqError, match=f"lacks the shard {shard.name}"):
        Source(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replaced_file_is_read_anew(tiny, tmp_path, layout):
    # in one process, as in a notebook
    like = tiny("opt")
    state = load_file(like / "model.safetensors")
    write(tmp_path / "model", like, state, layout)
    first = Source(tmp_path / "model").tensor("model.decoder.layers.0.fc1.weight").clone()
    shutil.rmtree(tmp_path / "model")
    write(tmp_path / "model", like, {name: 2 * tensor for name, tensor in state.items()}, layout)
    second = Source(tmp_path / "model").tensor("model.decoder.layers.0.fc1.weight")
    assert torch.equal(second, 2 * first), f"{layout=}: the weights of the earlier file"


def test_embedded_default(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    for model in (None, "opt-tiny"):
        source = Source(model)
        assert (source.path, source.name) == (OPT_TINY, "opt-tiny"), f"{model=} {source.path=}"
    shutil.copytree(tiny("opt"), tmp_path / "opt-tiny")
    assert Source("opt-tiny").config.hidden_size == 96, "a directory of that name comes before the embedded model"
    assert Source(None).path == OPT_TINY, "None is the embedded model whatever lies here"


def test_hub_id_without_network():
    with pytest.raises(LutqError, match="could be fetched from the hub"):
        Source("facebook/opt-no-such-model")


def test_already_quantized(embedded):
    with pytest.raises(LutqError, match="already quantized"):
        Source(embedded)
