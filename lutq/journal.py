"""The record of an unfinished `lutq quantize`: what was asked, and which tensors are done.

One JSON object per line in `lutq-progress.jsonl`: first the identity of the run, then a record per finished unit (one
tensor, or one Linear weight) with the SHA-256 of what was read. A run goes on only where identity and hashes agree, so
the result is bit for bit that of an uninterrupted run. The file is locked while a run is at work.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from lutq.errors import LutqError

NAME = "lutq-progress.jsonl"


class StaleRunError(LutqError):
    """An unfinished run cannot be continued, because its settings or its source were others."""


class Journal:
    """An open journal in `folder`; `records` are the units that earlier runs finished.

    Raises LutqError when another process is at work there, StaleRunError when the unfinished run had another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], remedy: str) -> None:
        self.path, self.remedy = folder / NAME, remedy
        identity = json.loads(json.dumps(identity))
        self._stream = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise LutqError(f"another lutq quantize is writing to {folder}: wait for it or give another --out") from error
        self._stream.seek(0)
        text = self._stream.read()
        whole = text[: text.rfind("\n") + 1]  # a line cut by a crash does not count
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._stream.truncate(0)
            self.add(identity)
            lines = [identity]
        elif whole != text:
            self._stream.truncate(len(whole.encode()))
        self.records: list[dict[str, Any]] = lines[1:]
        changed = differences(lines[0], identity)
        if changed:
            self.close()
            raise StaleRunError(f"{folder} holds an unfinished run with other settings ({'; '.join(changed)}): {remedy}")

    def add(self, record: dict[str, Any]) -> None:
        """Append a record so that it survives a crash."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def check(self, record: dict[str, Any], tensor: torch.Tensor) -> None:
        """Raise StaleRunError unless `tensor` is what the record's unit was made from."""
        if record["sha256"] != fingerprint(tensor):
            unit = record["unit"]
            self.close()
            raise StaleRunError(f"the source changed since the unfinished run in {self.path.parent} (at {unit}): {self.remedy}")

    def close(self) -> None:
        """Release the journal and its lock."""
        self._stream.close()


def fingerprint(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, as `key: old -> new`; the order of keys counts (it does in an override table)."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        found = [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
        return found or ([f"{path}: another order"] if list(old) != list(new) else [])
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
