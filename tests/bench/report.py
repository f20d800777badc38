"""What a bench writes: figures, machine, commit, targets and whether they are met."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """`figure` may be at most `limit`, or must be at `least` that."""

    figure: str
    limit: float
    least: bool = False

    def reached(self, value: float) -> bool:
        """Whether a figure of this value will do."""
        return value >= self.limit if self.least else value <= self.limit

    def __str__(self) -> str:
        """As `make bench` prints it."""
        return f"{self.figure} {'>=' if self.least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Measured:
    """What a bench has found. `more` is for people: a profile, say."""

    figures: Mapping[str, float]
    targets: tuple[Target, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    def met(self) -> dict[str, bool]:
        """Whether each target is reached."""
        return {
            target.figure: target.reached(self.figures[target.figure]) for target in self.targets
        }


def machine() -> dict[str, Any]:
    """Where it was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that was measured, with a + where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def write(name: str, measured: Measured, folder: Path = REPOSITORY / "runs" / "bench") -> Path:
    """Write `folder`/NAME.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    report = {
        "name": name,
        "machine": machine(),
        "commit": commit(),
        "figures": dict(measured.figures),
        "targets": {target.figure: target.limit for target in measured.targets},
        "met": measured.met(),
        **measured.more,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path
