"""Shared fixtures: tiny random models of every family, the embedded model quantized once, and the lutq command.

The tiny models have odd sizes on purpose, so that groups and 32-code words are cut short.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# before torch is imported: threads that spin while they wait make small tensors 30 times slower on busy cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from lutq.cpu import kernel, no_kernel
from lutq.ops import choose_backend
from lutq.pack import Packed, packed_shapes
from lutq.paths import ASSETS
from lutq.store import Store

if no_kernel() is None:
    kernel()  # compiled now, so that no test has it compiled and sees that said

CPU_BACKEND = choose_backend()[0]  # what `auto` is on the CPU: the kernel, where it can be compiled

OPT_TINY = ASSETS / "opt-tiny"
COMMON = {"vocab_size": 4096, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 128}
OPT = COMMON | {"hidden_size": 96, "ffn_dim": 172, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.1}
LLAMA = COMMON | {
    "hidden_size": 96,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,  # of the order 1 / sqrt(hidden_size), so that logits are not all alike
    "tie_word_embeddings": False,
}
# name -> (model type of transformers, fields of its config)
MODELS = {
    "opt": ("opt", OPT | {"word_embed_proj_dim": 96}),
    "opt-postnorm": ("opt", OPT | {"word_embed_proj_dim": 72, "do_layer_norm_before": False}),  # project_in/out, as in 350m
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "qwen2": ("qwen2", LLAMA | {"hidden_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 20}),
    "mistral": ("mistral", LLAMA | {"head_dim": 24, "sliding_window": 16}),
    "deep": ("llama", LLAMA | {"num_hidden_layers": 12, "vocab_size": 512}),  # 84 small Linear layers
}
FAMILIES = [name for name in MODELS if name != "deep"]


@pytest.fixture(params=FAMILIES)
def family(request):
    """The name of every tiny model, for `tiny`."""
    return request.param


def build_model(name, seed=0):
    """A random fp32 model; vectors (biases and norms) are random too, so that a lost one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def copy_tokenizer(folder):
    for path in OPT_TINY.glob("tokenizer*.json"):
        shutil.copyfile(path, Path(folder) / path.name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(name, dtype)`: directory of a tiny model with the embedded model's tokenizer. Shared: do not write into it."""
    made = {}

    def directory(name, dtype=torch.float32):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp("tiny") / name
            build_model(name).to(dtype).save_pretrained(folder)
            copy_tokenizer(folder)
            made[name, dtype] = folder
        return made[name, dtype]

    return directory


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """Directory of the embedded model quantized with default settings. Shared: do not write into it."""
    from lutq.quantize import quantize_checkpoint

    out = tmp_path_factory.mktemp("embedded") / "lutq-out"
    quantize_checkpoint(None, out, device="cpu")
    return out


@pytest.fixture
def run_lutq(tmp_path):
    """`run_lutq(*args)`: the command in a new interpreter, in tmp_path; a CompletedProcess (returncode, stdout, stderr)."""

    def run(*args, cwd=tmp_path, stdin="", env=None):
        command = [sys.executable, "-m", "lutq", *map(str, args)]
        environment = os.environ | (env or {})
        return subprocess.run(command, cwd=cwd, input=stdin, env=environment, capture_output=True, text=True, timeout=300)

    return run


FORK_SERVER = """
import json, os, runpy, signal, sys
import lutq.cli, lutq.evaluate, lutq.generate, lutq.hf, lutq.info, lutq.quantize, transformers.models.opt.modeling_opt

for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    else:
        answer = os.fork()
        if answer == 0:
            signal.alarm(240)  # a test that hangs must not keep its process
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
            for target, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
                os.dup2(os.open(request[name], flags), target)
            os.chdir(request["cwd"])
            os.environ.update(request["env"])
            sys.stdin = open(0, closefd=False)  # the server's has read ahead
            sys.argv = ["lutq", *request["args"]]
            try:
                runpy.run_module("lutq", run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(json.dumps(answer), flush=True)
"""


class ForkServer:
    """Runs `python -m lutq` in processes forked from one that has imported torch and transformers already.

    A new interpreter imports them for 4 s, a fork starts in 10 ms; what runs then is the same, with files of its own as
    standard streams.
    """

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tempfile.gettempdir(),
        )

    def ask(self, request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, args, folder, cwd, stdin, env=None):
        files = {name: str(folder / name) for name in ("stdin", "stdout", "stderr")}
        for name, path in files.items():
            Path(path).write_text(stdin if name == "stdin" else "", encoding="utf-8")
        args = [str(arg) for arg in args]
        return Forked(self, args, files, self.ask({"args": args, "cwd": str(cwd), "env": env or {}, **files}))


class Forked:
    """A running lutq command; its pid may be signalled until `wait` has returned."""

    def __init__(self, server, args, files, pid):
        self.server, self.args, self.files, self.pid = server, args, files, pid

    def signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        code = self.server.ask({"wait": self.pid})
        out, err = (Path(self.files[name]).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(["lutq", *self.args], code, out, err)


@pytest.fixture(scope="session")
def fork_server():
    server = ForkServer()
    yield server
    server.server.stdin.close()
    server.server.wait(timeout=30)


@pytest.fixture
def start_lutq(fork_server, tmp_path, tmp_path_factory):
    """`start_lutq(*args)`: the command in a forked process, in tmp_path; a `Forked` with pid, signal() and wait()."""
    running = []

    def start(*args, cwd=tmp_path, stdin="", env=None):
        running.append(fork_server.start(args, tmp_path_factory.mktemp("streams"), cwd, stdin, env))
        return running[-1]

    yield start
    for process in running:  # what a failed test left behind
        try:
            process.signal(signal.SIGKILL)
            process.wait()
        except ProcessLookupError:
            pass


@pytest.fixture
def lutq_command(start_lutq):
    """`lutq_command(*args)`: `start_lutq` and wait; a CompletedProcess."""
    return lambda *args, **options: start_lutq(*args, **options).wait()


def random_packed(N, K, layer, seed=0, device="cpu"):
    """Random canonical tensors of a matrix [N, K]; where K % 32, bits past K are random too."""
    random = torch.Generator().manual_seed(seed)
    shapes = packed_shapes(N, K, layer)
    tensors = {"codes": torch.randint(-(2**31), 2**31, shapes["codes"][0], generator=random).to(torch.int32)}
    tensors["scales"] = (torch.rand(shapes["scales"][0], generator=random) + 0.1).half()
    if "offsets" in shapes:
        tensors["offsets"] = torch.randn(shapes["offsets"][0], generator=random).half()
    if "zero_points" in shapes:
        tensors["zero_points"] = torch.randint(0, 2**layer.bits, shapes["zero_points"][0], generator=random, dtype=torch.uint8)
    return Packed(**{name: tensor.to(device) for name, tensor in tensors.items()})


class Crash(BaseException):
    """Power is cut."""


@contextlib.contextmanager
def crash_before(name):
    """A calibrated run that dies before it saves the state `name`, as it has to."""
    save = Store.save

    def dying(self, saved, state):
        if saved == name:
            raise Crash
        save(self, saved, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "save", dying)
        with pytest.raises(Crash):
            yield
