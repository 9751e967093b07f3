"""Ends a process when another of its job ends, though it may be waiting for that one inside a library or a GPU.

A thread looks at the other processes (Linux: pidfd_open) and at one key of torch's store, where a process that fails leaves a
sentence. The first sentence counts. Rank 0 prints it; rank 1 does if rank 0 was killed. Those that fail wait until it is said,
because torchrun ends all others as soon as one has ended, and rank 0 leaves last, because it may hold the store.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from lutq.parallel.ranks import Ranks

KEY, SAID = "end", "said"
PERIOD = 0.2  # seconds between looks at the store
PATIENCE = 3.0  # seconds that a process which fails waits for rank 0 to say so
LAST = 1.0  # seconds that rank 0 waits for the others
INTERRUPTED = "interrupted"


def exit_code(sentence: str) -> int:
    """130 after Ctrl-C, as shells have it, otherwise 2."""
    return 130 if sentence == INTERRUPTED else 2


class Watch(threading.Thread):
    """Watches over the other processes until `stop`."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(daemon=True)
        self.ranks, self.once, self.done = ranks, threading.Lock(), threading.Event()
        self.speaker = 0
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # a connection of its own: one that waits in the main thread would make this one wait
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        # torchrun --max-restarts keeps the store
        self.store = dist.PrefixStore(f"lutq/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.store.set(f"pid/{ranks.rank}", str(os.getpid()))
        others = [rank for rank in range(ranks.world) if rank != ranks.rank]
        self.files = {rank: self.process(int(self.store.get(f"pid/{rank}"))) for rank in others}

    def process(self, pid: int) -> int | None:
        """A file that is readable once a process has ended; None where there is no such thing."""
        with contextlib.suppress(AttributeError, OSError):
            return os.pidfd_open(pid)
        return None

    def ended(self, milliseconds: float) -> int | None:
        """The rank of a process that ends in this time, or has."""
        poll = select.poll()
        ranks = {file: rank for rank, file in self.files.items() if file is not None}
        for file in ranks:
            poll.register(file, select.POLLIN)
        return next((ranks[file] for file, _ in poll.poll(milliseconds)), None)

    def sentence(self) -> str | None:
        """What a process that failed has left. Raises RuntimeError when the store has ended."""
        return self.store.get(KEY).decode() if self.store.check([KEY]) else None

    def reason(self, seconds: float) -> str | None:
        """Why the job has to end, known within this time; None if it has not."""
        gone = self.ended(1000 * seconds)
        try:
            said = self.sentence()
        except RuntimeError:
            if gone is None:  # rank 0, which may hold the store, may have ended between the two looks
                gone = self.ended(1000 * LAST)
            said = "torchrun has ended: all have stopped" if gone is None else None
        if said is not None or gone is None:
            return said
        self.speaker = 1 if gone == 0 else 0
        return f"process {gone} of {self.ranks.world} ended without a word (killed, or out of memory): all have stopped"

    def run(self) -> None:
        """The thread."""
        while not self.done.is_set():
            found = self.reason(PERIOD)
            if found is not None and not self.done.is_set():
                self.leave(found)

    def stop(self) -> None:
        """Let the others end."""
        self.done.set()

    def fail(self, sentence: str) -> None:
        """End this process and so the job; the others learn why. Of the main thread."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes from the terminal and again from torchrun
        with contextlib.suppress(RuntimeError):
            self.store.compare_set(KEY, "", sentence)
            sentence = self.sentence() or sentence
            until = time.monotonic() + PATIENCE
            while self.ranks.rank and time.monotonic() < until and not self.store.check([SAID]):
                time.sleep(PERIOD / 4)
        self.leave(sentence)

    def leave(self, sentence: str) -> None:
        """End this process at once, wherever its threads are. One of all says why."""
        with self.once:  # never released: one sentence
            if self.ranks.rank == self.speaker:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                print(f"\nlutq: {sentence}", file=sys.__stderr__, flush=True)
            if self.ranks.rank == 0:
                with contextlib.suppress(RuntimeError):
                    self.store.set(SAID, "1")
                until = time.monotonic() + LAST
                while time.monotonic() < until and not self.all_ended():
                    time.sleep(PERIOD / 10)
            os._exit(exit_code(sentence))

    def all_ended(self) -> bool:
        """Whether no other process is left, as far as that can be seen."""
        poll, files = select.poll(), [file for file in self.files.values() if file is not None]
        for file in files:
            poll.register(file, select.POLLIN)
        return len(poll.poll(0)) == len(files)
