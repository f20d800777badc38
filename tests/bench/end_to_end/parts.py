"""Measures systems in parts that outlive a call: one system for some steps is a part, and a file.

Parts lie in runs/bench/parts/ and are measured in turn, so that a slow hour of the machine meets
all systems: round 1 of each, then round 2. A call makes what is missing, as many as it is told
to, and joins all when nothing is. A part counts while the work, its steps and, where it is ours,
the commit are the same.

    python -m tests.bench.end_to_end.parts SYSTEM STEPS FILE     one part, with the work on stdin
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from tests.bench.end_to_end.seen import Step
from tests.bench.end_to_end.work import Work
from tests.bench.report import REPOSITORY, commit

FOLDER = REPOSITORY / "runs" / "bench" / "parts"
BARE = ("trl", "floor")
LEFT = 3  # exit code where parts are left to measure


class Unfinished(Exception):
    """So many parts are left."""


class Options(BaseModel):
    """How much is measured, and by this call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rounds: int = 3
    steps: int = 2  # of a part, after its warm-up; TRL makes one
    parts: int | None = None  # at most, by this call
    again: bool = False  # measure anew what is there
    prompts: int | None = None  # of a step: fewer than the work's
    cores: int | None = None  # fewer than the machine's

    @property
    def whole(self) -> bool:
        """Whether it is the work that has targets: less is for a look, or for a busy machine."""
        return self.prompts is None and self.cores is None

    def of(self, work: Work) -> Work:
        """The work, or what of it is asked for."""
        return work.model_copy(
            update={"prompts": self.prompts or work.prompts, "cores": self.cores or work.cores}
        )


class Part(BaseModel):
    """A system's steps of one round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str
    work: Work
    commit: str
    asked: int
    load: float  # of the machine, when it began
    seconds: float  # of the whole part, start and warm-up too
    steps: tuple[Step, ...]


def steps_of(system: str, options: Options) -> int:
    """Steps of a part: TRL's take minutes."""
    return 1 if system == "trl" else options.steps


def path_of(system: str, round_: int, work: Work, folder: Path) -> Path:
    """The file of a part; works of other sizes have other names."""
    size = f"{work.hidden_size}x{work.layers}-{work.samples}-{work.cores or 'all'}"
    return folder / size / f"{round_}-{system}.json"


def there(path: Path, system: str, work: Work, steps: int) -> Part | None:
    """The part of that file, if it counts."""
    if not path.exists():
        return None
    part = Part.model_validate_json(path.read_text())
    same = part.system == system and part.work == work and part.asked == steps
    return part if same and (system in BARE or part.commit == commit()) else None


def measured(
    systems: Sequence[str], work: Work, options: Options, folder: Path = FOLDER
) -> dict[str, list[Part]]:
    """All parts by system, those that are missing measured now.

    Raises:
        Unfinished: the call's number of parts is used up.
    """
    found: dict[str, list[Part]] = {system: [] for system in systems}
    left, made = 0, 0
    for round_ in range(1, options.rounds + 1):
        for system in systems:
            path = path_of(system, round_, work, folder)
            steps = steps_of(system, options)
            part = None if options.again else there(path, system, work, steps)
            if part is None and (options.parts is None or made < options.parts):
                path.parent.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, "-m", __spec__.name, system, str(steps), str(path)]
                print(f"round {round_} of {options.rounds}: {system}", flush=True)
                subprocess.run(command, input=work.model_dump_json(), text=True, check=True)
                part, made = there(path, system, work, steps), made + 1
            if part is None:
                left += 1
            else:
                found[system].append(part)
    if left:
        raise Unfinished(f"{left} parts are left; run it again")
    return found


def figures(found: Mapping[str, Sequence[Part]]) -> dict[str, float]:
    """Medians over all steps of each system."""
    table: dict[str, float] = {}
    for system, parts in found.items():
        steps = [step for part in parts for step in part.steps]
        samples = parts[0].work.samples
        medians = {
            "s_a_step": [step.wall_s for step in steps],
            "tokens_a_sample": [step.tokens / samples for step in steps],
            "samples_a_s": [samples / step.wall_s for step in steps],
            "tokens_a_s": [step.tokens / step.wall_s for step in steps],
            "ms_a_token": [1e3 * step.wall_s / step.tokens for step in steps],
            "cpu_ms_a_token": [1e3 * step.cpu_s / step.tokens for step in steps],
        }
        for name in {name for step in steps for name in step.parts}:
            medians[f"part_s/{name}"] = [step.parts.get(name, 0.0) for step in steps]
        table |= {f"{system}/{name}": statistics.median(each) for name, each in medians.items()}
        table[f"{system}/steps"] = len(steps)
    return table


def more(found: Mapping[str, Sequence[Part]]) -> dict[str, object]:
    """For people: when, on which commit and how busy a machine each part was measured."""
    keep = {"system", "commit", "load", "seconds"}
    return {"parts": [part.model_dump(include=keep) for each in found.values() for part in each]}


def run(system: str, work: Work, steps: int) -> Sequence[Step]:
    """One system, in this process."""
    if system == "trl":
        from tests.bench.end_to_end import trl

        return trl.run(work, steps)
    if system == "floor":
        from tests.bench.end_to_end import floor

        return floor.run(work, steps)
    from tests.bench.end_to_end import ours

    return ours.run(work, steps, ours.VARIANTS[system])


def main(arguments: Sequence[str]) -> None:
    """Measure one part and write it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("steps", type=int)
    parser.add_argument("file", type=Path)
    asked = parser.parse_args(arguments)
    work = Work.model_validate_json(sys.stdin.read())
    began, load = time.monotonic(), os.getloadavg()[0]
    part = Part(
        system=asked.system,
        work=work,
        commit=commit(),
        asked=asked.steps,
        load=load,
        steps=tuple(run(asked.system, work, asked.steps)),
        seconds=time.monotonic() - began,
    )
    asked.file.write_text(part.model_dump_json(indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
