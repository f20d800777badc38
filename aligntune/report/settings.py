"""The configurations of one or two runs as rows of a table. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aligntune.decisions import KEPT
from aligntune.runs.reading import RunOnDisk
from aligntune.runs.rundir import flatten
from aligntune.tracking.metrics import EventKind


@dataclass(frozen=True)
class Setting:
    """One key."""

    path: str
    values: tuple[str, ...]  # of each run
    default: str | None  # where the first run has another value
    why: str  # where it was decided by the machines
    differs: bool  # between the runs


def settings(runs: Sequence[RunOnDisk]) -> list[Setting]:
    """Every key of every run, in the order of the first run's config.yaml."""
    trees = [flatten(run.config) for run in runs]
    decided = _decided(runs[0].events)
    defaults = runs[0].defaults or {}
    rows = []
    for path in dict.fromkeys(path for tree in trees for path in tree):
        values = tuple(_text(tree, path) for tree in trees)
        default = _json(defaults[path]) if path in defaults else None
        rows.append(
            Setting(
                path=path,
                values=values,
                default=default,
                why=_why(path, decided),
                differs=len(set(values)) > 1,
            )
        )
    return rows


def _decided(events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{dotted path: why it got its value} of what the last start left open. One that goes on keeps
    a value: the reason is that of the start which decided it."""
    first: dict[tuple[str, str], str] = {}
    decided: dict[str, str] = {}
    for event in events:
        if event["kind"] == EventKind.RUN_STARTED:
            decided = {}
        elif event["kind"] == EventKind.SETTLED and "path" in event:
            path, why = event["path"], str(event.get("why", ""))
            same = (path, _json(event.get("value")))
            decided[path] = first.get(same, why) if why == KEPT else why
            first[same] = decided[path]
    return decided


def _why(path: str, decided: Mapping[str, str]) -> str:
    """The reason for it, or for the section that it is in."""
    while path:
        if path in decided:
            return decided[path]
        path = path.rpartition(".")[0]
    return ""


def _text(tree: Mapping[str, Any], path: str) -> str:
    return _json(tree[path]) if path in tree else "—"


def _json(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
