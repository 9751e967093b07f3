"""Safetensors shards written tensor by tensor, so that memory holds one tensor and an interrupted run loses one.

All names, shapes and dtypes are known before the first weight is read, hence so is every shard's header and every
tensor's place. A shard is called `NAME.unfinished` until its last tensor is in it. Inside a shard wide dtypes come first,
which keeps every tensor aligned, as the safetensors library itself does it.
"""

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lutq.errors import LutqError

SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Spec(NamedTuple):
    """Shape and dtype of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardWriter:
    """Writes the tensors of `specs` (name -> Spec, in the order they will come) into shards of at most `limit` bytes.

    A tensor larger than `limit` gets a shard of its own. `written` are tensors that an earlier run has put in place.
    Raises FileNotFoundError when a shard with written tensors is gone, and LutqError when the disk is full; what was written
    stays usable.
    """

    def __init__(self, folder: Path, specs: dict[str, Spec], written: set[str], limit: int = SHARD_BYTES) -> None:
        self.folder, self.specs = folder, specs
        self.total_bytes = sum(spec.nbytes for spec in specs.values())
        shards: list[list[str]] = [[]]
        size = 0
        for name, spec in specs.items():
            if shards[-1] and size + spec.nbytes > limit:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += spec.nbytes
        count = len(shards)
        self.files = (
            ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        )
        self.shard_of = {name: number for number, names in enumerate(shards) for name in names}
        self._shards, self._waiting = shards, [set(names) - written for names in shards]
        self._place: dict[str, int] = {}
        self._headers = [self._layout(names) for names in shards]
        self._stream: FileIO | None = None
        self._current = -1
        for number, waiting in enumerate(self._waiting):
            files = (folder / self.files[number], self._unfinished(number))
            if len(waiting) < len(shards[number]) and not any(file.is_file() for file in files):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(files[0]))
            if not waiting:
                self._finish(number)

    def _layout(self, names: list[str]) -> bytes:
        """A shard's header; remembers where each tensor goes."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names, key=lambda name: -self.specs[name].dtype.itemsize):
            shape, dtype = self.specs[name]
            begin, end = end, end + self.specs[name].nbytes
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self._place[name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in place. It must have the shape and dtype of its Spec."""
        if Spec(tuple(tensor.shape), tensor.dtype) != self.specs[name]:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned was {self.specs[name]}")
        number = self.shard_of[name]
        try:
            stream = self._switch_to(number)
            stream.seek(len(self._headers[number]) + self._place[name])
            self._write_all(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._waiting[number].discard(name)
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def _write_all(self, content: Any) -> None:
        """Write at the open shard's position; an unbuffered write may take a part only."""
        data = memoryview(content)
        while data:
            data = data[self._stream.write(data) :]

    def flush(self) -> None:
        """Make everything written so far survive a crash, and give finished shards their name."""
        try:
            if self._stream:
                os.fsync(self._stream.fileno())
        except OSError as error:
            raise disk_error(error, self.folder) from error
        if self._current >= 0 and not self._waiting[self._current]:
            self._finish(self._current)

    def _switch_to(self, number: int) -> FileIO:
        if number != self._current or self._stream is None:
            self.flush()
            if self._stream:
                self._stream.close()
            path, finished = self._unfinished(number), self.folder / self.files[number]
            if finished.exists():  # a crash came between its last tensor and the caller's own record of it
                path = finished
            path.touch()
            self._stream, self._current = path.open("r+b", buffering=0), number
            header = self._headers[number]
            if self._stream.read(len(header)) != header:  # new, or a crash came before all of it was there
                self._stream.seek(0)
                self._write_all(header)
            self._stream.truncate(len(header) + sum(self.specs[name].nbytes for name in self._shards[number]))
        return self._stream

    def _finish(self, number: int) -> None:
        if self._stream and self._current == number:
            self._stream.close()
            self._stream, self._current = None, -1
        if self._unfinished(number).exists():
            self._unfinished(number).rename(self.folder / self.files[number])

    def _unfinished(self, number: int) -> Path:
        return self.folder / f"{self.files[number]}.unfinished"

    def close(self) -> None:
        """Release the open shard, finished or not."""
        if self._stream:
            self._stream.close()
            self._stream = None

    def write_index(self) -> None:
        """`model.safetensors.index.json`, when there is more than one shard."""
        if len(self.files) > 1:
            weight_map = {name: self.files[number] for name, number in self.shard_of.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def disk_error(error: OSError, folder: Path) -> Exception:
    """A LutqError for a full disk, else the error itself."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LutqError(f"the disk is full while writing to {folder}: free some space and run the same command to go on")
    return error
