"""What `lutq doctor` says of several machines, each made of the answers its parts would give."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import CPU_BACKEND
from typer.testing import CliRunner

import lutq.doctor
import lutq.ops
from lutq.build import BUNDLED, build
from lutq.cli import app
from lutq.compiler import Compiler
from lutq.doctor import Gpu, diagnose, try_kernels

NVCC = Compiler(Path("/opt/cuda/bin/nvcc"), (13, 0), "release 13.0")
H200 = Gpu(0, "NVIDIA H200", (9, 0), 150_000_000_000)
LABELS = ["lutq", "python", "torch", "transformers", "GPU", "driver", "compiler", "C++ compiler", "bundled", "cache"]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(**parts)`: a machine with GPU, driver, compilers and a library that runs, except where `parts` says otherwise."""
    monkeypatch.setenv("LUTQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "library.cu").write_text('extern "C" const char* lutq_source_hash() { return LUTQ_SOURCE_HASH; }\n')
    monkeypatch.setattr(lutq.doctor, "shipped", lambda folder: tmp_path / folder)

    def assemble(
        compiler=NVCC,
        host="/usr/bin/g++",
        gpus=(H200,),
        unusable=(),
        driver=(13, 0),
        library=(Path("/cache/lutq_cuda-0.so"), "compiled earlier into /cache"),
        error=None,
        cuda="13.0",
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        answers = {
            "find_compiler": compiler,
            "host_compiler": host,
            "gpus": list(gpus),
            "unusable_gpus": list(unusable),
            "driver_cuda": driver,
            "library_path": library,
            "try_kernels": error,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(lutq.doctor, name, lambda *_, answer=answer: answer)
        lines, healthy = diagnose()
        assert all(line == line.strip() and "\n" not in line for line in lines), f"{lines}"
        return "\n".join(lines), healthy

    return assemble


NOT_YET = (None, "the kernels are not compiled for sm_90 yet")
NO_GPU = {"gpus": (), "driver": None, "cuda": None}
MACHINES = {
    # name: (parts, healthy, what the report says, what it does not)
    "all there": (
        {},
        True,
        [
            "GPU 0         NVIDIA H200, compute capability 9.0, 150.00 GB",
            "driver        for CUDA 13.0 and older",
            "compiler      nvcc 13.0 (/opt/cuda/bin/nvcc)",
            "runs on 0     cuda kernels: compiled earlier into /cache; one product agrees with the reference",
            "to do         nothing",
        ],
        ["pip install"],
    ),
    "library, no compiler": (
        {"compiler": None},
        True,
        ["runs on 0     cuda kernels", "to do         nothing"],
        ["pip"],
    ),
    "not compiled yet": (
        {"library": NOT_YET},
        True,
        ["runs on 0     cuda kernels: they will be compiled at first use, or now by `lutq build`", "to do         nothing"],
        [],
    ),
    "no compiler": (
        {"library": NOT_YET, "compiler": None},
        False,
        [
            "runs on 0     reference: the kernels are not compiled for sm_90 yet, and there is no compiler",
            "compiler      no nvcc found",
            "to do         pip install 'lutq[nvcc]'",
        ],
        ["to do         nothing"],
    ),
    "library, no g++": (
        {"compiler": None, "host": None},
        True,
        ["runs on 0     cuda kernels", "runs on CPU   reference", "apt install g++"],
        ["pip"],
    ),
    "no g++": (
        {"library": NOT_YET, "host": None},
        False,
        [
            "C++ compiler  none found",
            "reference: the kernels are not compiled for sm_90 yet, and there is no C++ compiler",
            "apt install g++",
        ],
        ["pip install"],
    ),
    "old driver": (
        {"library": NOT_YET, "driver": (12, 8)},
        False,
        [
            "driver        for CUDA 12.8",
            "too old for what nvcc 13.0",
            "update the NVIDIA driver, or compile with CUDA 12: CUDA_HOME",
        ],
        [],
    ),
    "kernels fail": (
        {"error": "CUDA error: an illegal instruction"},
        False,
        ["only: the CUDA library compiled earlier into /cache, but it fails: CUDA error: an illegal instruction"],
        ["to do         nothing"],
    ),
    "old GPU": (
        {"gpus": (Gpu(0, "Tesla T4", (7, 5), 15_000_000_000),), "library": (None, "its compute capability is 7.5")},
        False,
        ["runs on 0     reference: its compute capability is 7.5", "to do         use a GPU of the Ampere generation"],
        ["pip install"],
    ),
    "two GPUs": (
        {"gpus": (H200, Gpu(1, "RTX 4090", (8, 9), 24_000_000_000)), "library": NOT_YET, "compiler": None},
        False,
        ["GPU 1         RTX 4090, compute capability 8.9", "runs on 0     reference", "runs on 1     reference"],
        [],
    ),
    "no GPU": (
        {**NO_GPU, "compiler": None, "library": NOT_YET},
        True,
        ["a CPU build", "GPU           none that torch can see", "runs on CPU   cpu kernel: it will", "to do         nothing"],
        ["runs on 0", "driver", "pip install"],
    ),
    "GPU and torch for the CPU": (
        {**NO_GPU, "unusable": ("NVIDIA H200",)},
        False,
        ["GPU           NVIDIA H200, which this torch cannot use", "install a CUDA build of torch: pip install", "runs on CPU"],
        ["to do         nothing"],
    ),
    "GPU and CUDA torch that does not see it": (
        {"gpus": (), "unusable": ("NVIDIA H200",), "driver": (12, 2)},
        False,
        ["which this torch cannot use", "to do         see why torch.cuda.is_available() is False"],
        ["CUDA build"],
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_words(machine, name):
    parts, expected, said, unsaid = MACHINES[name]
    text, healthy = machine(**parts)
    assert healthy == expected, f"{name=}\n{text}"
    for words in said:
        assert words in text, f"{name=} {words=}\n{text}"
    for words in unsaid:
        assert words not in text, f"{name=} {words=}\n{text}"


def test_every_line_has_its_label(machine):
    text, _ = machine()
    labels = [line[:13].strip() for line in text.splitlines()]
    assert labels == [*(label if label != "GPU" else "GPU 0" for label in LABELS), "runs on 0", "runs on CPU", "to do"], text


def test_same_remedy_once(machine):
    text, _ = machine(**MACHINES["two GPUs"][0])
    assert text.count("to do") == 1, text


def test_hidden_gpus_are_no_fault(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert lutq.doctor.unusable_gpus() == []
    text, healthy = machine(gpus=())
    assert "none that torch can see, CUDA_VISIBLE_DEVICES hides all" in text
    assert healthy


def test_libraries(machine, monkeypatch, tmp_path):
    """Bundled: none, then valid, then stale, then damaged; cached likewise. A script stands in for nvcc."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    script = 'echo release 13.0; while [ $# -gt 0 ]; do case "$1" in -o) out=$2; shift ;; -D*) d=$1 ;; esac; shift; done'
    nvcc.write_text(f'#!/bin/sh\n{script}\n[ -z "$out" ] || echo "$d" > $out\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("lutq.compiler.host_compiler", lambda: "g++")
    sources, cache = tmp_path / "kernels", tmp_path / "cache"
    text, _ = machine()
    assert "bundled       none" in text
    assert f"cache         {cache}: nothing compiled from these sources" in text
    build(["sm_80", "sm_90"], out=sources, sources=sources)
    name = build(["sm_86"], sources=sources).path.name
    text, _ = machine()
    assert "bundled       valid, for sm_80 sm_90" in text
    assert f"cache         {cache}: {name} for sm_86" in text
    (sources / BUNDLED).write_text("cut")
    assert "bundled       damaged, for sm_80 sm_90" in machine()[0]
    (sources / "new.cuh").write_text("// other sources")
    text, _ = machine()
    assert "bundled       stale: made from other sources" in text
    assert f"cache         {cache}: nothing compiled from these sources" in text


def test_gpus_of_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA A100\n")
    smi.chmod(0o755)
    assert lutq.doctor.unusable_gpus() == ["NVIDIA H200", "NVIDIA A100"]
    smi.write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    assert lutq.doctor.unusable_gpus() == []


def products(error):
    """An operator whose `cuda` product is off by a relative error."""

    def linear(x, codes, scales, offsets, zero_points, bias, group, grid, backend):
        if isinstance(error, Exception):
            raise error
        expected = torch.ones(1, 256)
        return expected * (1 + error) if backend == "cuda" else expected

    return linear


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0.0, None),
        (0.001, None),
        (0.5, "a product differs from the reference by 50.0%"),
        (float("nan"), "a product differs from the reference by nan%"),
        (RuntimeError("CUDA error: no kernel image\nfor details see"), "CUDA error: no kernel image"),
    ],
)
def test_try_kernels(monkeypatch, error, words):
    monkeypatch.setattr(torch.ops.lutq, "linear", products(error))
    assert try_kernels("cpu") == words, f"{error=}"


@pytest.mark.parametrize(("healthy", "code"), [(True, 0), (False, 1)])
def test_exit_code(monkeypatch, healthy, code):
    monkeypatch.setattr(lutq.doctor, "diagnose", lambda: (["one", "two"], healthy))
    result = CliRunner().invoke(app, ["doctor"])
    assert (result.exit_code, result.stdout) == (code, "one\ntwo\n"), result.output


def test_this_machine(run_lutq):
    result = run_lutq("doctor", env={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"torch +{re.escape(torch.__version__)}, ", result.stdout), result.stdout
    assert f"runs on CPU   {CPU_BACKEND}" in result.stdout
