"""From checkpoint to checkpoint: what is written is what was computed, and neither a crash nor a mistake loses anything."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lutq
from lutq.config import QuantConfig
from lutq.errors import LutqError
from lutq.quantize import quantize_checkpoint
from lutq.report import bits_per_weight, relative_error, rows

CHEAP = QuantConfig(bits=2, method="greedy", group=64)
PARTS = ("codes", "scales", "offsets", "zero_points")
JOURNAL = "lutq-progress.jsonl"
SETTINGS = {
    "rtn 4 g64": {"method": "rtn", "bits": 4, "group": 64},
    "rtn 3 g32 symmetric": {"method": "rtn", "bits": 3, "group": 32, "symmetric": True, "clip": False},
    "alternating 3 g128": {"bits": 3, "group": 128},
    "alternating 2 row, head 4": {"bits": 2, "group": 0, "head_bits": 4, "offsets": False, "iterations": 3},
    "greedy 1 g32, skip, fc 4 row": {
        "method": "greedy",
        "bits": 1,
        "group": 32,
        "overrides": {"layers\\.0\\..*[qk]_proj$": {"skip": True}, "(fc2|down_proj)$": {"bits": 4, "group": 0}},
    },
}


def read(folder):
    """Every tensor of the safetensors files in a directory."""
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder):
    """Every file of a directory, as bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def numpy_dequantize(tensors, name, fields, K):
    """The weight of one module, by the format's definition and without lutq: fp32 [N, K]."""
    bit = np.unpackbits(tensors[f"{name}.codes"].numpy().view(np.uint8), axis=-1, bitorder="little")[..., :K].astype(np.float32)

    def spread(part):  # one value per group -> one per input
        return np.repeat(tensors[f"{name}.{part}"].numpy().astype(np.float32), fields["group"] or K, axis=-1)[..., :K]

    if fields["grid"] == "bcq":
        w = ((2 * bit - 1) * spread("scales")).sum(0)
        return torch.tensor(w + spread("offsets") if fields["offsets"] else w)
    bits = fields["bits"]
    u = sum(2 ** (bits - 1 - i) * plane for i, plane in enumerate(bit))
    return torch.tensor(spread("scales")[0] * (u - (spread("zero_points") if fields["offsets"] else (2**bits - 1) / 2)))


