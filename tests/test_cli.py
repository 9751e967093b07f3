"""The command line: what each verb prints, and one sentence with exit code 2 for everything that is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
import typer
from conftest import copy_tokenizer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lutq
from lutq.cli import app
from lutq.config import FIELDS, METHODS, STARTS, QuantConfig
from lutq.ops import working_backend
from lutq.quantize import quantize_checkpoint

CHEAP = ("--method", "greedy", "--bits", "2", "--device", "cpu")
SHORT = ["--verbose", "--help", "-h"]
EVERYWHERE = ["--device", "--dtype", "--backend", *SHORT]
FLAGS = {
    "quantize": [
        *(
            "model",
            "--bits",
            "--group",
            "--method",
            "--offsets",
            "--no-offsets",
            "--symmetric",
            "--asymmetric",
            "--clip",
            "--no-clip",
        ),
        *("--start", "--iterations", "--tolerance", "--head-bits", "--recipe", "--out", "--overwrite"),
        *("--scaling", "--no-scaling", "--learned-scaling", "--outliers", "--low-rank", "--end-loss", "--no-end-loss"),
        *("--calib", "--calib-windows", "--calib-length", "--seed", "--damping", "--rounds", "--sweeps"),
        *("--refine", "--distill", "--flips", "--no-flips", "--rate", "--target-bpw", "--target-ms", "--groups", "--lowest-bits"),
        "--scale-bits",
    ],
    "generate": [
        *("prompt", "--model", "--file", "--max-new-tokens", "--temperature", "--top-p", "--top-k", "--repetition-penalty"),
        *("--seed", "--chat", "--engine", "--bits", "--lines"),
    ],
    "eval-ppl": ["dataset", "--model", "--bits", "--baseline", "--protocol", "--max-windows", "--json"],
    "info": ["model"],
}
FLAGS = {verb: {*flags, *EVERYWHERE} for verb, flags in FLAGS.items()}
FLAGS |= {"convert": {"model", "--out", "--overwrite", *SHORT}}
FLAGS |= {"build": {"--arch", "--out", *SHORT}, "doctor": {*SHORT}, "bench": {"--help", "-h"}}
KERNEL = {"--shape", "--rows", "--bits", "--grid", "--group", "--json", "--plot", "--repeats", "--tune", "--device", *SHORT}
DECODE = {"--shape", "--bits", "--grid", "--group", "--context", "--batch", "--engine", "--synthetic", "--json", "--plot"}
DECODE |= {"--replays", "--device", "--dtype", *SHORT}


def words(text):
    return set(re.findall(r"[\w-]+", text))


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """The command in this process, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda *args, **options: CliRunner().invoke(app, [str(arg) for arg in args], **options)


# Help


@pytest.mark.parametrize("verb", FLAGS)
def test_help_lists_every_flag(run_lutq, verb):
    result = run_lutq(verb, "--help")
    assert result.returncode == 0, f"{verb=} {result.stderr}"
    assert words(result.stdout) >= FLAGS[verb], f"{verb=} {FLAGS[verb] - words(result.stdout)}\n{result.stdout}"


@pytest.mark.parametrize("args", [["--help"], ["-h"], []], ids=str)
def test_help_lists_every_verb(run_lutq, args):
    result = run_lutq(*args)
    assert result.returncode == (0 if args else 2), f"{args=} {result}"  # without arguments it is an error, as in git
    assert {*FLAGS, "--version"} <= words(result.stdout + result.stderr), f"{args=} {result}"


def test_flags_are_all_that_there_are():
    group = typer.main.get_command(app)
    assert set(group.commands) == set(FLAGS)
    for verb, command in group.commands.items():
        flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        assert flags | {"--help", "-h"} == FLAGS[verb], f"{verb=} {flags ^ FLAGS[verb]}"
    benches = {"kernel": KERNEL, "decode": DECODE}
    assert set(group.commands["bench"].commands) == set(benches)
    for name, expected in benches.items():
        command = group.commands["bench"].commands[name]
        assert {flag for parameter in command.params for flag in parameter.opts} | {"--help", "-h"} == expected, f"{name=}"


def test_every_setting_is_a_flag_of_quantize():
    parameters = {parameter.name: parameter for parameter in typer.main.get_command(app).commands["quantize"].params}
    for name in FIELDS:
        assert (name in parameters) == (name != "overrides"), f"{name=} {sorted(parameters)}"
        if name in parameters:
            assert parameters[name].default is None, f"{name=}: a default here would hide the recipe's value"


