"""`make bench NAME=...`: measure, write runs/bench/NAME.json, say whether the targets are met.

python -m tests.bench          the names
python -m tests.bench NAME     exit code 1 where a target is missed
"""

from __future__ import annotations

import importlib
import sys

from tests.bench import report

BENCHES = {
    "control": "driver CPU time a group, over roles that answer at once",
    "fan_out": "driver CPU a group over bare Ray calls, and with 1 to 64 replicas",
    "ledger": "audit and restore of the books of a million groups",
    "memory": "what an update keeps beside weights and activations, vocabulary 152,064",
    "overlap_sim": "a step over the best possible under the staleness bound; virtual time",
    "packing": "padding, balance and time in step of a step's rows; exact",
    "store": "bytes of a real step in the object store and through the driver; exact",
    "staleness": "the age of what is trained on, under random times; virtual time",
}


def main(names: list[str]) -> int:
    """Run the benches of these names; without one, list them."""
    if not names or not set(names) <= set(BENCHES):
        for name, what in BENCHES.items():
            print(f"make bench NAME={name:<12} {what}")
        return 2 if names else 0
    missed = 0
    for name in names:
        measured = importlib.import_module(f"tests.bench.{name}").measure()
        path = report.write(name, measured)
        for figure, value in measured.figures.items():
            print(f"{figure:<40} {value:.4g}")
        met = measured.met()
        for target in measured.targets:
            word = "met" if met[target.figure] else "MISSED"
            print(f"target {target.figure} <= {target.limit:g}: {word}")
        missed += sum(not reached for reached in met.values())
        print(path)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
