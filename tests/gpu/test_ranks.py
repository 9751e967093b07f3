"""A model over several GPUs: the kernels on parts of layers, sums inside captured steps, and processes that end together.

Where there are fewer GPUs than ranks, tests of several processes are skipped; parts are tested on one GPU, by ranks as threads.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engines import continue_text
from ranks import MODELS, Checkpoints, Threads, on_processes, stepped

from lutq.config import QuantConfig
from lutq.decode import steps
from lutq.decode.choose import make
from lutq.decode.engine import Engine
from lutq.decode.steps import Kernels
from lutq.decode.weights import weights_of
from lutq.generate import Sampling
from lutq.hf import load
from lutq.parallel.load import load_part
from lutq.parallel.score import Scorer
from lutq.quantize import quantize_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPUS = torch.cuda.device_count()
DEVICE = torch.device("cuda", 0)
ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of logits, relative, through all layers
PROMPT, STEPS = 11, 24
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def several(world):
    return pytest.param(world, marks=pytest.mark.skipif(world > GPUS, reason=f"needs {world} GPUs, {GPUS} are here"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return Checkpoints(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def embedded3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "embedded"
    quantize_checkpoint(None, folder, QuantConfig(bits=3, group=128), device="cuda")
    return folder


def worst(found, expected):
    """The largest relative error of a row."""
    difference = (found.double() - expected.double()).norm(dim=-1)
    return (difference / expected.double().norm(dim=-1)).max().item()


def given_tokens():
    return torch.randint(3, 4096, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(0))


def cut(given, device):
    """A prompt [1, PROMPT] and the tokens that steps read."""
    given = given.to(device)
    return given[None, :PROMPT], given[PROMPT:]


def one_process(folder, dtype, given):
    with torch.inference_mode():
        engine = Engine(weights_of(load(folder, device=DEVICE, dtype=dtype)), 64, 1, Kernels(DEVICE))
        return stepped(engine, *cut(given, DEVICE))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("how", ["plain", "bcq", "rows", "rtn"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_on_parts(checkpoint, name, how, world, dtype):
    folder, given = checkpoint(name, how), given_tokens()
    expected = one_process(folder, dtype, given)

    def run(ranks):
        part = load_part(folder, ranks, DEVICE, dtype)
        engine = Engine(weights_of(part, ranks.world), 64, 1, Kernels(DEVICE), None, ranks)
        (windows,) = Scorer(part, 64)(given[None].to(DEVICE))
        return stepped(engine, *cut(given, DEVICE)), windows

    found = Threads(world).run(run)
    for rank, (logits, windows) in enumerate(found):
        error = worst(logits, expected)
        assert error < ROUNDING[dtype], f"{name=} {how=} {world=} {dtype=} {rank=} {error=:.1e}"
        assert torch.equal(logits, found[0][0]), f"ranks differ: {name=} {how=} {world=} {dtype=} {rank=}"
        error = worst(windows[PROMPT - 1 :], expected)
        assert error < ROUNDING[dtype], f"windows: {name=} {how=} {world=} {dtype=} {rank=} {error=:.1e}"


def reach_each_other(world):
    pairs = itertools.permutations(range(world), 2)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)


def captured(ranks, folder, given, dtype, through):
    """Logits of the prompt and of captured steps that read given tokens, and tokens drawn with a seed of the rank's own."""
    model, drawn = load(folder, dtype=dtype), []
    ids, given = cut(given, model.device)
    if through == "NCCL":
        steps.connect = lambda *arguments: None
    engine = make("fast", model, 64, Sampling(temperature=0.0))
    assert engine.graph.graph is not None, "not captured"
    assert (engine.inboxes is not None) == (through == "inboxes"), f"{through=}"
    assert engine.own_logits.shape[1] < engine.logits.shape[1], "the head is not split"
    logits = stepped(engine, ids, given).cpu()
    torch.manual_seed(ranks.rank)
    continue_text(make("fast", model, 64, Sampling()), ids, STEPS, (), drawn.append)
    return logits, drawn


