"""Plays many histories, and makes one that shows a fault small.

make histories ARGS="--count 5000 --seed 0"
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.histories.history import Fault, History, drawn, smaller

LONGEST_S = 60.0  # of this machine, for one history


def what_is_wrong(
    history: History, fired: list[Fault] | None = None
) -> tuple[str | None, list[str]]:
    """The defect that a history shows, if any, and how its processes ended; see `play`."""
    from tests.histories.play import play

    faulthandler.dump_traceback_later(LONGEST_S, exit=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="aligntune-history-", dir=memory) as folder:
        try:
            return None, play(history, Path(folder), fired)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.format_exc().strip().splitlines()
            return f"{type(error).__name__}: {error}\n" + "\n".join(last[-12:]), []
        finally:
            faulthandler.cancel_dump_traceback_later()


def shrunk(history: History) -> History:
    """The smallest history that is found to show a fault still."""
    while True:
        for less in smaller(history):
            if what_is_wrong(less)[0] is not None:
                history = less
                break
        else:
            return history


def main() -> int:
    """Exit code 1 where a history shows a fault."""
    options = argparse.ArgumentParser(prog="make histories", description=__doc__)
    options.add_argument("--count", type=int, default=5000)
    options.add_argument("--seed", type=int, default=0, help="number of the first one")
    options.add_argument("--most", type=int, default=3, help="faults to stop at")
    given = options.parse_args()
    began, ends, wrong = time.monotonic(), Counter[str](), []
    played, fired = 0, list[Fault]()
    for number in range(given.seed, given.seed + given.count):
        fault, ended = what_is_wrong(drawn(number), fired)
        played += 1
        if played % 500 == 0:
            print(f"{played} played in {time.monotonic() - began:.0f} s", flush=True)
        ends.update("ended with a reason" if len(end) > 10 else end for end in ended)
        if fault is not None:
            wrong.append(number)
            print(f"history {number}: {fault}\n{shrunk(drawn(number))}", flush=True)
            if len(wrong) >= given.most:
                break
    seconds = time.monotonic() - began
    told = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    print(
        f"{played} histories in {seconds:.0f} s; processes: {told}; {len(fired)} faults "
        f"came about in {len({(f.place, f.kind) for f in fired})} ways; defects: {wrong}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
