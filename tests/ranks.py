"""For tests of lutq/parallel: models that four ranks can share, and ranks that are threads, or processes."""

import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import torch
from conftest import COMMON, copy_tokenizer

from lutq.config import QuantConfig
from lutq.parallel.ranks import Ranks, join, side_by_side
from lutq.quantize import quantize_checkpoint

SMALL = COMMON | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
LLAMA = SMALL | {"intermediate_size": 384, "num_key_value_heads": 2, "initializer_range": 0.1, "tie_word_embeddings": False}
LLAMA |= {"vocab_size": 4098}  # shares of two ranks are equal, of four they overlap
MODELS = {
    "opt": ("opt", SMALL | {"ffn_dim": 256, "word_embed_proj_dim": 128, "init_std": 0.1}),
    "llama": ("llama", LLAMA | {"mlp_bias": True, "attention_bias": True}),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4, "vocab_size": 4099}),
}
# name -> settings of `lutq quantize`; at 384 / 4 = 96 inputs groups of 64 and 128 are cut
QUANTIZED = {
    "plain": None,
    "bcq": QuantConfig(bits=3, group=64, iterations=2),
    "eight": QuantConfig(bits=3, group=64, iterations=2, scale_bits=8),
    "rows": QuantConfig(bits=3, group=0, offsets=False, iterations=2),
    "rtn": QuantConfig(bits=4, group=128, method="rtn", head_bits=4),
}


class Checkpoints:
    """`checkpoints(name, how)`: directory of a random fp32 model in `folder`, quantized as QUANTIZED says; made once."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, name, how):
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = self.folder / f"{name}-{how}"
        if folder.exists():
            return folder
        if how != "plain":
            quantize_checkpoint(str(self(name, "plain")), folder, QUANTIZED[how], device="cpu", dtype="float32")
            return folder
        kind, fields = MODELS[name]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # a lost bias or norm shows
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        copy_tokenizer(folder)
        return folder


class Threads:
    """Ranks of lutq/parallel as threads of this process, for tests of numbers: sums are those of `sum`, on any device.

    They have one generator of random numbers, so tokens are not drawn.
    """

    def __init__(self, world):
        self.world, self.barrier, self.given = world, threading.Barrier(world), [None] * world

    def rank(self, rank):
        shared = self

        class Local(Ranks):
            def sum(self, y):
                parts = shared.exchange(rank, y.clone())
                y.copy_(sum(parts[1:], parts[0]))

            def gather(self, part, whole):
                side_by_side(torch.stack(shared.exchange(rank, part.clone())), whole)

        return Local(rank, self.world)

    def exchange(self, rank, value):
        self.given[rank] = value
        self.barrier.wait(60)
        found = list(self.given)
        self.barrier.wait(60)
        return found

    def run(self, function):
        """function(ranks) on every rank; the results."""

        def call(rank):
            try:
                with torch.inference_mode():
                    return function(self.rank(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(call, range(self.world)))


def stepped(engine, ids, given):
    """Logits after prompts [batch, T], and after each of the given tokens, which all sequences read."""
    logits = []
    engine.prompt(ids)
    for token in given:
        logits.append(engine.logits.clone())
        engine.token.fill_(token)
        engine.advance()
    return torch.cat([*logits, engine.logits])


def free_port():
    """Of this host, for torch's store."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def as_rank(rank, device, variables, function, out, arguments):
    """What a process of `on_processes` runs. It ends as those of lutq do (lutq/parallel/job.py)."""
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        ranks = join(device)
        with torch.inference_mode():
            torch.save(function(ranks, *arguments), out)
        ranks.least(0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def on_processes(world, device, folder, function, *arguments):
    """function(ranks, *arguments), of the top of a module, in processes on `cpu` or `cuda`; its results, kept in `folder`."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["lutq.quantize", "lutq.hf", "transformers.models.opt.modeling_opt"])
    variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outs = [folder / f"of-rank-{rank}" for rank in range(world)]
    started = [
        processes.Process(target=as_rank, args=(rank, device, variables, function, outs[rank], arguments))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    until = time.monotonic() + 120
    while any(process.exitcode is None for process in started) and not any(process.exitcode for process in started):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    assert codes == [0] * world, f"exit codes {codes}"
    return [torch.load(out) for out in outs]