def test_help_shows_the_defaults_of_quantconfig(run_lutq):
    text = " ".join(run_lutq("quantize", "--help", env={"COLUMNS": "250"}).stdout.split())
    defaults = QuantConfig()
    for name in ("bits", "group", "method", "start", "iterations", "tolerance", "head_bits"):
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"{flag} [^-]*.*?\[default: \(?{re.escape(str(getattr(defaults, name)))}\)?\]", text), (
            f"{name=}\n{text}"
        )
    for known in (*METHODS, *STARTS):
        assert known in text, f"{known=}\n{text}"


def test_help_is_instant(tmp_path):
    code = """
import sys
sys.argv = ["lutq", "--help"]
from lutq.cli import main
try:
    main()
except SystemExit as error:
    print("exit", error.code)
print("imported", sorted({"torch", "transformers", "datasets", "safetensors", "numpy"} & set(sys.modules)))
"""
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        begin = time.perf_counter()
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - begin)
    assert "exit 0" in result.stdout, f"{result}"
    assert "imported []" in result.stdout, f"{result.stdout}"
    assert min(seconds) < 1.5, f"{seconds=}"


def test_version(run_lutq):
    result = run_lutq("--version")
    assert (result.returncode, result.stdout) == (0, f"lutq {lutq.__version__}\n"), f"{result}"


# Every verb on the embedded model: in this process, and as a process of a new interpreter


def check_quantize(out, text):
    assert text.rstrip().endswith("with 2.375 bits per weight."), text
    assert re.search(r"^fc1 +4 +2 +128 +2\.375 +0\.\d{4}$", text, re.MULTILINE), text
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {path.name for path in out.iterdir()}


def check_info(text):
    assert "OPTForCausalLM, 4.5 M parameters, 4 blocks, context 1024" in text, text
    assert "3.500 bits per weight in 24 layers" in text, text
    assert re.search(r"^fc2 +4 +3 +128 +bcq +yes +3\.500$", text, re.MULTILINE), text
    assert re.search(r"would run here on (CPU|NVIDIA).* with backend (reference|cpu|cuda)", text), text


def check_eval(text):
    lines = text.strip().splitlines()
    base, model = (float(re.search(r": perplexity ([\d.]+) \+- ([\d.]+) \(2 windows of 64,", line)[1]) for line in lines[:2])
    change = re.fullmatch(r"difference: \+([\d.]+) \(\+([\d.]+)%\)", lines[2])
    assert len(lines) == 3, text
    assert float(change[1]) == pytest.approx(model - base, abs=0.011), text
    assert float(change[2]) == pytest.approx(100 * (model / base - 1), abs=0.1), text


EVAL = ("eval-ppl", "wikitext2", "--baseline", "opt-tiny", "--protocol", "context-64", "--max-windows", "2", "--device", "cpu")
GENERATE = ("generate", "The old man", "--max-new-tokens", "5", "--device", "cpu")


def test_verbs_in_process(invoke, embedded, tmp_path):
    result = invoke("quantize", *CHEAP)
    assert result.exit_code == 0, result.output
    check_quantize(tmp_path / "lutq-out", result.stdout)
    result = invoke("info", embedded, "--device", "cpu")
    assert result.exit_code == 0, result.output
    check_info(result.stdout)
    result = invoke(*EVAL, "--model", embedded)
    assert result.exit_code == 0, result.output
    check_eval(result.stdout)
    result = invoke(*GENERATE, "--model", embedded)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("The old man"), result.stdout
    assert len(result.stdout) > len("The old man\n") + 5, result.stdout


