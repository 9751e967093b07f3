"""A model over several ranks computes what one process does, and its processes end together.

Ranks are threads where only numbers matter, and processes with gloo where processes do. tests/gpu/test_ranks.py has the GPUs.
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engines import continue_text
from ranks import LLAMA, MODELS, Checkpoints, Threads, free_port, on_processes, stepped

from lutq.config import LayerConfig
from lutq.decode import measure, reference
from lutq.decode.bench import block_bytes, needed_bytes
from lutq.decode.choose import make
from lutq.decode.engine import Engine
from lutq.decode.shape import shape_of
from lutq.decode.synthetic import synthetic_model
from lutq.decode.weights import weights_of
from lutq.errors import LutqError
from lutq.generate import Sampling
from lutq.hf import load
from lutq.linear import LutLinear
from lutq.pack import dequantize
from lutq.parallel import inboxes
from lutq.parallel import load as loader
from lutq.parallel.load import load_part
from lutq.parallel.ranks import ALONE, Ranks, join, side_by_side
from lutq.parallel.score import Scorer
from lutq.parallel.split import Part, check_split, part_layer, part_of, share
from lutq.parallel.watch import Watch

CPU = torch.device("cpu")
CASES = [(name, how, world) for name in MODELS for how in ("plain", "bcq") for world in (2, 4)]
CASES += [("llama", "rows", 4), ("llama-tied", "rtn", 4), ("llama", "eight", 2), ("llama", "eight", 4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(name, how)`: directory of a tiny model, quantized as QUANTIZED says."""
    return Checkpoints(tmp_path_factory.mktemp("parallel"))