@pytest.mark.parametrize("through", ["inboxes", "NCCL"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("world", [several(2), several(4)])
@pytest.mark.parametrize("name", MODELS)
def test_captured_steps(checkpoint, tmp_path, name, world, dtype, through):
    if through == "inboxes" and not reach_each_other(world):
        pytest.skip("these GPUs do not reach each other's memory")
    folder, given = checkpoint(name, "bcq"), given_tokens()
    expected = one_process(folder, dtype, given).cpu()
    (logits, drawn), *others = on_processes(world, "cuda", tmp_path, captured, folder, given, dtype, through)
    error = worst(logits, expected)
    assert error < ROUNDING[dtype], f"{name=} {world=} {dtype=} {through=} {error=:.1e}"
    assert len(set(drawn)) > 1, drawn
    for rank, (same, tokens) in enumerate(others, 1):
        assert torch.equal(same, logits), f"{name=} {world=} {dtype=} {through=} {rank=}"
        assert tokens == drawn, f"{name=} {world=} {dtype=} {through=} {rank=}"


def lutq_on(world, *arguments, cwd):
    """The command, over several GPUs if world > 1; a CompletedProcess."""
    prefix = [*TORCHRUN, "--nproc-per-node", str(world)] if world > 1 else [sys.executable]
    command = [*prefix, "-m", "lutq", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("world", [several(2), several(4)])
def test_generate_and_perplexity(embedded3, tmp_path, world):
    prompt = ("generate", "The old man walked", "--temperature", 0, "--max-new-tokens", 60, "--model", embedded3)
    one, many = (lutq_on(count, *prompt, cwd=tmp_path) for count in (1, world))
    assert many.returncode == 0, many.stderr
    assert many.stdout == one.stdout
    assert f"engine fast, {world} processes]" in many.stderr
    text = ("eval-ppl", "--max-windows", 20, "--model", embedded3, "--json")
    for count in (1, world):
        result = lutq_on(count, *text, f"{count}.json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, many = (json.loads((tmp_path / f"{count}.json").read_text())[0]["perplexity"] for count in (1, world))
    assert abs(many / one - 1) < 1e-3, f"{world=} {one=} {many=}"


@pytest.mark.parametrize("world", [several(2), several(4)])
def test_bench(tmp_path, world):
    options = ("--synthetic", "--shape", "opt-1.3b", "--context", 256, "--replays", 100, "--json", "bench.json")
    result = lutq_on(world, "bench", "decode", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (record,) = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert record["gpus"] == world
    assert 0 < record["kinds_ms"]["communication"] < record["ms"] * 2, record


def children(pid):
    """Processes of lutq that a process has started, in the order of their ids."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"lutq" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return sorted(found)


# what runs for long enough, what it prints by then, and seconds until its processes wait for each other inside GPUs
LONG = {
    "prompts": (("eval-ppl",), "token/s", 0),
    "steps": (("bench", "decode", "--synthetic", "--shape", "opt-1.3b", "--replays", "100000"), "elementwise", 20),
}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=str)
@pytest.mark.parametrize("world", [several(2)])
@pytest.mark.parametrize("work", LONG)
def test_processes_end_together(embedded3, tmp_path, work, world, number):
    arguments, printed, more = LONG[work]
    command = [*TORCHRUN, "--nproc-per-node", str(world), "-m", "lutq", *arguments]
    command += ["--model", str(embedded3)] if work == "prompts" else []
    with (tmp_path / "err").open("w") as err, (tmp_path / "out").open("w") as out:
        job = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=err, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    until = time.monotonic() + 120
    while printed not in (tmp_path / "err").read_text() + (tmp_path / "out").read_text():
        assert time.monotonic() < until, (tmp_path / "err").read_text()
        assert job.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.1)
    time.sleep(more)
    assert job.poll() is None, (tmp_path / "err").read_text()
    ranks = children(job.pid)
    assert len(ranks) == world, ranks
    begin = time.monotonic()
    if number == signal.SIGKILL:
        os.kill(ranks[-1], number)
    else:
        job.send_signal(number)
    assert job.wait(60) != 0
    assert time.monotonic() - begin < 10, "it took too long"
    assert (tmp_path / "err").read_text().count("lutq: ") == 1, (tmp_path / "err").read_text()
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