def test_verbs_as_processes(run_lutq, tmp_path):
    # the sequence of the README, with the defaults where they are: ./lutq-out
    result = run_lutq("quantize", *CHEAP)
    assert result.returncode == 0, result.stderr
    check_quantize(tmp_path / "lutq-out", result.stdout)
    result = run_lutq("info", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    check_info(result.stdout.replace("2.375", "3.500").replace("  2    128", "  3    128"))
    assert result.stderr == "", result.stderr
    result = run_lutq(*EVAL)
    assert result.returncode == 0, result.stderr
    check_eval(result.stdout)
    result = run_lutq(*GENERATE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The old man"), result.stdout
    assert result.stderr.count("\n") == 1, result.stderr


def test_info_of_a_plain_model(lutq_command):
    result = lutq_command("info", "opt-tiny")
    assert result.returncode == 0, result.stderr
    assert "not quantized by lutq; 24 Linear layers inside its blocks" in result.stdout, result.stdout


def test_embedded_model_by_name(lutq_command):
    result = lutq_command(*GENERATE, "--model", "opt-tiny")
    assert result.returncode == 0, result.stderr


def test_recipes(invoke, tmp_path):
    shipped = {"bits": 3, "overrides": {"(out_proj|fc2|o_proj|down_proj)$": {"bits": 4}}}
    result = invoke("quantize", "--recipe", "mixed-3bit", "--method", "greedy", "--group", "64", "--out", "mixed")
    assert result.exit_code == 0, result.output
    quantization = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    expected = QuantConfig(method="greedy", group=64, **shipped).to_dict()
    assert quantization["settings"] == expected, f"{quantization['settings']}"
    bits = {name.rpartition(".")[2]: layer["bits"] for name, layer in quantization["modules"].items()}
    assert bits == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "fc1": 3, "out_proj": 4, "fc2": 4}, f"{bits}"


# Bad input


def one_sentence(result, case, progress=False):
    """Exit code 2 and one line; `progress`: the command had begun to work, so that a progress bar stands before it."""
    code = result.exit_code if hasattr(result, "exit_code") else result.returncode
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    if progress:
        lines = [line for line in lines if not re.match(r".*\d+%\|", line)]
    assert "Traceback" not in result.stderr, f"{case}\n{result.stderr}"
    assert code == 2, f"{case} {code=}\n{result.stdout}\n{result.stderr}"
    assert len(lines) == 1, f"{case}: more than one line\n{result.stderr}"
    assert lines[0].startswith("lutq: "), f"{case}\n{result.stderr}"
    assert result.stdout == "", f"{case}\n{result.stdout}"
    return lines[0]


SETTINGS = {
    "--bits 0": "bits must be 1, 2, 3 or 4",
    "--bits 5": "bits must be 1, 2, 3 or 4",
    "--bits -1": "bits must be",
    "--group 48": "group must be a multiple of 32",
    "--group -32": "group must be a multiple of 32",
    "--head-bits 5": "head_bits must be 1, 2, 3 or 4, or 16",
    "--method gptq": "method must be one of rtn, greedy, alternating",
    "--start best-of-all": "start must be one of",
    "--iterations -1": "iterations must be 0 or more",
    "--tolerance 1": "tolerance must be at least 0 and less than 1",
    "--tolerance nan": "tolerance must be at least 0 and less than 1",
    "--recipe no-such": "no recipe 'no-such'.*default, mixed-3bit, rtn-4bit",
    "--backend tpu": "unknown backend 'tpu': use auto or reference, cpu, cuda",
    "--backend cuda --device cpu": "needs a GPU",
    "--device tpu": "device",
    "--device cuda:99": "use --device cpu|there is no cuda:99",
    "--device mps": "not supported",
    "--dtype int8": "unknown dtype 'int8'",
    "--dtype fp16": "unknown dtype 'fp16'",
}


@pytest.mark.parametrize("flags", SETTINGS)
def test_bad_settings_of_quantize(lutq_command, tmp_path, flags):
    message = one_sentence(lutq_command("quantize", *flags.split(), "--out", "out"), flags)
    assert re.search(SETTINGS[flags], message), f"{flags=} {message}"
    assert not (tmp_path / "out").exists(), f"{flags=}"
    assert not (tmp_path / "out.partial").exists(), f"{flags=}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bits = ", "not valid TOML"),
        ("bit = 3", "unknown key 'bit'"),
        ('bits = "3"', "bits must be of type int"),
        ("group = 40", "multiple of 32"),
        ('[overrides."("]\nbits = 4', "not a regular expression"),
        ('[overrides."fc1"]\nbit = 4', "takes the keys bits, group, scale_bits and skip"),
        ('[overrides."no_such_layer"]\nbits = 4', "matches no Linear layer"),
        ('[overrides."."]\nskip = true', "skip every Linear layer"),
        ("overrides = 3", "overrides must be of type dict"),
    ],
)
def test_bad_recipes(lutq_command, tmp_path, content, message):
    (tmp_path / "recipe.toml").write_text(content)
    found = one_sentence(lutq_command("quantize", "--recipe", "recipe.toml"), content)
    assert message in found, f"{content=} {found}"


