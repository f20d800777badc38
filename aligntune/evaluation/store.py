"""Evaluations as folders: `summary.json` with the figures, `completions.jsonl` with every row.

Invariant: a folder of this form is whole. It is written under another name, forced to disk, and
renamed last. One evaluation never takes the place of another.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from aligntune.errors import UserError
from aligntune.evaluation.statistics import Estimate
from aligntune.evaluation.summary import Row, Success
from aligntune.runs.disk import make_folder, sync, sync_below
from aligntune.runs.jsonl import read_lines

EVALUATIONS = "evaluations"
SUMMARY = "summary.json"
COMPLETIONS = "completions.jsonl"


class Decoded(BaseModel):
    """The figures of one decoding."""

    model_config = ConfigDict(frozen=True)

    completions: int  # a prompt
    temperature: float
    figures: dict[str, Estimate]


class Summary(BaseModel):
    """What an evaluation came to, and all that one must know to read it."""

    model_config = ConfigDict(frozen=True)

    name: str
    time: str  # when it ended, ISO 8601 in UTC
    model: str  # folder or hub name
    origin: str  # export, checkpoint, best, start or model
    step: int | None  # of the run; None where the model is of no run
    run: str | None  # the run directory
    data: str  # what the held-out prompts are of
    prompts: int
    failed: int  # that could not be scored, of `prompts` under all decodings
    success: Success
    weights: dict[str, float] | None = None  # of each criterion in the reward; None: not written
    answers: str  # what majorities count
    confidence: float
    seed: int
    seconds: float
    versions: list[str]
    decodings: dict[str, Decoded]


def check_place(parent: Path) -> None:
    """Whether a folder can be made in `parent`, which may not be there. Raises UserError."""
    above = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "nothing can be written to" if above.is_dir() else "it would be in the file"
        raise UserError(
            f"an evaluation cannot be kept in {parent}: {why} {above}; name another folder by --out"
        )


def write_evaluation(parent: Path, summary: Summary, rows: Sequence[Row]) -> Path:
    """Write a new folder in `parent`, named by the summary, or with `-2` and so on behind it where
    there is one of this name; returns it."""
    make_folder(parent)
    staging = parent / f"{summary.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        with (staging / COMPLETIONS).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        number = 1
        while True:
            name = summary.name if number == 1 else f"{summary.name}-{number}"
            named = summary.model_copy(update={"name": name})
            (staging / SUMMARY).write_text(named.model_dump_json(indent=1) + "\n", encoding="utf-8")
            sync_below(staging)
            try:
                os.rename(staging, parent / name)
            except OSError:
                if not (parent / name).exists():
                    raise
                number += 1
            else:
                sync(parent)
                return parent / name
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_summary(folder: Path) -> Summary:
    """The summary in an evaluation's folder. Raises UserError where it cannot be read."""
    try:
        return Summary.model_validate_json((folder / SUMMARY).read_bytes())
    except (OSError, ValidationError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{folder / SUMMARY} is no summary of an evaluation: {said}") from error


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every row of an evaluation. Raises UserError where they cannot be read."""
    try:
        return read_lines(folder / COMPLETIONS)
    except (OSError, ValueError) as error:
        raise UserError(f"the completions in {folder} cannot be read: {error}") from error


def evaluations_of(place: Path) -> list[Path]:
    """The evaluations of a run directory, the oldest first."""
    found = [path.parent for path in (place / EVALUATIONS).glob(f"*/{SUMMARY}")]
    whole = [folder for folder in found if not folder.name.endswith(".partial")]
    return sorted(whole, key=lambda folder: ((folder / SUMMARY).stat().st_mtime_ns, folder.name))
