"""Where an unfinished calibrated run keeps what its next block, or its next epoch, needs.

A state is a file that `torch.save` wrote, put in place whole. The journal says which blocks are done.

The hidden states behind a block are far larger than the block, and finished blocks make them anew, so they are kept only now
and then.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from lutq.journal import Journal, StaleRunError

FOLDER = "calibration"
APART = 60  # seconds at least between two times that hidden states are kept


class Store:
    """States by name in `folder`, and the blocks that `journal` has on record."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder, self.journal = folder, journal
        folder.mkdir(exist_ok=True)
        self.records = {record["unit"]: record for record in journal.records}
        self.kept = time.monotonic()  # hidden states, or all that this run began with

    def blocks(self) -> int:
        """How many blocks, from the first on, earlier runs finished."""
        done = 0
        while f"block {done}" in self.records:
            done += 1
        return done

    def finish_block(self, i: int, digest: str, figures: dict[str, Any], state: Any, hidden: Any) -> None:
        """Keep the state of block i, which from now on is done, and, if it is time, the hidden states behind it."""
        self.save(f"block-{i}", state)
        self.journal.add({"unit": f"block {i}", "sha256": digest, "figures": figures})
        if time.monotonic() - self.kept >= APART:
            self.save(f"hidden-{i + 1}", hidden)
            for earlier in range(i + 1):
                (self.folder / f"hidden-{earlier}").unlink(missing_ok=True)
            self.kept = time.monotonic()

    def hidden(self) -> tuple[int, Any]:
        """The last hidden states that were kept, and the number of the block that they enter; 0 and None without any."""
        return next(((i, state) for i in range(self.blocks(), 0, -1) if (state := self.load(f"hidden-{i}"))), (0, None))

    def figures(self, i: int, digest: str) -> dict[str, Any]:
        """Figures of a block that is done. Raises StaleRunError if it was made from other weights than those of `digest`."""
        record = self.records[f"block {i}"]
        self.check(i, digest, record["sha256"])
        return record["figures"]

    def check(self, i: int, digest: str, earlier: str) -> None:
        """Raise StaleRunError unless block i is what it was when something was made from it."""
        if digest != earlier:
            raise StaleRunError(
                f"the source changed since the unfinished run in {self.folder.parent} (at block {i}): {self.journal.remedy}"
            )

    def save(self, name: str, state: Any) -> None:
        """Put a state in place, so that it survives a crash."""
        file = self.folder / f"{name}.unfinished"
        with file.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        file.replace(self.folder / name)

    def load(self, name: str) -> Any:
        """A state on the CPU, or None where there is none."""
        file = self.folder / name
        return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete all states; they are not part of a checkpoint."""
        shutil.rmtree(folder, ignore_errors=True)
