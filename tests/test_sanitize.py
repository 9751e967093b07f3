"""scripts/sanitize.py and sanitize.sh without a GPU: which cases they hand to the kernels, and what is left of their reports."""

import importlib
import itertools
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lutq.cuda
from lutq.decode import steps
from lutq.launch import Gpu

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sanitize(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("sanitize")
    del sys.modules["sanitize"]


class Entries:
    """In the library's place: gives the name of the entry point asked for."""

    def __getattr__(self, name):
        return name


@pytest.mark.parametrize("gpu", [Gpu("X", 132, 232448, True, True), Gpu("X", 132, 166912, False, False)])
def test_cases_of_one_row_are_what_the_kernels_take(sanitize, monkeypatch, gpu):
    """Those of the launches in bit_gemv.cuh and lut_gemv.cuh, with work for every block: y by one block and by two, in one pass
    and in two; and sums.
    """
    all_seen = []
    for module in (sanitize, lutq.cuda):
        monkeypatch.setattr(module, "properties", lambda device: gpu)
        monkeypatch.setattr(module, "kernels", lambda device: Entries())
    monkeypatch.setattr(lutq.cuda, "start", lambda entry, a, *how: all_seen.append((entry, a, *how)))
    assert sum(sanitize.one_row(torch.device("cpu"), bits) for bits in (1, 2, 3, 4)) == len(all_seen)
    if not gpu.clusters:
        assert not all_seen
        return
    by_bits = [(entry, a, fusion._obj, blocks) for entry, a, *how in all_seen if "bit_gemv" in entry for fusion, blocks in [how]]
    for entry, a, fusion, blocks in by_bits:
        about = {name: getattr(a, name) for name, _ in a._fields_} | {"blocks": blocks}
        assert entry == f"lutq_bit_gemv_{a.bits}bit", about
        assert (a.M, a.group % 128, a.x % 16) == (1, 0, 0), about
        assert 1 <= blocks <= -(-a.N // 16) // (1 + fusion.gated), about
        assert not fusion.weight or (a.K <= 16384 and a.x_dtype == 2 and fusion.dtype != 2), about
        assert not fusion.gated or a.N % 32 == 0, about
        assert not fusion.add or a.y_dtype == 2, about
    assert {(a.bits, a.grid) for _, a, *_ in by_bits} == set(itertools.product((1, 2, 3, 4), (0, 1)))
    alone = [(a.K > 16384, blocks) for _, a, fusion, blocks in by_bits if bytes(fusion) == bytes(lutq.cuda.ALONE)]
    assert set(alone) == set(itertools.product((False, True), (1, 2)))
    more = {(bool(f.weight), f.centered, bool(f.shift), f.function, f.gated, f.add) for _, _, f, _ in by_bits}
    assert more == {(False, 0, False, -1, 0, 0), (True, 0, False, 1, 1, 0), (True, 1, True, 0, 0, 0), (False, 0, False, -1, 0, 1)}
    seen = [(entry, a, how[0].value, *how[1:]) for entry, a, *how in all_seen if "lut_gemv" in entry]
    assert len(seen) + len(by_bits) == len(all_seen)
    for entry, a, partial, blocks, split in seen:
        about = {name: getattr(a, name) for name, _ in a._fields_} | {"blocks": blocks, "split": split}
        assert entry == f"lutq_lut_gemv_{a.bits}bit", about
        assert (a.M, a.group % 64, a.x % 16, blocks % split) == (1, 0, 0, 0), about
        assert split <= -(-a.K // 1024), about
        work = 2 * -(-a.N // 16) * (-(-a.K // 1024) if partial else 1)
        assert blocks // split <= work, about
        assert not (partial and split > 1), about
    assert {(bool(partial), split) for _, _, partial, _, split in seen} == {(False, 1), (False, 2), (True, 1)}
    assert {(a.bits, a.grid) for _, a, *_ in seen} == set(itertools.product((1, 2, 3, 4), (0, 1)))
    assert {a.group % 128 for _, a, *_ in seen} == {0, 64}


def allowed(y, M):
    """Whether the kernels of a step take a `Result`."""
    per_16 = 4 if y.slabs else 8
    return y.stride % per_16 == 0 and (y.data or 0) % 16 == (y.bias or 0) % 16 == 0 and (M == 1 or not y.slabs)


@pytest.mark.parametrize("clusters", [True, False])
def test_cases_of_decode_are_what_the_kernels_take(sanitize, monkeypatch, clusters):
    """The conditions of the entry points in kernels/decode.cu and attention.cu, and every kernel there."""
    seen = []
    monkeypatch.setattr(steps, "start", lambda entry, a: seen.append((entry, a)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    gpu = Gpu("X", 132, 232448, clusters, True)
    monkeypatch.setattr(steps, "properties", lambda device: gpu)
    monkeypatch.setattr(steps, "kernels", lambda device: Entries())
    found = sanitize.parts()
    assert sum(found[name](torch.device("cpu")) for name in ("small_kernels", "sums_over_ranks", "attention")) == len(seen)
    for entry, a in seen:
        about = {name: getattr(a, name) for name, _ in a._fields_}
        results = [y for y in about.values() if isinstance(y, steps.ResultArguments)]
        assert all(allowed(y, a.M) for y in results), about
        if entry in ("lutq_embedding", "lutq_norm"):
            assert a.K % 8 == 0, about
            assert a.K <= steps.MOST_HIDDEN, about
        if entry == "lutq_norm" and a.inboxes.world:
            assert a.inboxes.most >= a.M * a.K, about
            assert a.cluster == 1 or a.cluster * 2048 >= a.K, about
        elif entry == "lutq_norm" and a.y.slabs:
            assert a.cluster in (1, 2, 4, 8), about
            assert a.cluster * 2048 >= a.K, about
        elif entry == "lutq_norm":
            assert a.cluster == 1, about
        elif entry == "lutq_activation":
            assert a.F % 8 == 0, about
            assert not a.up.data or a.up.slabs == a.gate.slabs, about
        elif entry == "lutq_attention":
            assert a.D % 16 == 0, about
            assert a.q.slabs == a.k.slabs == a.v.slabs, about
            assert a.heads // a.kv_heads % a.rows == 0, about
            assert a.cluster in ((1, 2, 4, 8) if clusters else (1,)), about
            assert (a.partial is None) == (a.spread == 1), about
    launches = [a for entry, a in seen if entry == "lutq_attention"]
    assert {a.rows for a in launches} == {1, 2, 3, 4}
    assert {a.dtype for a in launches} == {a.ahead for a in launches} == {0, 1}
    assert {entry for entry, _ in seen} == {f"lutq_{name}" for name in ("embedding", "norm", "activation", "choice", "attention")}
    items = {-(-a.K // 8 // 512) for entry, a in seen if entry == "lutq_norm" and not a.y.slabs}
    assert items == {1, 2, 3, 4}, "vectors of a thread"
    for entry, read in (("lutq_norm", "y"), ("lutq_activation", "gate"), ("lutq_attention", "v")):
        found = {getattr(a, read).slabs for name, a in seen if name == entry}
        assert found == ({0, 1, 5, 13} if clusters else {0}), f"{entry} {found=}"
    assert {a.cluster for entry, a in seen if entry == "lutq_norm"} == ({1, 8} if clusters else {1})


TOOL = """#!/bin/sh
[ "$1" = --version ] && { echo Copyright; echo "Version 1"; exit; }
echo "========= COMPUTE-SANITIZER"
echo "========= of $2"
[ "$2" = slow ] && exec sleep 60
[ "$2" = broken ] && exit 7
for part in "$@"; do :; done
echo "$part: 24 cases"
"""

PRODUCTS = [f"{name}-{bits}" for bits in (1, 2, 3, 4) for name in ("products", "one_row")]
PARTS = ["columns", "fits", "small_kernels", "sums_over_ranks", "attention", *PRODUCTS]
REPORT = "".join(f"========= of {{tool}}\n{part}: 24 cases\n" for part in PARTS)


@pytest.fixture
def run(tmp_path):
    """`run(*args)` starts scripts/sanitize.sh over a tool that only says its name."""
    for name, text in (("compute-sanitizer", TOOL), ("nvidia-smi", '#!/bin/sh\necho "X, 1.2"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return lambda *args: subprocess.Popen(
        ["bash", ROOT / "scripts" / "sanitize.sh", *args],
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_reports_of_all_tools(run, tmp_path):
    out = tmp_path / "out.txt"
    printed = run(out).communicate(timeout=60)[0]
    text = out.read_text()
    assert printed == text
    assert text.splitlines()[1:3] == ["X, 1.2", "Version 1"]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert f"== {tool}\n{REPORT.format(tool=tool)}" in text
    assert [path.name for path in tmp_path.glob("out.txt*")] == ["out.txt"]


def test_tools_one_after_the_other(run, tmp_path):
    out = tmp_path / "out.txt"
    for tool in ("memcheck", "broken"):
        assert run(out, tool).wait(timeout=60) == 0
    text = out.read_text()
    assert text.count("X, 1.2\n") == 2
    assert f"== memcheck\n{REPORT.format(tool='memcheck')}" in text
    assert text.endswith("== broken\n" + len(PARTS) * "========= of broken\nexit code 7\n")


def test_parts_are_those_of_the_script(sanitize):
    assert sorted(sanitize.parts()) == sorted(PARTS)


def test_what_was_said_before_a_kill_is_kept(run, tmp_path):
    out = tmp_path / "out.txt"
    process = run(out, "slow", "memcheck")
    until = time.monotonic() + 60
    slow = tmp_path / "out.txt.slow.attention"
    while not (slow.exists() and slow.read_text() and "24 cases" in out.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, 9)
    process.wait(timeout=60)
    assert f"== memcheck\n{REPORT.format(tool='memcheck')}" in out.read_text()
    assert "========= of slow\n" in slow.read_text()
