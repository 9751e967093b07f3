"""What stands in for the compiled CUDA library on a CPU: functions that read and write through the same pointers."""

import contextlib
import ctypes
from types import SimpleNamespace

import torch

import lutq.cuda
from lutq.paths import shipped


def at(address, dtype, rows, columns, stride=None):
    """A matrix over memory, as a kernel would see it; None at no address."""
    if not address:
        return None
    stride = columns if stride is None else stride
    count = (rows - 1) * stride + columns
    flat = torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)
    return flat.as_strided((rows, columns), (stride, 1))


def install(monkeypatch, library):
    """`library` in the place of the compiled one."""
    monkeypatch.setattr(lutq.cuda, "kernels", lambda device: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: SimpleNamespace(cuda_stream=0))


def fields_in_source(file, name):
    """Names of a struct's fields in a CUDA source, in order."""
    text = (shipped("kernels") / file).read_text().split(f"struct {name} {{")[1].split("};")[0]
    code = "".join(line.split("//")[0] for line in text.splitlines())
    return [field.strip(" *").split()[-1].strip("*") for part in code.split(";") for field in part.split(",") if field.strip()]
