"""`make bench NAME=...`: measure, write runs/bench/NAME.json, say whether the targets are met.

python -m tests.bench          the names
python -m tests.bench NAME     exit code 1 where a target is missed

Those of real engines take minutes and are measured in parts (tests/bench/end_to_end/parts.py):

python -m tests.bench NAME --parts 1     measure one more part; exit code 3 while some are left
"""

from __future__ import annotations

import argparse
import importlib
import sys

from tests.bench import report
from tests.bench.end_to_end.parts import LEFT, Options, Unfinished

BENCHES = {
    "control": "driver CPU time a group, over roles that answer at once",
    "engine": "CPU s of a vLLM engine, forked and spawned, eager and compiled; in parts",
    "fan_out": "driver CPU a group over bare Ray calls, and with 1 to 64 replicas",
    "gpu_update": "an update on one GPU: packing, head, checkpointing; skipped without one",
    "ledger": "audit and restore of the books of a million groups",
    "memory": "what an update keeps beside weights and activations, vocabulary 152,064",
    "overlap_sim": "a step over the best possible under the staleness bound; virtual time",
    "packing": "padding, balance and time in step of a step's rows; exact",
    "shared_prompts": "an update whose groups' prompts are computed once, over padded rows",
    "store": "bytes of a real step in the object store and through the driver; exact",
    "overlap_real": "tokens/s at staleness 1 and 2 over 0: real engines, a core each; in parts",
    "startup": "seconds to the first trained step over bare vLLM's start; in parts",
    "systems": "one small work by us, by TRL and by bare vLLM and torch; in parts",
    "vs_floor": "a step over bare vLLM and a bare torch update; in parts",
    "vs_trl": "samples/s and tokens/s over TRL's GRPOTrainer; in parts",
    "transfer": "a version of the weights to the replicas: bytes, copies, CPU, pause",
    "staleness": "the age of what is trained on, under random times; virtual time",
}
IN_PARTS = ("engine", "overlap_real", "startup", "systems", "vs_floor", "vs_trl")


def main(arguments: list[str]) -> int:
    """Run the benches of these names; without one, list them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=Options().rounds, help="parts of each system")
    parser.add_argument("--steps", type=int, default=Options().steps, help="of a part")
    parser.add_argument("--parts", type=int, help="that this call measures, at most")
    parser.add_argument("--prompts", type=int, help="of a step, fewer for a look: no targets then")
    parser.add_argument("--cores", type=int, help="fewer, for a busy machine: no targets then")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    given = vars(parser.parse_args(arguments))
    names = given.pop("names")
    options = Options(**given)
    if not names or not set(names) <= set(BENCHES):
        for name, what in BENCHES.items():
            print(f"make bench NAME={name:<12} {what}")
        return 2 if names else 0
    missed = 0
    for name in names:
        measure = importlib.import_module(f"tests.bench.{name}").measure
        try:
            measured = measure(options) if name in IN_PARTS else measure()
        except Unfinished as left:
            print(f"{name}: {left}")
            return LEFT
        path = report.write(name, measured)
        for figure, value in measured.figures.items():
            print(f"{figure:<40} {value:.4g}")
        met = measured.met()
        for target in measured.targets:
            word = "met" if met[target.figure] else "MISSED"
            print(f"target {target}: {word}")
        missed += sum(not reached for reached in met.values())
        print(path)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