def write_dequantized(out, source, folder):
    """A plain fp32 checkpoint of what `out` holds; returns its quantized weights by module name, and their errors' sum."""
    tensors, original = read(out), read(source)
    config = json.loads((out / "config.json").read_text())
    modules = config.pop("quantization_config")["modules"]
    embedding = next(tensor for key, tensor in original.items() if key.endswith("embed_tokens.weight"))
    sources = {name: original.get(f"{name}.weight", embedding) for name in modules}  # a tied head is the embedding
    weights = {name: numpy_dequantize(tensors, name, modules[name], W.shape[1]) for name, W in sources.items()}
    state = {key: tensors[key].float() for key in original if key.removesuffix(".weight") not in modules}
    folder.mkdir()
    state |= {f"{name}.weight": w for name, w in weights.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return weights, sum((weights[name] - W).square().double().sum().item() for name, W in sources.items())


def logits(model):
    tokens = torch.randint(3, 4096, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(tokens).logits


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_are_those_of_the_dequantized_weights(tiny, family, settings, tmp_path):
    from transformers import AutoModelForCausalLM

    config, out = QuantConfig(**SETTINGS[settings]), tmp_path / "out"
    report = quantize_checkpoint(tiny(family), out, config, device="cpu")
    weights, squared_error = write_dequantized(out, tiny(family), tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    expected, got = logits(plain), logits(lutq.load(out, device="cpu", dtype="float32"))
    error = ((got - expected).norm() / expected.norm()).item()
    assert error <= 1e-5, f"{family=} {settings=} {error=}"
    assert expected.std() > 0.3, f"{family=} {settings=}: degenerate logits, {expected.std()=}"

    linears = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = {
        name for name in linears if name.startswith("model.decoder.project_") or (name == "lm_head" and config.head_bits == 16)
    }
    kept |= {name for name in linears if config.overrides and re.search("layers\\.0\\..*[qk]_proj$", name)}
    assert set(report.kept) == kept, f"{family=} {settings=} {report.kept=}"
    assert {layer.name for layer in report.layers} == linears - kept == set(weights), f"{family=} {settings=}"
    assert f"{len(kept)} Linear layers" in report.summary(), f"{family=} {settings=}\n{report.summary()}"
    assert all(name in report.summary() for name in report.kept), f"{family=} {settings=}\n{report.summary()}"

    reported = sum(layer.error for layer in report.layers)
    assert reported == pytest.approx(squared_error, rel=1e-4), f"{family=} {settings=} {reported=} {squared_error=}"
    packed = {f"{name}.{part}" for name in weights for part in PARTS}
    nbytes = sum(tensor.numel() * tensor.element_size() for key, tensor in read(out).items() if key in packed)
    exact = 8 * nbytes / sum(w.numel() for w in weights.values())
    assert bits_per_weight(report.layers) == pytest.approx(exact, rel=1e-12), f"{family=} {settings=} {exact=}"
    assert f"with {exact:.3f} bits per weight" in report.summary(), f"{family=} {settings=} {exact=}\n{report.summary()}"


@pytest.mark.parametrize("given", [None, "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kept_dtype(tiny, tmp_path, dtype, given):
    source, out = tiny("llama", dtype), tmp_path / "out"
    quantize_checkpoint(source, out, CHEAP, dtype=given or "auto")
    expected = getattr(torch, given) if given else torch.float16 if dtype == torch.float32 else dtype
    tensors, config = read(out), json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch."), f"{dtype=} {given=} {config['dtype']=}"
    for key, tensor in read(source).items():
        if key.removesuffix(".weight") not in config["quantization_config"]["modules"]:
            assert torch.equal(tensors[key], tensor.to(expected)), f"{key=} {dtype=} {given=}"
            assert tensors[key].dtype == expected, f"{key=} {dtype=} {given=} {tensors[key].dtype=}"
    assert {t.dtype for key, t in tensors.items() if key.endswith(".scales")} == {torch.float16}, f"{dtype=} {given=}"


def test_same_weights_in_bf16_and_fp32(tiny, tmp_path):
    like = tiny("llama", torch.bfloat16)
    state = {key: tensor.float() for key, tensor in read(like).items()}
    shutil.copytree(like, tmp_path / "wide")
    save_file(state, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})
    for name, source in (("narrow-out", like), ("wide-out", tmp_path / "wide")):
        quantize_checkpoint(source, tmp_path / name, QuantConfig(bits=3, group=64, iterations=2), dtype="bfloat16")
    narrow, wide = read(tmp_path / "narrow-out"), read(tmp_path / "wide-out")
    assert set(narrow) == set(wide)
    for key, tensor in narrow.items():
        assert torch.equal(tensor, wide[key]), f"{key=}: fp32 of the same values gives another result than bf16"


@pytest.mark.parametrize("limit", [1, 30_000, 200_000])
def test_sharded_output(tiny, tmp_path, limit):
    config = QuantConfig(bits=3, group=64, method="greedy", head_bits=4)
    quantize_checkpoint(tiny("llama-tied"), tmp_path / "one", config)
    quantize_checkpoint(tiny("llama-tied"), tmp_path / "many", config, shard_bytes=limit)
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert list((tmp_path / "one").glob("*.safetensors")) == [tmp_path / "one" / "model.safetensors"]
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2, f"{limit=} {files=}"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    for file in files:
        assert re.fullmatch(rf"model-\d{{5}}-of-{len(files):05}\.safetensors", file.name), f"{limit=} {file.name=}"
        with safe_open(file, framework="pt") as handle:
            names = sorted(handle.keys())
        assert names == sorted(key for key, place in index["weight_map"].items() if place == file.name), f"{limit=} {file.name=}"
        size = sum(many[key].numel() * many[key].element_size() for key in names)
        assert size <= limit or sum(many[key].numel() > 0 for key in names) == 1, f"{limit=} {file.name=} {size=}"
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in many.values()), f"{limit=}"
    assert set(one) == set(many), f"{limit=} {set(one) ^ set(many)}"
    for key, tensor in one.items():
        assert tensor.dtype == many[key].dtype, f"{key=} {limit=}"
        assert torch.equal(tensor, many[key]), f"{key=} {limit=}"
    models = [lutq.load(tmp_path / name, device="cpu") for name in ("one", "many")]
    assert torch.equal(*map(logits, models)), f"{limit=}"


def test_existing_output(tiny, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(tiny("opt"), out, CHEAP)
    before = contents(out)
    with pytest.raises(LutqError, match="already holds a quantized model: add --overwrite"):
        quantize_checkpoint(tiny("opt"), out, QuantConfig(bits=1, method="greedy"))
    assert contents(out) == before, "a refused run changed the output"
    quantize_checkpoint(tiny("opt"), out, QuantConfig(bits=1, method="greedy"), overwrite=True)
    quantize_checkpoint(tiny("opt"), tmp_path / "fresh", QuantConfig(bits=1, method="greedy"))
    assert contents(out) == contents(tmp_path / "fresh"), "overwriting gives another result than a fresh run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"], "something was left behind"


def test_failed_overwrite_keeps_the_earlier_output(tiny, tmp_path, monkeypatch):
    out = tmp_path / "out"
    quantize_checkpoint(tiny("opt"), out, CHEAP)
    before = contents(out)
    monkeypatch.setattr("lutq.quantize.fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny("opt"), out, QuantConfig(bits=1), overwrite=True)
    assert contents(out) == before


def run_without_rename(source, out, config, **options):
    """A run whose finished directory cannot be given its name."""
    replace = Path.replace

    def fail(path, target):
        if path.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="Input/output error"):
            quantize_checkpoint(source, out, config, **options)


def test_failed_rename_keeps_the_earlier_output(tiny, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(tiny("opt"), out, CHEAP)
    before = contents(out)
    run_without_rename(tiny("opt"), out, QuantConfig(bits=1, method="greedy"), overwrite=True)
    assert out.is_dir(), f"the earlier output is gone and the new one has no name: {sorted(tmp_path.iterdir())}"
    assert contents(out) == before


def test_run_stopped_before_the_rename_goes_on(tiny, tmp_path):
    # as a crash at the very end would leave it
    out = tmp_path / "out"
    run_without_rename(tiny("opt"), out, CHEAP)
    quantize_checkpoint(tiny("opt"), out, CHEAP)
    quantize_checkpoint(tiny("opt"), tmp_path / "whole", CHEAP)
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"], "something was left behind"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["notes", "plain model", "other quantizer", "damaged config", "file"])
def test_foreign_output_is_never_touched(tiny, tmp_path, content, overwrite):
    out = tmp_path / "out"
    if content == "plain model":
        shutil.copytree(tiny("llama"), out)
    elif content == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        text = {"other quantizer": json.dumps({"quantization_config": {"quant_method": "gptq"}}), "damaged config": "{"}.get(
            content
        )
        (out / ("config.json" if text else "notes.txt")).write_text(text or "precious")
    before = contents(tmp_path)
    with pytest.raises(LutqError, match="is not an output of lutq quantize"):
        quantize_checkpoint(tiny("opt"), out, CHEAP, overwrite=overwrite)
    assert contents(tmp_path) == before, f"{content=} {overwrite=}"


@pytest.mark.parametrize("suffix", [".partial", ".old"])
def test_foreign_neighbours_survive_overwrite(tiny, tmp_path, suffix):
    # lutq-out.old is how a person would call a copy made by hand
    out = tmp_path / "out"
    quantize_checkpoint(tiny("opt"), out, CHEAP)
    neighbour = tmp_path / f"out{suffix}" / "notes.txt"
    neighbour.parent.mkdir()
    neighbour.write_text("precious")
    with contextlib.suppress(LutqError):  # to refuse is as good as to leave it alone
        quantize_checkpoint(tiny("opt"), out, CHEAP, overwrite=True)
    assert neighbour.is_file(), f"--overwrite of out deleted or took over out{suffix}, which lutq did not write"
    assert neighbour.read_text() == "precious", f"{suffix=}"


def test_output_behind_a_symbolic_link(tiny, tmp_path):
    quantize_checkpoint(tiny("opt"), tmp_path / "elsewhere", CHEAP)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    for attempt in range(2):
        quantize_checkpoint(tiny("opt"), tmp_path / "out", QuantConfig(bits=1, method="greedy"), overwrite=True)
        bits = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["settings"]["bits"]
        assert bits == 1, f"{attempt=} {bits=}"


def test_empty_directory_is_a_free_name(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    quantize_checkpoint(tiny("opt"), tmp_path / "out", CHEAP)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("out", [".", "", "..", "sub/.."])
def test_out_without_a_name(tiny, tmp_path, monkeypatch, out):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / ("sub" if out == ".." else ""))
    if out in (".", ""):
        shutil.rmtree(tmp_path / "empty" / "sub")
    with pytest.raises(LutqError):
        quantize_checkpoint(tiny("opt"), out, CHEAP)


@pytest.mark.parametrize("place", ["under a file", "in /proc", "read-only directory"])
def test_unwritable_out(tiny, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    if place == "read-only directory" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    out = {"under a file": tmp_path / "file" / "out", "in /proc": Path("/proc/lutq-test/out")}.get(
        place, tmp_path / "locked" / "out"
    )
    with pytest.raises(LutqError, match=r"cannot write to .*: give another --out"):
        quantize_checkpoint(tiny("opt"), out, CHEAP)


def test_files_beside_the_weights(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    names = ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model")
    for name in (*names, "LICENSE", "NOTICE.txt", "spiece.model", "o200k.tiktoken"):
        (source / name).write_bytes(f"content of {name}".encode())
    quantize_checkpoint(source, tmp_path / "out", CHEAP)
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            copy = tmp_path / "out" / path.name
            assert copy.is_file(), f"{path.name} was not copied"
            assert copy.read_bytes() == path.read_bytes(), f"{path.name} differs"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    extra = after.pop("quantization_config")
    assert after == before | {"dtype": "float16"}, "the rest of config.json must stay"
    assert extra["settings"] == CHEAP.to_dict(), f"{extra['settings']}"


def test_model_card(tiny, tmp_path, lutq_command):
    overrides = {
        "layers\\.0\\.": {"bits": 4},
        '^no "such" \\S+ layer|up_proj$': {"group": 64},
        "lm_head": {"bits": 2},
        "o_proj": {"skip": True},
    }
    config = QuantConfig(bits=3, group=32, method="rtn", clip=False, tolerance=1e-05, overrides=overrides)
    report = quantize_checkpoint(tiny("llama"), tmp_path / "out", config)
    card = (tmp_path / "out" / "README.md").read_text()
    for row in rows(report.layers):
        assert "| " + " | ".join(row) + " |" in card, f"{row=}\n{card}"
    for figure in (
        f"{bits_per_weight(report.layers):.3f}",
        f"{relative_error(report.layers):.4f}",
        f"kept as they are: {len(report.kept)}",
    ):
        assert figure in card, f"{figure=}\n{card}"
    assert str(tmp_path) not in card, f"the card shows where it was made\n{card}"
    toml = re.search(r"```toml\n(.*?)```", card, re.DOTALL)[1]
    assert tomllib.loads(toml) == config.to_dict(), f"{toml}"
    (tmp_path / "recipe.toml").write_text(toml)
    result = lutq_command("quantize", tiny("llama"), "--recipe", "recipe.toml", "--out", "again", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "again") == contents(tmp_path / "out"), "the card's settings give another checkpoint"


# Interruptions. The model has 84 small Linear layers, and the settings are slow ones, so that there is time to hit them.

SLOW = ("--bits", "3", "--group", "32", "--method", "rtn", "--device", "cpu")


def units(folder):
    """How many units an unfinished run has recorded."""
    path = folder / "lutq-out.partial" / JOURNAL
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def wait_for(folder, count, process=None):
    deadline = time.monotonic() + 60
    while units(folder) < count:
        assert time.monotonic() < deadline, f"{units(folder)} of {count} units after a minute"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.002)


def run_and_kill(start_lutq, folder, model, count):
    """Start the command in `folder` and SIGKILL it once `count` units are on record."""
    running = start_lutq("quantize", model, *SLOW, cwd=folder)
    wait_for(folder, count)
    running.signal(signal.SIGKILL)
    result = running.wait()
    assert result.returncode == -signal.SIGKILL, f"{count=} {result}"
    assert not (folder / "lutq-out").exists(), f"{count=}: half an output has the name of a whole one"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory, fork_server):
    """Output of an uninterrupted run, as bytes."""
    folder = tmp_path_factory.mktemp("whole")
    result = fork_server.start(["quantize", tiny("deep"), *SLOW], tmp_path_factory.mktemp("streams"), folder, "").wait()
    assert result.returncode == 0, result.stderr
    return contents(folder / "lutq-out")


@pytest.fixture
def killed(tiny, tmp_path, start_lutq):
    """A directory with what a killed run left."""
    run_and_kill(start_lutq, tmp_path, tiny("deep"), 20)
    return tmp_path


@pytest.mark.parametrize("counts", [[1], [25], [70], [2, 15, 40, 80]], ids=str)
def test_killed_run_goes_on(tiny, tmp_path, start_lutq, whole, counts):
    for count in counts:
        run_and_kill(start_lutq, tmp_path, tiny("deep"), count)
    done = units(tmp_path)
    result = start_lutq("quantize", tiny("deep"), *SLOW).wait()
    assert result.returncode == 0, f"{counts=} {result.stderr}"
    assert "Quantized" in result.stdout, f"{counts=} {result.stdout}"
    got = contents(tmp_path / "lutq-out")
    assert set(got) == set(whole), f"{counts=} {done=} {set(got) ^ set(whole)}"
    for name, expected in whole.items():
        assert got[name] == expected, f"{counts=} {done=}: {name} differs from that of an uninterrupted run"
    assert [path.name for path in tmp_path.iterdir()] == ["lutq-out"], f"{counts=}: something was left behind"


def test_killed_run_of_a_new_interpreter(tiny, tmp_path, whole):
    # the same with nothing forked, and in shards, which the command line makes of 5 GB only
    code = f"""
import lutq
config = lutq.QuantConfig(bits=3, group=32, method="rtn")
lutq.quantize_checkpoint({str(tiny("deep"))!r}, "lutq-out", config, device="cpu", shard_bytes=100_000)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path, 30, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL, f"{process.returncode=}"
    done = units(tmp_path)
    config = QuantConfig(bits=3, group=32, method="rtn")
    quantize_checkpoint(tiny("deep"), tmp_path / "lutq-out", config, device="cpu", shard_bytes=100_000)
    quantize_checkpoint(tiny("deep"), tmp_path / "whole", config, device="cpu", shard_bytes=100_000)
    got, expected = contents(tmp_path / "lutq-out"), contents(tmp_path / "whole")
    assert len(expected) > 8, f"{sorted(expected)}"
    assert set(got) == set(expected), f"{done=} {set(got) ^ set(expected)}"
    for name, content in expected.items():
        assert got[name] == content, f"{done=}: {name} differs from that of an uninterrupted run"
    (tmp_path / "one").mkdir()
    for name, content in whole.items():
        (tmp_path / "one" / name).write_bytes(content)
    one, shards = read(tmp_path / "one"), read(tmp_path / "lutq-out")
    assert set(one) == set(shards)
    assert all(torch.equal(one[key], shards[key]) for key in one), "shards hold other tensors than one file"


def test_cut_record_does_not_count(tiny, killed, start_lutq, whole):
    journal = killed / "lutq-out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes() + b'{"unit": "model.layers.7.mlp.up_pro')
    result = start_lutq("quantize", tiny("deep"), *SLOW).wait()
    assert result.returncode == 0, result.stderr
    assert contents(killed / "lutq-out") == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--bits", "2"], "bits: 3 -> 2"),
        (["--group", "64"], "group: 32 -> 64"),
        (["--method", "greedy"], "method"),
        (["--dtype", "bfloat16"], "dtype"),
    ],
    ids=lambda value: str(value),
)
def test_resume_with_other_settings(tiny, killed, start_lutq, change, named):
    before = contents(killed)
    result = start_lutq("quantize", tiny("deep"), *SLOW, *change).wait()
    assert result.returncode == 2, f"{change=} {result}"
    assert result.stderr.startswith("lutq: "), f"{change=} {result.stderr}"
    assert named in result.stderr, f"{change=} {result.stderr}"
    assert "--overwrite" in result.stderr, f"{change=} {result.stderr}"
    assert contents(killed) == before, f"{change=}: the refused command changed the unfinished run"


@pytest.mark.parametrize("changed", ["weights", "config"])
def test_resume_with_a_changed_source(tiny, killed, start_lutq, changed, tmp_path_factory):
    model = tmp_path_factory.mktemp("changed") / "deep"
    shutil.copytree(tiny("deep"), model)
    if changed == "weights":
        state = read(model)
        next(tensor for key, tensor in state.items() if key.endswith("layers.0.self_attn.q_proj.weight"))[0, 0] += 1e-3
        save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    before = {name: content for name, content in contents(killed).items() if name.endswith(JOURNAL)}
    result = start_lutq("quantize", model, *SLOW).wait()
    assert result.returncode == 2, f"{changed=} {result}"
    errors = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("lutq: ")]
    assert len(errors) == 1, f"{changed=} {result.stderr}"
    assert ("source changed" if changed == "weights" else "rms_norm_eps") in errors[0], f"{changed=} {errors}"
    assert "--overwrite" in errors[0], f"{changed=} {errors}"
    assert "Traceback" not in result.stderr, f"{changed=} {result.stderr}"
    assert {name: content for name, content in contents(killed).items() if name.endswith(JOURNAL)} == before, f"{changed=}"
    result = start_lutq("quantize", model, *SLOW, "--overwrite").wait()
    assert result.returncode == 0, f"{changed=} {result.stderr}"
    result = start_lutq("quantize", model, *SLOW, "--out", "fresh").wait()
    assert result.returncode == 0, f"{changed=} {result.stderr}"
    assert contents(killed / "lutq-out") == contents(killed / "fresh"), (
        f"{changed=}: --overwrite kept something of the other source"
    )


@pytest.mark.parametrize("flags", [[], ["--overwrite"]], ids=str)
def test_second_process_is_refused(tiny, tmp_path, start_lutq, whole, flags):
    first = start_lutq("quantize", tiny("deep"), *SLOW)
    wait_for(tmp_path, 5)
    first.signal(signal.SIGSTOP)
    second = start_lutq("quantize", tiny("deep"), *SLOW, *flags).wait()
    first.signal(signal.SIGCONT)
    first = first.wait()
    assert second.returncode == 2, f"{flags=} {second}"
    assert "another lutq quantize is writing" in second.stderr, f"{flags=} {second.stderr}"
    assert first.returncode == 0, f"{flags=}: the second process disturbed the first: {first.stderr}"
    assert contents(tmp_path / "lutq-out") == whole, f"{flags=}: the second process disturbed the first"


# A disk that is full, or slow to take a whole write

SHARD = 100_000


class Disk(io.FileIO):
    """A file on a disk of `Disk.free` bytes that takes at most `Disk.chunk` of them in one write."""

    free, chunk = 1 << 60, 1 << 60

    def write(self, data):
        data = memoryview(data)[: min(Disk.free, Disk.chunk)]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Disk.free -= len(data)
        return super().write(data)


@pytest.fixture
def disk(monkeypatch):
    """Puts unfinished shards on a `Disk`; every other file stays where it is."""
    plain = Path.open

    def on_disk(path, mode="r", buffering=-1, **options):
        if path.suffix != ".unfinished":
            return plain(path, mode, buffering, **options)
        file = Disk(path, mode)
        return file if buffering == 0 else io.BufferedWriter(file)

    monkeypatch.setattr(Path, "open", on_disk)
    monkeypatch.setattr(Disk, "free", 1 << 60)
    monkeypatch.setattr(Disk, "chunk", 1 << 60)
    return Disk


@pytest.mark.parametrize("free", [0, 1000, 60_000, 150_000, 290_000])
def test_disk_full(tiny, tmp_path, disk, free):
    config = QuantConfig(bits=3, group=64, method="greedy")
    quantize_checkpoint(tiny("deep"), tmp_path / "whole", config, shard_bytes=SHARD)
    disk.free = free
    for _ in range(2):  # not better the second time: nothing was freed
        with pytest.raises(LutqError, match="the disk is full while writing"):
            quantize_checkpoint(tiny("deep"), tmp_path / "lutq-out", config, shard_bytes=SHARD)
        assert not (tmp_path / "lutq-out").exists(), f"{free=}"
        assert not (tmp_path / "lutq-out.partial" / "config.json").exists(), f"{free=}"
    done, disk.free = units(tmp_path), 1 << 60
    quantize_checkpoint(tiny("deep"), tmp_path / "lutq-out", config, shard_bytes=SHARD)
    got, expected = contents(tmp_path / "lutq-out"), contents(tmp_path / "whole")
    assert set(got) == set(expected), f"{free=} {done=} {set(got) ^ set(expected)}"
    for name, content in expected.items():
        assert got[name] == content, f"{free=} {done=}: {name} differs from that of an uninterrupted run"


def test_short_writes(tiny, tmp_path, disk):
    quantize_checkpoint(tiny("opt"), tmp_path / "whole", CHEAP)
    disk.chunk = 5000
    quantize_checkpoint(tiny("opt"), tmp_path / "out", CHEAP)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_little_room(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(LutqError, match=r"needs .* kB and the disk has 10\.00 kB free: make room"):
        quantize_checkpoint(tiny("deep"), tmp_path / "out", CHEAP)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    quantize_checkpoint(tiny("deep"), tmp_path / "out", CHEAP)
    assert (tmp_path / "out" / "config.json").is_file()