def ids_of(count, batch=1, seed=0):
    return torch.randint(3, 1024, (batch, count), generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def engine_of(model, ranks=ALONE, batch=1):
    return Engine(weights_of(model, ranks.world), 64, batch, reference, None, ranks)


def decoded(engine, ids, count):
    """Logits after the prompt, and greedy tokens."""
    found = []
    engine.prompt(ids)
    logits = engine.logits.clone()
    continue_text(engine, ids, count, (), found.append)
    return logits, found


@pytest.mark.parametrize(("name", "how", "world"), CASES)
def test_ranks_compute_what_one_process_does(checkpoint, name, how, world):
    path, ids = checkpoint(name, how), ids_of(11)
    with torch.inference_mode():
        model = load(path, device="cpu", dtype="float32")
        logits, tokens = decoded(engine_of(model), ids, 20)

    def run(ranks):
        part = load_part(path, ranks, CPU, torch.float32)
        return *decoded(engine_of(part, ranks), ids, 20), torch.stack(list(Scorer(part, 11)(ids)))

    expected = model(ids).logits.detach()
    for rank, (found, made, scored) in enumerate(Threads(world).run(run)):
        error = relative(found, logits)
        assert error < 1e-5, f"{name=} {how=} {world=} {rank=} {error=:.1e}"
        assert made == tokens, f"{name=} {how=} {world=} {rank=}"
        error = relative(scored, expected)
        assert error < 1e-5, f"windows: {name=} {how=} {world=} {rank=} {error=:.1e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_differs_by_its_rounding(checkpoint, dtype):
    path, ids = checkpoint("llama", "bcq"), ids_of(11)
    with torch.inference_mode():
        exact = decoded(engine_of(load(path, device="cpu", dtype="float32")), ids, 1)[0]
        alone = decoded(engine_of(load(path, device="cpu", dtype=dtype)), ids, 1)[0]

    def run(ranks):
        return decoded(engine_of(load_part(path, ranks, CPU, dtype), ranks), ids, 1)[0]

    ranks = Threads(4).run(run)
    assert all(torch.equal(ranks[0], other) for other in ranks[1:]), f"{dtype=}: ranks differ"
    one, four = (relative(found.float(), exact) for found in (alone, ranks[0]))
    assert four < 2 * one + 1e-6, f"{dtype=} {one=:.1e} {four=:.1e}"


def test_ranks_have_the_same_logits_for_several_sequences(checkpoint):
    path, ids, given = checkpoint("llama-tied", "bcq"), ids_of(11, 3), ids_of(5, seed=1)[0]
    with torch.inference_mode():
        expected = stepped(engine_of(load(path, device="cpu"), batch=3), ids, given)

    def run(ranks):
        return stepped(engine_of(load_part(path, ranks, CPU, torch.float32), ranks, batch=3), ids, given)

    found = Threads(4).run(run)
    error = relative(found[0], expected)
    assert error < 1e-5, f"{error=:.1e}"
    assert all(torch.equal(found[0], other) for other in found[1:])


def continued(ranks, path, ids, given):
    """Logits after a prompt and given tokens; tokens after the prompt, chosen, and drawn with a seed of the rank's own."""
    model, tokens, drawn = load(path, device="cpu", dtype="float32"), [], []
    greedy = make("fast", model, 64, Sampling(temperature=0.0))
    logits = stepped(greedy, ids, given)
    continue_text(greedy, ids, 20, (), tokens.append)
    torch.manual_seed(ranks.rank)
    continue_text(make("fast", model, 64, Sampling(repetition_penalty=1.1)), ids, 20, (), drawn.append)
    return logits, tokens, drawn


@pytest.mark.parametrize(("name", "how", "world"), [("opt", "plain", 2), ("llama", "bcq", 4), ("llama-tied", "rtn", 2)])
def test_processes_compute_what_one_does(checkpoint, tmp_path, name, how, world):
    """Rank 0 draws the tokens: the others have other seeds."""
    arguments = checkpoint(name, how), ids_of(11), ids_of(5, seed=1)[0]
    with torch.inference_mode():
        logits, tokens, drawn = continued(ALONE, *arguments)
    assert tokens != drawn
    found = on_processes(world, "cpu", tmp_path, continued, *arguments)
    for rank, (same, chosen, random) in enumerate(found):
        error = relative(same, logits)
        assert error < 1e-5, f"{name=} {how=} {world=} {rank=} {error=:.1e}"
        assert torch.equal(same, found[0][0]), f"{name=} {how=} {world=} {rank=}"
        assert (chosen, random) == (tokens, drawn), f"{name=} {how=} {world=} {rank=}"


# Parts


def test_kv_heads_are_shared_where_there_are_too_few():
    from transformers import AutoConfig

    shape = shape_of(AutoConfig.for_model("llama", **LLAMA), world=4)
    assert (shape.own_heads, shape.own_kv_heads, shape.own_inner) == (2, 1, 96)
    found = [part_of("model.layers.0.self_attn.k_proj", 32, 128, shape, rank).rows for rank in range(4)]
    assert found == [(0, 16), (0, 16), (16, 32), (16, 32)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("vocabulary", "world"), [(4096, 4), (4098, 4), (4099, 2), (50257, 8), (10, 7), (5, 4), (1, 2)])
def test_shares_of_the_vocabulary_are_gathered(vocabulary, world, dtype):
    from transformers import AutoConfig

    shape = dataclasses.replace(shape_of(AutoConfig.for_model("llama", **LLAMA | {"vocab_size": vocabulary})), world=world)
    whole = torch.randn(3, vocabulary, dtype=dtype)
    shares = [share(shape, rank) for rank in range(world)]
    assert {count for _, count in shares} == {-(-vocabulary // world)}
    assert all(0 <= begin <= begin + count <= vocabulary for begin, count in shares), shares
    begin, count = shares[-1]
    assert part_of("lm_head", vocabulary, 128, shape, world - 1) == Part((begin, begin + count), (0, 128))
    assert part_of("model.embed_tokens", vocabulary, 128, shape, 1) == Part((0, vocabulary), (0, 128))
    found = torch.full_like(whole, torch.nan)
    side_by_side(torch.stack([whole[:, begin : begin + count] for begin, count in shares]), found)
    assert torch.equal(found, whole), f"{vocabulary=} {world=}"


@pytest.mark.parametrize(
    ("fields", "world", "packed", "message"),
    [
        ({}, 3, False, "8 heads cannot be shared by 3 processes: use torchrun --nproc-per-node 1, 2, 4 or 8"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}, 3, False, "2 kv heads .* 1, 2 or 6$"),
        ({}, 8, True, "128 inputs from heads cannot be cut for 8 .* words of 32 codes: use torchrun --nproc-per-node 1, 2 or 4$"),
        ({"intermediate_size": 172}, 2, True, "172 inner features cannot be cut for 2 processes .* --nproc-per-node 1$"),
    ],
)
def test_numbers_of_processes_that_would_do_are_named(fields, world, packed, message):
    from transformers import AutoConfig

    with pytest.raises(LutqError, match=message):
        check_split(shape_of(AutoConfig.for_model("llama", **LLAMA | fields)), world, packed)


@pytest.mark.parametrize("rank", [0, 1])
def test_too_few_gpus_are_an_error_of_every_rank(monkeypatch, rank):
    """One that fails alone is silent, and the others would wait for it."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LutqError, match=r"^2 processes take 2 GPUs and this host has 1: torchrun --nproc-per-node 1$"):
        join("auto")


def test_what_several_processes_cannot_share(tiny):
    with pytest.raises(LutqError, match=r"several processes cannot share this model: the model normalizes after .*; use one"):
        load_part(tiny("opt-postnorm"), Ranks(0, 2), CPU, torch.float32)


@pytest.mark.parametrize("how", ["bcq", "eight"])
def test_parts_are_the_columns_of_the_whole(checkpoint, how):
    path, name = checkpoint("llama", how), "model.layers.1.mlp.down_proj"
    whole = load(path, device="cpu").get_submodule(name).dequantize()
    for rank in range(4):
        module = load_part(path, Ranks(rank, 4), CPU, torch.float32).get_submodule(name)
        assert isinstance(module, LutLinear)
        assert module.layer.group == 32, "96 inputs of a group of 64 have 32 in common"
        assert torch.equal(module.dequantize(), whole[:, 96 * rank : 96 * (rank + 1)]), f"{rank=}"
        assert (module.bias is None) == (rank > 0), "the bias is added once"


@pytest.mark.parametrize("layer", [LayerConfig(2, 128), LayerConfig(3, 96), LayerConfig(1, 0), LayerConfig(4, 64, "uniform")])
@pytest.mark.parametrize("columns", [(0, 192), (192, 384), (288, 384), (32, 64), (0, 384)])
def test_cut_groups(layer, columns):
    from conftest import random_packed

    N, K = 5, 384
    packed, part = random_packed(N, K, layer), Part((1, 4), columns)
    own = part_layer(layer, part, K)
    cut = {}
    for field, tensor in packed._asdict().items():
        if tensor is not None:
            cut[field] = tensor[loader.packed_index(part, field, layer, K)]
            if field != "codes":
                cut[field] = loader.regroup(cut[field], part, layer.group, own.group)
    names = ("codes", "scales", "offsets", "zero_points")
    found = dequantize(*(cut.get(field) for field in names), own.group, own.grid, part.inputs)
    expected = dequantize(*packed, layer.group, layer.grid, K)[1:4, slice(*columns)]
    assert torch.equal(found, expected), f"{layer=} {columns=}"


@pytest.mark.parametrize(("name", "how"), [("llama-tied", "plain"), ("llama-tied", "bcq"), ("llama", "plain")])
def test_no_rank_reads_a_whole_tensor_that_is_split(checkpoint, monkeypatch, name, how):
    path, read, original = checkpoint(name, how), {}, loader.read_part

    def counting(file, key, index):
        tensor = original(file, key, index)
        read[key] = read.get(key, 0) + tensor.nbytes
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{key} keeps more than its part"
        return tensor

    monkeypatch.setattr(loader, "read_part", counting)
    sizes = {}
    for rank in range(2):
        read.clear()
        model = load_part(path, Ranks(rank, 2), CPU, torch.float32)
        sizes[rank] = dict(read)
        head, table = model.lm_head.weight, model.get_input_embeddings().weight
        first = share(shape_of(model.config, 2), rank)[0]
        tied = head.data_ptr() == table[first].data_ptr()
        assert tied == (name == "llama-tied"), "a tied head is a view of the embedding"
    whole = {key: spec.nbytes for key, spec in loader.tensor_specs(path / "model.safetensors").items()}
    for key, count in whole.items():
        if count and re.search(r"_proj\.(weight|codes|scales|offsets)$|lm_head", key):
            assert sizes[0][key] == sizes[1][key] == count / 2, key
    assert ("lm_head.weight" in sizes[0]) == (name == "llama"), "a tied head is read twice"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_random_parts_have_the_sizes_of_parts(checkpoint, name, world):
    path, layer = checkpoint(name, "bcq"), LayerConfig(3, 64)
    config = load(path, device="cpu").config
    for rank in range(world):
        expected = load_part(path, Ranks(rank, world), CPU, torch.float32)
        found = synthetic_model(config, layer, CPU, torch.float32, Ranks(rank, world))
        for path_to, module in expected.named_modules():
            if isinstance(module, LutLinear):
                other = found.get_submodule(path_to)
                sizes = [(m.in_features, m.out_features, m.layer, m.bias is None) for m in (module, other)]
                assert sizes[0] == sizes[1], f"{path_to} {rank=}"
        weights = weights_of(found, world)
        table, head = found.get_input_embeddings().weight, found.lm_head.weight
        assert head.shape == expected.lm_head.weight.shape == (weights.shape.own_vocabulary, 128), f"{rank=}"
        assert weights.head.nbytes == head.nbytes, "what a step reads of the head is the rank's part"
        kept = table.untyped_storage().nbytes() + (0 if name == "llama-tied" else head.untyped_storage().nbytes())
        tied = head.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
        assert tied == (name == "llama-tied")
        more = (weights.shape.layers + 1) * block_bytes(weights.shape, layer)
        assert needed_bytes(weights.shape, tied, layer, 1, 0) == more + kept // 2, "fp16"
        blocks = weights.shape.layers * block_bytes(weights.shape, layer._replace(offsets=True))
        biases = sum(m.bias.nbytes for m in found.modules() if isinstance(m, LutLinear) and m.bias is not None)
        assert abs(weights.nbytes - weights.head.nbytes - biases - blocks) <= 0.1 * blocks, "smaller groups, more scales"


def test_communication_is_a_kind_of_work_of_its_own(checkpoint, monkeypatch):
    calls, kind = [], []
    engine = engine_of(load(checkpoint("opt", "plain"), device="cpu"))

    class Counting:
        def __getattr__(self, name):
            return lambda *tensors: calls.append(name)

    def once(step, count):
        calls.clear()
        step()
        kind.append(list(calls))
        return measure.StepTime(1.0 + len(calls), 1.0)

    monkeypatch.setattr(measure, "time_steps", once)
    monkeypatch.setattr(measure, "current", lambda: Ranks(0, 2))
    engine.ranks = ranks = Counting()
    with torch.inference_mode():
        found = measure.time_kinds(engine, 100)
    assert found == dict.fromkeys(measure.KINDS, 1.0) | {"communication": 5.0}, "beyond the elementwise kernels"
    assert kind == [[], [], [], [], ["sum"] * 4 + ["gather"]], "greedy tokens are the same everywhere"
    assert engine.ranks is ranks


# Processes


class Driver:
    """In the compiled library's place: the handle of a rank's memory is its rank + 1, its address a thousand times that."""

    def __init__(self, rank, refuses):
        self.number, self.refuses = rank + 1, refuses

    def lutq_inbox_make(self, size, memory, handle):
        ctypes.memset(handle.value, self.number, inboxes.HANDLE)
        memory._obj.value = 1000 * self.number
        return 1 if size.value % (2 << 20) else 0

    def lutq_inbox_open(self, handle, memory):
        found = set(ctypes.string_at(handle.value, inboxes.HANDLE))
        assert len(found) == 1, found
        memory._obj.value = 1000 * found.pop()
        return 1 if self.refuses else 0


def connected(ranks, refusing):
    """Addresses of all inboxes, or None, as a rank of whom some may not open others; what it says."""
    inboxes.kernels = lambda device: Driver(ranks.rank, ranks.rank in refusing)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found = inboxes.connect(ranks, CPU, 1 << 18)
        assert inboxes.connect(ranks, CPU, 1 << 18) is found, "one for all engines"
    return found and (found.addresses, found.rank), said.getvalue()


@pytest.mark.parametrize("refusing", [(), (2,)], ids=str)
def test_ranks_have_inboxes_all_or_none(tmp_path, refusing):
    (first, said), *others = on_processes(3, "cpu", tmp_path, connected, refusing)
    if refusing:
        assert [first, *(found for found, _ in others)] == [None] * 3, "one that cannot write is enough"
        assert said == "lutq: the 3 GPUs cannot all write to each other's memory: NCCL sums over them, which takes longer\n"
    else:
        assert [first, *(found for found, _ in others)] == [([1000, 2000, 3000], rank) for rank in range(3)]
        assert said == ""
    assert [words for _, words in others] == ["", ""], "rank 0 says it"


@pytest.fixture
def start_ranks(start_lutq):
    """`start_ranks(world, *args)`: the command in as many processes as torchrun would start, with its environment."""

    def start(world, *args, **options):
        common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
        variables = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
        return [start_lutq(*args, env={k: str(v) for k, v in own.items()}, **options) for own in variables]

    return start


def wait_for(process, name, text, seconds=60):
    """Until a stream of a process contains a text."""
    until = time.monotonic() + seconds
    while text not in Path(process.files[name]).read_text(encoding="utf-8"):
        assert time.monotonic() < until, Path(process.files["stderr"]).read_text(encoding="utf-8")
        time.sleep(0.02)


GREEDY = ("--temperature", 0, "--device", "cpu", "--max-new-tokens", 30)
PROMPT = "The old man walked"


@pytest.mark.parametrize(("name", "how", "world"), [("opt", "bcq", 2), ("llama", "plain", 2), ("llama", "bcq", 4)])
def test_generate_prints_the_same_text_once(checkpoint, lutq_command, start_ranks, name, how, world):
    arguments = ("generate", PROMPT, "--model", checkpoint(name, how), *GREEDY)
    alone = lutq_command(*arguments)
    found = [process.wait() for process in start_ranks(world, *arguments)]
    assert [result.returncode for result in found] == [0] * world, found[0].stderr
    assert found[0].stdout == alone.stdout, f"{name=} {how=} {world=}"
    assert f"engine fast, {world} processes]" in found[0].stderr
    assert all(result.stdout == "" for result in found[1:])
    assert all("lutq" not in result.stderr for result in found[1:]), found[1].stderr


def test_sampled_text_and_standard_input(checkpoint, lutq_command, start_ranks):
    arguments = ("generate", "--model", checkpoint("llama", "bcq"), "--seed", 3, "--max-new-tokens", 30)
    arguments += ("--device", "cpu", "--engine", "fast")
    alone = lutq_command(*arguments, stdin=PROMPT)
    found = [process.wait() for process in start_ranks(2, *arguments, stdin=PROMPT)]
    assert [result.returncode for result in found] == [0, 0], found[0].stderr
    assert found[0].stdout == alone.stdout


def test_perplexity_is_that_of_one_process(checkpoint, lutq_command, start_ranks, tmp_path):
    words = [str(number) for number in range(3000)]
    (tmp_path / "numbers.txt").write_text(" ".join(words))
    arguments = ("eval-ppl", "numbers.txt", "--device", "cpu", "--max-windows", 5, "--model", checkpoint("llama", "bcq"))
    arguments += ("--baseline", checkpoint("llama", "plain"))
    assert lutq_command(*arguments, "--json", "one.json").returncode == 0
    found = [process.wait() for process in start_ranks(2, *arguments, "--json", "two.json")]
    assert [result.returncode for result in found] == [0, 0], found[0].stderr
    assert found[0].stdout.count("perplexity") == 2
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for a, b in zip(one, two, strict=True):
        assert abs(a["perplexity"] / b["perplexity"] - 1) < 1e-5, f"{a['perplexity']} {b['perplexity']}"
        assert a["windows"] == b["windows"] == 5
        assert b["device"] == f"2 x {a['device']}"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all(checkpoint, start_ranks, tmp_path, victim):
    (tmp_path / "long.txt").write_text("It was a dark and stormy night. " * 15_000)
    processes = start_ranks(2, "eval-ppl", "long.txt", "--device", "cpu", "--model", checkpoint("opt", "plain"))
    wait_for(processes[0], "stderr", "token/s")
    begin = time.monotonic()
    processes[victim].signal(signal.SIGKILL)
    found = [process.wait() for process in processes]
    assert time.monotonic() - begin < 5, "it took too long"
    assert found[victim].returncode == -signal.SIGKILL
    assert found[1 - victim].returncode == 2, found[1 - victim].stderr
    said = found[1 - victim].stderr
    assert said.count("lutq:") == 1, said
    assert f"lutq: process {victim} of 2 ended without a word" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("second", "words"), [(0, "process 0 of 2 ended"), (None, "torchrun has ended")])
def test_a_store_that_ends_between_two_looks(second, words):
    """As when rank 0 is killed just after it was looked for: rank 1 has to say so."""

    class Ended:
        def check(self, keys):
            raise RuntimeError("Connection was likely closed")

    watch, looks = object.__new__(Watch), iter([None, second])
    watch.ranks, watch.speaker, watch.store, watch.ended = Ranks(1, 2), 0, Ended(), lambda milliseconds: next(looks)
    assert words in watch.reason(0.1)
    assert watch.speaker == (1 if second == 0 else 0)


@pytest.mark.parametrize("whom", [(0, 1), (1,)])
def test_interrupt_ends_all(checkpoint, start_ranks, tmp_path, whom):
    (tmp_path / "long.txt").write_text("It was a dark and stormy night. " * 15_000)
    processes = start_ranks(2, "eval-ppl", "long.txt", "--device", "cpu", "--model", checkpoint("opt", "plain"))
    wait_for(processes[0], "stderr", "token/s")
    begin = time.monotonic()
    for rank in whom:
        processes[rank].signal(signal.SIGINT)
    found = [process.wait() for process in processes]
    assert time.monotonic() - begin < 5, "it took too long"
    assert [result.returncode for result in found] == [130, 130], found[0].stderr
    assert found[0].stderr.count("lutq: interrupted") == 1, found[0].stderr
    assert "Traceback" not in found[0].stderr


def test_an_error_of_one_process_is_said_by_rank_0(checkpoint, start_ranks, tmp_path):
    arguments = ("generate", PROMPT, "--device", "cpu", "--engine", "graph", "--model", checkpoint("opt", "plain"))
    found = [process.wait() for process in start_ranks(2, *arguments)]
    assert [result.returncode for result in found] == [2, 2]
    assert found[0].stderr.strip().startswith("lutq: several processes share the fast engine's model: leave out --engine graph")
    assert found[0].stderr.count("lutq:") == 1
    assert found[1].stderr == ""


def test_verbs_of_one_process_say_so(start_ranks):
    found = [process.wait() for process in start_ranks(2, "info", "opt-tiny")]
    assert [result.returncode for result in found] == [2, 2]
    assert found[0].stderr == "lutq: torchrun runs lutq generate, eval-ppl and bench decode: start the others without it\n"
    assert found[1].stderr == ""


def test_torchrun(checkpoint, lutq_command, tmp_path):
    arguments = ["generate", PROMPT, "--model", str(checkpoint("opt", "bcq")), *map(str, GREEDY)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lutq"]
    found = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout == lutq_command(*arguments).stdout
