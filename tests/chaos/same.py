"""The same run under many deaths: killed at random times, at staleness 0, a run ends bit for bit as
one that nothing happens to.

make chaos ARGS="--same 6 --seed 1"
"""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from aligntune.online.ledger import audit
from tests.chaos.campaign import GROUPS, Parts, config, launched
from tests.chaos.trial import KILL, find, lines_of

VICTIMS = ("rollout", "reward", "reward child", "reference", "policy", "critic", "driver")
SPARE_STEPS = 3  # beyond one a death
DEADLINE_S = 1200.0  # for the run that is killed again and again
TIMED = ("time/", "throughput/", "rollout/")  # figures of this machine and this time


def same_run(folder: Path, deaths: int, seed: int) -> dict[str, Any]:
    """What became of two runs, of which one is hit `deaths` times; `problems` is empty where both
    are the same."""
    dice = random.Random(seed)
    path, steps = folder / "config.yaml", deaths + SPARE_STEPS
    tree = config(folder, Parts(), steps, seed)
    tree["train"] |= {"max_staleness": 0}
    tree["tracking"]["samples_per_step"] = GROUPS
    runs = {name: folder / name for name in ("whole", "killed")}
    codes: dict[str, list[int]] = {name: [] for name in runs}
    hits: list[str] = []
    began = time.monotonic()
    for name, run in runs.items():
        path.write_text(yaml.safe_dump({**tree, "output_dir": str(run)}))
        several = [dice.sample(VICTIMS, len(VICTIMS)) for _ in range(deaths)]
        victims = list(chain(*several))[: deaths if name == "killed" else 0]
        end = time.monotonic() + DEADLINE_S
        while 0 not in codes[name] and len(codes[name]) <= victims.count("driver") + 1:
            process = launched(folder, "train", str(path))
            while process.poll() is None:
                if time.monotonic() > end:
                    process.kill()
                    return _told(seed, began, hits, codes, ["it had not ended in time"])
                due = len(hits) < len(victims) and len(lines_of(run / "metrics.jsonl")) > len(hits)
                if due:
                    time.sleep(dice.uniform(0, 0.5))  # anywhere in the step
                    victim = victims[len(hits)]
                    if process.poll() is None and _struck(victim, process, run):
                        hits.append(victim)
                time.sleep(0.05)
            codes[name].append(process.wait())
    problems = _differences(runs["whole"], runs["killed"], steps)
    if len(hits) < deaths:
        problems.append(f"the run ended after {len(hits)} deaths")
    return _told(seed, began, hits, codes, problems)


def _struck(victim: str, process: Any, run: Path) -> bool:
    try:
        found = find(victim, psutil.Process(process.pid), run)
        if found is not None:
            found.send_signal(KILL)
        return found is not None
    except psutil.NoSuchProcess:  # it has just ended by itself
        return False


def _told(
    seed: int, began: float, hits: list[str], codes: dict[str, list[int]], problems: list[str]
) -> dict[str, Any]:
    return {
        "seed": seed,
        "deaths": dict(Counter(hits)),
        "exit_codes": codes,
        "seconds": round(time.monotonic() - began, 1),
        "problems": problems,
    }


def _differences(whole: Path, killed: Path, steps: int) -> list[str]:
    """In what two runs that should be the same differ."""
    problems = []
    for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
        one, other = (_untimed(run / name) for run in (whole, killed))
        if one != other:
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
            problems.append(f"{name}: {len(one)} and {len(other)} rows, the first to differ: {at}")
    if _order(whole) != _order(killed):
        problems.append(f"the steps have other groups: {_order(whole)} and {_order(killed)}")
    try:
        weights, others = (
            load_file(run / "model" / "model.safetensors") for run in (whole, killed)
        )
    except OSError as error:
        return [*problems, f"no model: {error}"]
    if weights.keys() != others.keys():
        problems.append("the models have other tensors")
    problems += [
        f"{name} differs" for name in weights if not torch.equal(weights[name], others[name])
    ]
    books = audit(killed / "ledger.jsonl")
    if (books.trained, books.open, books.quarantined) != (steps * GROUPS, 0, 0):
        problems.append(f"the books: {books}")
    return problems


def _untimed(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in lines_of(path)]


def _order(run: Path) -> list[list[int]]:
    """The groups of each step in the history that survived."""
    steps: dict[int, list[int]] = {}
    for record in lines_of(run / "ledger.jsonl"):
        if record["event"] == "restore":
            steps = {step: groups for step, groups in steps.items() if step <= record["step"]}
        if record["event"] == "move" and record["to"] == "TRAINED":
            steps[record["step"]] = record["groups"]
    return [steps[step] for step in sorted(steps)]
