"""Tries many inputs of every kind, and says what came of them.

make fuzz ARGS="--kind data --count 2000 --seed 7"
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from aligntune.algorithms import registry
from tests.fuzz.inputs import KINDS
from tests.fuzz.trial import TOOK, kind_of, outcome


def main() -> int:
    """Exit code 1 where an input shows a defect."""
    options = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    options.add_argument("--kind", choices=KINDS, action="append", help="default: every one")
    options.add_argument("--count", type=int, help="inputs of each kind")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--messages", type=Path, help="a file for one example of each message")
    options.add_argument("--most", type=int, default=5, help="defects of a kind to stop at")
    given = options.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    registry.entry_points = functools.cache(registry.entry_points)  # looks through all packages
    messages: dict[str, str] = {}
    tried = bad = 0
    began = time.monotonic()
    for name in given.kind or KINDS:
        one, usual = KINDS[name]
        came: Counter[str] = Counter()
        start, defects = time.monotonic(), set[str]()
        for number in range(given.count or usual):
            seed = f"{name} {given.seed} {number}"
            with tempfile.TemporaryDirectory(prefix="aligntune-fuzz-") as folder:
                line, defect = outcome(one, seed, Path(folder))
            came["taken" if line == TOOK else "defects" if defect else "refused"] += 1
            if defect:
                what = kind_of(defect.splitlines()[0])
                if what not in defects:
                    defects.add(what)
                    print(f"--- {seed}\n{defect}", flush=True)
            elif line != TOOK:
                messages.setdefault(f"{name}: {kind_of(line)}", line)
            if len(defects) >= given.most:
                break
        count = sum(came.values())
        told = ", ".join(f"{count} {what}" for what, count in sorted(came.items()))
        print(f"{name}: {count} in {time.monotonic() - start:.0f} s: {told}", flush=True)
        tried += count
        bad += came["defects"]
    seconds = time.monotonic() - began
    print(f"{tried} inputs in {seconds:.0f} s, {len(messages)} messages, {bad} defects")
    if given.messages:
        lines = [f"{where}\n    {line}\n" for where, line in sorted(messages.items())]
        given.messages.write_text("".join(lines), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
