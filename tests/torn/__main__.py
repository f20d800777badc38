"""Tears the files of runs in every way: `python -m tests.torn --seed 0` (`make torn`).

Runs of the real controller, over roles without processes, are written down, one operation after
the other. After each the process is killed, or the machine dies and the disk keeps a part of what
was not forced to it; disks fail at each operation in turn; bits flip afterwards. From each state
the run must go on to what it would have been, or be refused in one line.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.torn.check import bad_disks, bits, disks
from tests.torn.run import quick
from tests.torn.states import STORIES


def main() -> int:
    """Look at the states that are asked for; 1 where one went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torn", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crashes", type=int, default=12, help="of the machine, an operation")
    parser.add_argument("--bits", type=int, default=6, help="flipped, a file")
    parser.add_argument("--every", type=int, default=1, help="look at each so-many-th state")
    parser.add_argument("--story", choices=[story.name for story in STORIES])
    args = parser.parse_args()
    stories = [story for story in STORIES if args.story in (None, story.name)]
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    began, used = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="aligntune-torn-", dir=place) as folder:
        for kind, look in (
            ("crash", lambda story, at: disks(story, at, args.seed, args.crashes, args.every)),
            ("bad disk", lambda story, at: bad_disks(story, at, args.every)),
            ("flipped bit", lambda story, at: bits(story, at, args.seed, args.bits, args.every)),
        ):
            for number, story in enumerate(stories):
                at = Path(folder) / f"{kind} {number}".replace(" ", "-")
                with quick() as out:
                    for told, problems in look(story, at):
                        seen[kind] += 1
                        wrong += [f"{story.name}: {told}: {each}" for each in problems]
                        for each in problems:
                            print(f"{story.name}: {told}: {each}", file=out, flush=True)
                print(f"{kind}, {story.name}: {seen[kind]} states so far", flush=True)
    seconds, processor = time.monotonic() - began, time.process_time() - used
    counts = ", ".join(f"{count} of a {kind}" for kind, count in seen.items())
    print(
        f"{sum(seen.values())} states ({counts}), {len(wrong)} wrong, seed {args.seed}, "
        f"{seconds:.0f} s ({processor:.0f} s of processor)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
