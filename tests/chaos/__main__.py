"""Breaks runs on purpose: `python -m tests.chaos --trials 12 --seed 0` (`make chaos`).

Each trial is a small run on a Ray of its own. At a random step one of its processes is killed or
stopped for ever; where the driver or its Ray died the same command is given again. Then the books
must balance and nothing may be left. Trials share the machine with nothing else: a slow start is no
fault.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.same import same_run
from tests.chaos.trial import VICTIMS, Trial, run_trial


def main() -> int:
    """Run the trials that are asked for, and write what became of each; 1 where one went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--trials", type=int, default=len(VICTIMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(VICTIMS), help="the one victim of every trial")
    parser.add_argument(
        "--same", type=int, metavar="DEATHS", help="so many deaths in one run, which ends the same"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"trials-{time.strftime('%Y%m%d-%H%M%S')}.json"
    if args.same is not None:
        with tempfile.TemporaryDirectory(prefix="aligntune-chaos-") as folder:
            result = same_run(Path(folder), args.same, args.seed)
        (args.out / f"same-{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(json.dumps(result))
        print(json.dumps(result))
        return 1 if result["problems"] else 0
    draw = random.Random(args.seed)
    done: list[dict[str, object]] = []
    victims = [args.only] if args.only else draw.sample(sorted(VICTIMS), len(VICTIMS))
    for number in range(args.trials):
        victim = victims[number % len(victims)]
        trial = Trial(victim, draw.choice(VICTIMS[victim]), at_step=draw.randint(1, 6))
        with tempfile.TemporaryDirectory(prefix="aligntune-chaos-") as folder:
            result = run_trial(Path(folder), trial, seed=draw.randrange(2**31))
        done.append(result)
        path.write_text(json.dumps({"seed": args.seed, "trials": done}, indent=1) + "\n")
        said = "; ".join(result["problems"]) or "whole"  # type: ignore[arg-type]
        print(f"{number + 1}/{args.trials} {trial.describe()}: {said}", flush=True)
    bad = [result for result in done if result["problems"]]
    print(f"{len(done) - len(bad)} of {len(done)} trials whole; {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
