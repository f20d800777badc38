"""Breaks runs on purpose: `python -m tests.chaos --trials 12 --seed 0` (`make chaos`).

Each trial hits one process of a run: it is killed, or stopped for ever. A run is hit up to
`--each` times, one after the other; where its driver or its Ray died the same command is given
again. After each hit the run goes on, no group is lost or trained twice, and the books balance; at
the end nothing is left. Trials share the machine with nothing else: a slow start is no fault.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from tests.chaos.campaign import Campaign, Parts, draw
from tests.chaos.same import same_run
from tests.chaos.soak import soak
from tests.chaos.trial import VICTIMS


def main() -> int:
    """Run the trials that are asked for, and write what became of each; 1 where one went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--each", type=int, default=12, metavar="HITS", help="of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(VICTIMS), help="the one victim of every trial")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--strategy", choices=("torch", "deepspeed", "fsdp"), default="torch")
    parser.add_argument(
        "--same", type=int, metavar="DEATHS", help="so many deaths in one run, which ends the same"
    )
    parser.add_argument(
        "--soak", type=float, metavar="MINUTES", help="of a run with a death a minute"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y%m%d-%H%M%S")
    if args.same is not None:
        with tempfile.TemporaryDirectory(prefix="aligntune-chaos-") as folder:
            result = same_run(Path(folder), args.same, args.seed)
        (args.out / f"same-{now}.json").write_text(json.dumps(result))
        print(json.dumps(result))
        return 1 if result["problems"] else 0
    if args.soak is not None:
        with tempfile.TemporaryDirectory(prefix="aligntune-soak-") as folder:
            result = soak(Path(folder), args.soak, args.seed)
        (args.out / f"soak-{now}.json").write_text(json.dumps(result))
        print(json.dumps(result, indent=1))
        return 1 if result["problems"] else 0
    parts = Parts(args.engine, args.strategy)
    victims = [args.only] if args.only else parts.victims(sorted(VICTIMS))
    hits = draw(args.trials, args.seed, victims, VICTIMS)
    path, done = args.out / f"trials-{now}.json", []
    for number in range(0, len(hits), args.each):
        with tempfile.TemporaryDirectory(prefix="aligntune-chaos-") as folder:
            campaign = Campaign(
                Path(folder), parts, hits[number : number + args.each], args.seed + number
            )
            for row in campaign.results():
                done.append(row)
                print(_line(row), flush=True)
        path.write_text(json.dumps({**vars(args), "out": str(args.out), "trials": done}) + "\n")
    return _told(done, path)


def _line(row: dict[str, Any]) -> str:
    said = "; ".join(row["problems"]) or f"whole after {row['seconds']} s"
    return f"{row['signal']} to {row['victim']} at step {row['at_step']}: {said}"


def _told(done: list[dict[str, Any]], path: Path) -> int:
    times: dict[str, list[float]] = defaultdict(list)
    for row in done:
        if row["seconds"] is not None:
            times[f"{row['signal']} to {row['victim']}"].append(row["seconds"])
    for name, seconds in sorted(times.items()):
        print(f"{name}: {len(seconds)}, median {median(seconds):.1f} s, at most {max(seconds)} s")
    bad = [row for row in done if row["problems"]]
    print(f"{len(done) - len(bad)} of {len(done)} trials whole; {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
