"""A verb of the command line as one of several processes of torchrun.

Rank 0 prints, the others are silent. The processes end together: when one fails, is interrupted or is killed, rank 0 says why in
one sentence and all exit within seconds, with code 2, or 130 after Ctrl-C. torchrun adds a report of its own, and exits with 1.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from lutq.errors import LutqError

VERBS = ("generate", "eval_ppl", "decode")


@contextlib.contextmanager
def job(verb: str, device: str, verbose: bool = False) -> Iterator[None]:
    """Run the block as one of the processes that torchrun started; does nothing in a process that it did not start.

    The process ends with the block: communicators inside captured graphs would wait for each other while they are taken down.
    """
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:  # before torch is imported
        yield
        return
    from lutq.parallel.ranks import join, launched
    from lutq.parallel.watch import INTERRUPTED, PATIENCE, Watch

    if launched() == 1:
        yield
        return
    try:
        if verb not in VERBS:
            raise LutqError("torchrun runs lutq generate, eval-ppl and bench decode: start the others without it")
        ranks = join(device)
    except LutqError:  # of all ranks
        if os.environ["RANK"] == "0":
            raise
        time.sleep(PATIENCE)  # torchrun would end rank 0 before it has said so
        os._exit(2)
    if ranks.rank:
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115, open until the process ends
    watch = Watch(ranks)
    watch.start()
    try:
        yield
        watch.stop()
        ranks.least(0)  # all have come so far
    except KeyboardInterrupt:
        watch.fail(INTERRUPTED)
    except Exception as error:  # noqa: BLE001, whatever it is, it ends all processes
        found = None if isinstance(error, LutqError) else watch.reason(1.0)
        if found is None and (verbose or not isinstance(error, LutqError)):
            print(traceback.format_exc(), file=sys.__stderr__, flush=True)
        reason = str(error) if isinstance(error, LutqError) else found or f"process {ranks.rank} failed, as said above"
        watch.fail(reason)
    end()


def end() -> NoReturn:
    """Leave with code 0, everything written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