OTHERS = {
    "generate TEXT --model OUT --backend lut": "unknown backend 'lut'",
    "generate TEXT --model OUT --device gpu": "unknown device 'gpu'",
    "generate TEXT --model OUT --dtype double": "unknown dtype 'double'",
    "generate TEXT --model OUT --temperature -1": "temperature must be at least 0",
    "generate TEXT --model OUT --top-p 0": "top_p must be above 0",
    "generate TEXT --model OUT --max-new-tokens 0": "max_new_tokens must be at least 1",
    "generate TEXT --model OUT --chat": "no chat template",
    "generate TEXT --model OUT --file x.txt": "not both",
    "generate TEXT": "there is no lutq-out here: run `lutq quantize` first",
    "generate  --model OUT": "the prompt is empty",
    "generate --model OUT": "the prompt is empty",
    "eval-ppl": "there is no lutq-out here",
    "eval-ppl no-such-dataset --model OUT": "unknown dataset 'no-such-dataset': use wikitext2, c4, ptb",
    "eval-ppl --model OUT --protocol gptq2": "unknown protocol 'gptq2'",
    "eval-ppl --model OUT --protocol context-5000": "takes 1024 tokens at most",
    "eval-ppl --model OUT --max-windows 0": "must be 1 or more",
    "eval-ppl --model OUT --json no/such/file.json": "create it first",
    "eval-ppl --model OUT --backend lut": "unknown backend 'lut'",
    "eval-ppl --model OUT --baseline no/such/dir": "no/such/dir",
    "eval-ppl --model OUT --dtype double": "unknown dtype 'double'",
    "info": "there is no lutq-out here",
    "info OUT --backend lut": "unknown backend 'lut'",
    "info OUT --device tpu": "device",
    "info OUT --dtype double": "unknown dtype 'double'",
    "info OUT/model.safetensors": "is a file",
    "info facebook/opt-125m": "could be fetched from the hub",
    "quantize OUT": "already quantized",
}


@pytest.mark.parametrize("command", OTHERS)
def test_bad_arguments(lutq_command, embedded, command):
    args = [word.replace("OUT", str(embedded)).replace("TEXT", "The old man") for word in command.split(" ")]
    message = one_sentence(lutq_command(*args), command)
    assert OTHERS[command] in message, f"{command=} {message}"


def test_without_network_c4_says_so(lutq_command, embedded):
    message = one_sentence(lutq_command("eval-ppl", "c4", "--model", embedded), "c4")
    assert "could not fetch allenai/c4" in message, message


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_header(file, text):
    """Overwrite the first bytes of a safetensors header."""
    content = bytearray(file.read_bytes())
    content[8 : 8 + len(text)] = text
    file.write_bytes(content)


def newer(folder):
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | {"format_version": 3})


