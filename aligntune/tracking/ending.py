"""What a run came to, in a few lines for a person: before and after, and what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from aligntune.heads import writes_text
from aligntune.runs.jsonl import read_lines, readable
from aligntune.runs.measure import comparable
from aligntune.tracking import lines
from aligntune.tracking.advice import unmoved

Row = Mapping[str, float]


def ending(output_dir: Path, model: Path) -> list[str]:
    """What is told below the last line of a run in `output_dir`."""
    steps = [row for row in readable(output_dir / "metrics.jsonl") if row.get("step")]
    rows = comparable(evaluations(output_dir))
    return [*before_and_after(rows, steps), *what_next(output_dir, model)]


def evaluations(output_dir: Path) -> list[Row]:
    """The evaluations of a run of either kind, in order."""
    own, steps = output_dir / "evals.jsonl", output_dir / "metrics.jsonl"
    path = own if own.is_file() else steps
    rows = read_lines(path) if path.is_file() else []
    return [row for row in rows if lines.evaluated(row) is not None]


def before_and_after(rows: Sequence[Row], steps: Sequence[Row]) -> list[str]:
    """The held-out figure of the first evaluation and of the last, and of each criterion where
    there are several; nothing where there were no two. `steps` are the figures of the steps, which
    say why nothing changed."""
    if len(rows) < 2:
        return []
    first, last = rows[0], rows[-1]
    was, now_is = lines.evaluated(first), lines.evaluated(last)
    if was is None or now_is is None or was[0] != now_is[0]:
        return []
    (name, before), (_, after) = was, now_is
    told = [f"held-out {name} {before:.3f} -> {after:.3f} (step {first['step']} -> {last['step']})"]
    now = lines.criteria(last, "eval/")
    for criterion, value in lines.criteria(first, "eval/").items():
        if criterion in now:
            told.append(f"  {criterion} {value:.3f} -> {now[criterion]:.3f}")
    return told + [f"warning: {said}" for said in [unmoved(first, last, steps)] if said]


def what_next(output_dir: Path, model: Path) -> list[str]:
    """Commands that go on from a run that is done."""
    folder, name = (shlex.quote(_short(path)) for path in (output_dir, model))
    printed = output_dir / "logs" / "reward.log"  # by rewards, tools and environments
    wrote = printed.is_file() and printed.stat().st_size > 0
    samples = (output_dir / "samples.jsonl").is_file()  # jobs on pairs or texts write none
    look = f"answers:    aligntune samples {folder} --worst"
    return [
        *([f"printed:    {_short(printed)} (what reward functions wrote)"] if wrote else []),
        look if samples else f"curves:     aligntune report {folder}",
        *([f"talk to it: aligntune chat {name}"] if _writes(model) else []),
    ]


def _writes(model: Path) -> bool:
    """Whether the model saved in this folder does."""
    config = model / "config.json"
    said = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return writes_text(said.get("architectures"))


def _short(path: Path) -> str:
    """As it is named from the current folder, where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