def without(folder, part):
    state = load_file(folder / "model.safetensors")
    state.pop(next(name for name in state if name.endswith(part)))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def shards(folder, missing):
    """Two shards and their index; the second shard may be left out."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    if missing:
        (folder / "model-00002-of-00002.safetensors").unlink()


# name -> (how to damage a plain and a quantized checkpoint alike, what the message must name)
DAMAGES = {
    "no directory": (lambda folder: shutil.rmtree(folder), "no directory"),
    "empty directory": (lambda folder: [path.unlink() for path in folder.iterdir()], "needs a config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "weights|index|model.safetensors"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "JSON object"),
    "config without type": (lambda folder: edit_config(folder, model_type=None), "config.json"),
    "config of an unknown type": (lambda folder: edit_config(folder, model_type="gpt7"), "gpt7"),
    "config with text for a number": (lambda folder: edit_config(folder, hidden_size="wide"), "config.json|hidden_size"),
    "config with no heads": (lambda folder: edit_config(folder, num_attention_heads=0), "config.json|model type 'opt'"),
    "header corrupted": (lambda folder: edit_header(folder / "model.safetensors", b"garbage"), "model.safetensors is damaged"),
    "header length absurd": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), "is damaged"),
    "empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is damaged or cut short"),
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 500_000), "is damaged or cut short"),
    "one byte short": (
        lambda folder: os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1),
        "is damaged or cut short",
    ),
    "missing shard": (lambda folder: shards(folder, True), "lacks the shard model-00002-of-00002.safetensors"),
    "index no JSON": (
        lambda folder: (shards(folder, False), (folder / "model.safetensors.index.json").write_text("{")),
        "index.json is not valid JSON",
    ),
    "index without map": (
        lambda folder: (shards(folder, False), (folder / "model.safetensors.index.json").write_text("{}")),
        "index.json",
    ),
    "index with a wrong map": (
        lambda folder: (shards(folder, False), (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')),
        "index.json",
    ),
    "more blocks than tensors": (lambda folder: edit_config(folder, num_hidden_layers=3), "layers.2"),
    "fewer blocks than modules": (lambda folder: edit_config(folder, num_hidden_layers=1), "layers.1"),
    "other hidden size": (
        lambda folder: edit_config(folder, hidden_size=128, word_embed_proj_dim=128),
        r"config.json asks for .*\b128\]",
    ),
    "other FFN size": (lambda folder: edit_config(folder, ffn_dim=180), r"config.json asks for .*\b180\b"),
    "other vocabulary": (lambda folder: edit_config(folder, vocab_size=5000), r"config.json asks for .*\[5000, 96\]"),
    "missing tensor": (lambda folder: without(folder, "final_layer_norm.bias"), "final_layer_norm.bias"),
}
NOT_FOR_PLAIN = {"fewer blocks than modules"}  # a source may hold more than its config asks for: reported, not refused
VERBS = {
    "quantize": ("quantize", "MODEL", *CHEAP),
    "info": ("info", "MODEL"),
    "generate": ("generate", "The old man", "--model", "MODEL"),
    "eval-ppl": ("eval-ppl", "--model", "MODEL", "--protocol", "context-64", "--max-windows", "1"),
}


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "opt"
    quantize_checkpoint(tiny("opt"), out, QuantConfig(bits=2, method="greedy"), device="cpu")
    return out


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_damaged_checkpoints(lutq_command, tiny, packed, tmp_path, kind, damage):
    change, named = DAMAGES[damage]
    folder = tmp_path / "model"
    shutil.copytree(tiny("opt") if kind == "plain" else packed, folder)
    change(folder)
    if kind == "plain" and damage in NOT_FOR_PLAIN:
        return
    for verb, command in VERBS.items():
        if verb == "quantize" and kind == "packed" and not damage.startswith(("no dir", "empty dir", "config no", "config a")):
            continue  # to be already quantized is what is wrong first
        case = f"{kind=} {damage=} {verb=}"
        message = one_sentence(lutq_command(*(str(folder) if word == "MODEL" else word for word in command)), case)
        assert re.search(named, message), f"{case} {message}"
        assert not (tmp_path / "lutq-out").exists(), case


@pytest.mark.parametrize("verb", ["info", "generate", "eval-ppl"])
def test_newer_format(lutq_command, packed, tmp_path, verb):
    shutil.copytree(packed, tmp_path / "model")
    newer(tmp_path / "model")
    message = one_sentence(lutq_command(*(word.replace("MODEL", "model") for word in VERBS[verb])), verb)
    assert "format version 3" in message, f"{verb=} {message}"
    assert "pip install --upgrade lutq" in message, f"{verb=} {message}"


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "bert"])
def test_unsupported_architecture(lutq_command, tmp_path, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 4096}
    fields = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 4096} if kind == "gpt2" else sizes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    model.save_pretrained(tmp_path / "model")
    copy_tokenizer(tmp_path / "model")
    message = one_sentence(lutq_command("quantize", "model", *CHEAP), kind)
    assert "lutq quantizes OPT, LLaMA, Mistral, Qwen2, Qwen3" in message, f"{kind=} {message}"


@pytest.mark.parametrize("verb", ["generate", "eval-ppl"])
@pytest.mark.parametrize("content", [None, "{"], ids=["none", "damaged"])
def test_without_tokenizer(lutq_command, packed, tmp_path, verb, content):
    shutil.copytree(packed, tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    if content:
        (tmp_path / "model" / "tokenizer.json").write_text(content)
    message = one_sentence(lutq_command(*(word.replace("MODEL", "model") for word in VERBS[verb])), f"{verb=} {content=}")
    assert "tokenizer" in message, f"{verb=} {content=} {message}"


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("key", ["model.decoder.layers.1.fc2.weight", "model.decoder.layers.1.fc2.bias"])
def test_nan_weights(lutq_command, tiny, tmp_path, key, value):
    shutil.copytree(tiny("opt"), tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state[key].view(-1)[5] = value
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    message = one_sentence(lutq_command("quantize", "model", *CHEAP), f"{key=} {value=}", progress=True)
    assert f"{key} holds NaN or infinite values" in message, f"{key=} {value=} {message}"
    assert not (tmp_path / "lutq-out").exists(), f"{key=} {value=}"
    assert not (tmp_path / "lutq-out.partial" / "config.json").exists(), f"{key=} {value=}"


@pytest.mark.parametrize(("key", "scale"), [("model.decoder.layers.1.fc2.weight", 1e6), ("model.decoder.layers.1.fc2.bias", 1e6)])
def test_weights_too_large_for_fp16(lutq_command, tiny, tmp_path, key, scale):
    shutil.copytree(tiny("opt"), tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state[key] *= scale
    save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    message = one_sentence(lutq_command("quantize", "model", *CHEAP), f"{key=}", progress=True)
    assert key in message, f"{key=} {message}"
    assert not (tmp_path / "lutq-out").exists(), f"{key=}"


def test_verbose_shows_the_traceback(lutq_command):
    result = lutq_command("info", "/no/such/directory", "--verbose")
    assert result.returncode == 2, f"{result}"
    assert "Traceback (most recent call last)" in result.stderr, result.stderr
    assert "LutqError" in result.stderr, result.stderr
    assert result.stderr.splitlines()[-1].startswith("lutq: no directory /no/such/directory"), result.stderr


def test_one_error_in_a_new_interpreter(run_lutq):
    message = one_sentence(run_lutq("info", "/no/such/directory"), "new interpreter")
    assert "give a checkpoint directory or a hub id" in message, message


def test_interrupt(start_lutq, tiny, tmp_path):
    slow = ("quantize", tiny("deep"), "--bits", "4", "--start", "best", "--device", "cpu")  # so that it is not over at once
    running = start_lutq(*slow)
    journal = tmp_path / "lutq-out.partial" / "lutq-progress.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        assert time.monotonic() < deadline, "no progress after a minute"
        time.sleep(0.005)
    running.signal(signal.SIGINT)
    result = running.wait()
    assert result.returncode == 130, f"{result}"
    assert result.stderr.splitlines()[-1].startswith("lutq: interrupted"), result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "lutq-out").exists()
    result = start_lutq(*slow).wait()
    assert result.returncode == 0, result.stderr


# Memory that runs out


def test_model_larger_than_memory(invoke, embedded, monkeypatch):
    from lutq.hf import load, model_bytes

    free = {"bytes": 1000}
    monkeypatch.setattr("lutq.hf.free_memory", lambda _: free["bytes"])
    for args in (GENERATE, EVAL[:2] + EVAL[4:]):
        message = one_sentence(invoke(*args, "--model", embedded), args[0])
        assert "does not fit" in message, message
        assert "1.00 kB free" in message, message
        assert "try --dtype bfloat16" in message, f"nothing fits into 1 kB: {message}"
    free["bytes"] = 10_000_000  # too little for 17.9 MB of fp32, enough for fp32 embeddings and 4-bit layers
    message = one_sentence(invoke(*GENERATE, "--model", "opt-tiny"), "opt-tiny")
    assert "quantized to 4 bits" in message, message
    assert "lutq quantize --bits 4" in message, message
    assert model_bytes(embedded, torch.float32) < free["bytes"]
    load(embedded, device="cpu")


ALLOCATION_ERRORS = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 68 bytes"
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
]


@pytest.mark.parametrize("error", ALLOCATION_ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_in_fit(invoke, tiny, tmp_path, monkeypatch, error):
    import lutq.quantize

    plain, calls = lutq.quantize.fit, []

    def fit(*args):
        calls.append(args)
        if len(calls) == 5:
            raise error
        return plain(*args)

    monkeypatch.setattr(lutq.quantize, "fit", fit)
    message = one_sentence(invoke("quantize", tiny("opt"), *CHEAP), f"{error=}", progress=True)
    assert "out of memory: model.decoder.layers.0.fc1 needs about" in message, f"{error=} {message}"
    assert "is free" in message, f"{error=} {message}"
    assert not (tmp_path / "lutq-out").exists(), f"{error=}"
    assert not (tmp_path / "lutq-out.partial" / "config.json").exists(), f"{error=}"
    assert invoke("quantize", tiny("opt"), *CHEAP).exit_code == 0, f"{error=}: the same command must go on"
    assert len(calls) == 5 + 8, f"{error=} {len(calls)=}: four layers were done before the error"


@pytest.mark.parametrize("error", ALLOCATION_ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_while_running(invoke, embedded, monkeypatch, error):
    for product in ("lutq.ops.dequantize", "lutq.cpu.multiply"):
        monkeypatch.setattr(product, lambda *_: (_ for _ in ()).throw(error))
    message = one_sentence(invoke(*EVAL[:2], *EVAL[4:], "--model", embedded), f"{error=}", progress=True)
    assert "out of memory: windows of 64 tokens are too long here: use --protocol context-32" in message, f"{error=} {message}"
    for free, words in ((8 << 30, "too little for the rest"), (1 << 14, "enough for about 1")):
        monkeypatch.setattr("lutq.generate.free_memory", lambda device, free=free: free)
        result = invoke(*GENERATE, "--model", embedded)  # has printed the prompt
        assert (result.exit_code, result.stdout) == (2, "The old man"), f"{error=} {result.output}"
        message = r"lutq: out of memory: 4 \+ 5 tokens do not fit: their cache takes 73.73 kB and cpu has .* free, "
        assert re.match(f"{message}{words}; shorten the prompt or", result.stderr), f"{error=} {result.stderr}"


def test_prompts_of_a_file(invoke, embedded, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("The old man\r\n\n  She\u2028said\n".encode())
    settings = ("--max-new-tokens", "5", "--temperature", "0", "--device", "cpu", "--model", embedded)
    for engine in ("plain", "fast"):
        result = invoke("generate", "--lines", "--file", str(file), "--engine", engine, *settings)
        assert result.exit_code == 0, f"{engine=} {result.output}"
        found = [json.loads(line) for line in result.stdout.rstrip("\n").split("\n")]
        assert [record["prompt"] for record in found] == ["The old man", "  She\u2028said"], f"{engine=} {found}"
        for record in found:
            alone = invoke("generate", record["prompt"], *settings)
            assert alone.stdout == record["prompt"] + record["text"] + "\n", f"{engine=} {record=} {alone.stdout=}"
        assert re.match(r"\[2 prompts; 10 tokens, [\d.]+ tokens/s; backend (cpu|torch)", result.stderr.splitlines()[-1]), (
            result.stderr
        )
    file.write_text("\n \n")
    assert "is empty" in one_sentence(invoke("generate", "--lines", "--file", str(file), *settings), "no lines")


def test_warnings_are_sentences(invoke, embedded, monkeypatch):
    """What lutq warns of is one, ahead of the prompt; what other libraries warn of is shown as Python does."""

    def load(*about, **settings):
        warnings.warn("foreign", stacklevel=1)  # of this file
        return loading(*about, **settings)

    loading = lutq.load
    monkeypatch.setattr("lutq.hf.load", load)
    monkeypatch.setattr("lutq.cpu.no_kernel", lambda: "there is no compiler")
    working_backend.cache_clear()
    assert invoke("quantize", *CHEAP).exit_code == 0
    result = invoke(*GENERATE)
    working_backend.cache_clear()
    foreign, own = (next(line for line in result.stderr.splitlines() if word in line) for word in ("foreign", "kernel: "))
    assert own.startswith("lutq: warning: lutq runs without its CPU kernel: "), own
    assert own.endswith("because the CPU kernel cannot run: there is no compiler"), own
    assert re.search(r"test_cli\.py:\d+: UserWarning: foreign", foreign), foreign
    assert result.output.index(own) < result.output.index("The old man")


def test_other_errors_are_not_hidden(invoke, tiny, monkeypatch):
    # an error in lutq itself must come with its traceback, not as if the user had done something wrong
    monkeypatch.setattr("lutq.quantize.fit", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    result = invoke("quantize", tiny("opt"), *CHEAP)
    assert result.exit_code == 1, f"{result.output}"
    assert isinstance(result.exception, RuntimeError), f"{result.exception!r}"
