"""A run as it lies on disk: read from its directory alone, while it goes on, when it has ended, or
as a kill has left it.

Invariant: nothing is written, and what cannot be read is left out and told in `problems`; a last
line that is being written, or was torn by a kill, is no problem.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import yaml

from aligntune.errors import UserError
from aligntune.runs.books import Books, LedgerError, audit
from aligntune.runs.jsonl import line_end, lines_from_end, read_lines
from aligntune.runs.rundir import DEFAULTS
from aligntune.tracking.metrics import EventKind

PREFERENCE = ("dpo", "reward_model", "sft")
"""The algorithms whose jobs go over a table and have no groups."""

SAMPLES, EVAL_SAMPLES = "samples.jsonl", "eval_samples.jsonl"
POINTS = 2000  # steps of a curve that a page holds; of more, every k-th
OF_EVERY_STEP = ("step", "time/", "throughput/tokens_per_s", "reward/mean")
"""What summaries read of every step, by the beginning of its name."""
WINDOWS = 256  # places of a large file in which lines are looked for
COPIED_SECONDS = 60.0  # after its last event the config.yaml of a start is of a copy

Row = dict[str, Any]


@dataclass(frozen=True)
class Ending:
    """Where a run stands."""

    state: Literal["running", "finished", "stopped", "killed"]
    reason: str = ""  # why it stopped, in the run's words


@dataclass
class RunOnDisk:
    """One run directory; each file is read when it is first asked for."""

    path: Path
    problems: list[str] = field(default_factory=list)  # what of it could not be read, and why

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path.absolute().name

    @cached_property
    def _config(self) -> str:
        return (self.path / "config.yaml").read_text(encoding="utf-8", errors="replace")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The tree of config.yaml; empty where that cannot be read."""
        try:
            tree = yaml.safe_load(self._config)
        except yaml.YAMLError as error:
            self.problems.append(f"config.yaml: {' '.join(str(error).split())}")
            return {}
        return tree if isinstance(tree, dict) else {}

    @property
    def versions(self) -> list[str]:
        """What it ran with, as `torch 2.13.0`: the head of config.yaml."""
        return [line[2:] for line in self._config.splitlines() if line.startswith("# ")]

    @cached_property
    def defaults(self) -> dict[str, Any] | None:
        """{dotted path: default} of each key that has another value; None where nobody wrote it."""
        path = self.path / DEFAULTS
        try:
            found = json.loads(path.read_bytes()) if path.is_file() else None
        except ValueError as error:
            self.problems.append(f"{DEFAULTS}: {error}")
            return None
        return found if isinstance(found, dict) else None

    @property
    def algorithm(self) -> str:
        """Its name; empty where config.yaml does not say."""
        chosen = self.config.get("algorithm")
        return str(chosen.get("name", "")) if isinstance(chosen, dict) else str(chosen or "")

    @property
    def is_preference(self) -> bool:
        """Whether it is a job over pairs, which has no groups, samples or ledger."""
        return self.algorithm in PREFERENCE

    def _rows(self, name: str) -> list[Row]:
        return [row for row in self._lines(name) if isinstance(row, dict)]

    def _lines(self, name: str) -> list[Any]:
        path = self.path / name
        if not path.is_file():
            return []
        try:
            return read_lines(path)
        except ValueError:  # some line is damaged; the others are as good as before
            return list(self._readable(path))

    def _readable(self, path: Path) -> Iterator[Any]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    if line.endswith(b"\n"):
                        self.problems.append(f"{path.name}:{number} is damaged and left out")

    @property
    def metrics(self) -> list[Row]:
        """An object a step, ascending; of more than `POINTS` with no more figures than summaries
        read, but for evaluations."""
        return self._steps[0]

    @property
    def drawn(self) -> list[Row]:
        """The steps that curves show, with all their figures: every k-th, up to the last."""
        return self._steps[1]

    @cached_property
    def _steps(self) -> tuple[list[Row], list[Row]]:
        """`metrics` and `drawn`; all figures of a long run would take GB."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return [], []
        with path.open("rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(2**16), b""))
        every = max(1, -(-lines // POINTS))
        steps, drawn, whole = list[Row](), list[Row](), Row()
        for row in itertools.islice(self._readable(path), lines):
            if not isinstance(row, dict) or "step" not in row:
                continue
            whole = {sys.intern(name): value for name, value in row.items()}
            if (lines - 1 - len(steps)) % every == 0:
                drawn.append(whole)
                steps.append(whole)
            elif any(name.startswith("eval/") for name in whole):
                steps.append(whole)
            else:
                steps.append({n: v for n, v in whole.items() if n.startswith(OF_EVERY_STEP)})
        if steps and (not drawn or drawn[-1] is not steps[-1]):  # lines were damaged
            steps[-1] = whole
            drawn.append(whole)
        return steps, drawn

    @cached_property
    def evals(self) -> list[Row]:
        """An object an evaluation: those of evals.jsonl, or of a preference job's steps."""
        own = [row for row in self._rows("evals.jsonl") if "step" in row]
        return own or [row for row in self.metrics if any(k.startswith("eval/") for k in row)]

    @cached_property
    def events(self) -> list[Row]:
        """What happened, in order; each with `time` and `kind`."""
        return [row for row in self._rows("events.jsonl") if {"time", "kind"} <= row.keys()]

    def samples(self, most_bytes: int) -> tuple[list[Row], int]:
        """Groups of training steps, and how many there are in all; both as `spread` has them."""
        return self._spread(SAMPLES, most_bytes)

    def eval_samples(self, most_bytes: int) -> tuple[list[Row], int]:
        """Groups of evaluations, as `samples`."""
        return self._spread(EVAL_SAMPLES, most_bytes)

    def _spread(self, name: str, most_bytes: int) -> tuple[list[Row], int]:
        path = self.path / name
        if not path.is_file():
            return [], 0
        with path.open("rb") as file:
            lines, in_all = spread(file, most_bytes)
        rows = []
        for start, line in lines.items():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                self.problems.append(f"{name}: the line at byte {start} is damaged and left out")
        return [row for row in rows if _is_group(row)], in_all

    def groups(self, name: str) -> Iterator[Row]:
        """Groups of samples.jsonl or eval_samples.jsonl, one at a time: a file may be larger than
        memory."""
        path = self.path / name
        if path.is_file():
            yield from filter(_is_group, self._readable(path))

    def last_groups(self, name: str) -> list[Row]:
        """Those of the last step that has any, in their order; read from the end of the file."""
        path, last = self.path / name, list[Row]()
        if not path.is_file():
            return []
        try:
            for row in filter(_is_group, (row for _, row in lines_from_end(path))):
                if last and row["step"] != last[-1]["step"]:
                    break
                last.append(row)
        except (ValueError, RecursionError):  # a damaged line: the others are found from the start
            last = []
            for row in self.groups(name):
                last = [*last, row] if last and row["step"] == last[-1]["step"] else [row]
            return last
        return last[::-1]

    @cached_property
    def books(self) -> Books | None:
        """What became of every group; None without a ledger, or with one that does not balance."""
        path = self.path / "ledger.jsonl"
        if not path.is_file() or not path.stat().st_size:
            return None
        try:
            return audit(path)
        except LedgerError as error:
            self.problems.append(f"the books do not balance: {error}")
            return None

    @cached_property
    def ending(self) -> Ending:
        """Where the run stands. A run is killed where its events have no end and no process holds
        its lock."""
        for event in reversed(self.events):
            match event["kind"]:
                case EventKind.RUN_FINISHED:
                    return Ending("finished")
                case EventKind.RUN_STOPPED:
                    return Ending("stopped", str(event.get("reason", "")))
                case EventKind.RUN_STARTED:
                    break
        return Ending("running" if _is_held(self.path / "run.lock") else "killed")

    @property
    def last_sign(self) -> float | None:
        """When a run without an end was alive last, in seconds since 1970: now, or when a killed
        one has written figures. None with an end, and where the files' times are of a copy."""
        if self.ending.state == "running":
            return time.time()
        if self.ending.state != "killed" or not self.events:
            return None
        config, metrics = self.path / "config.yaml", self.path / "metrics.jsonl"
        last = max(event["time"] for event in self.events)
        is_copy = config.stat().st_mtime > last + COPIED_SECONDS
        return None if is_copy or not metrics.is_file() else metrics.stat().st_mtime


def open_run(path: Path) -> RunOnDisk:
    """The run in a folder. Raises UserError where there is none."""
    if not (path / "config.yaml").is_file():
        inside = sorted(p.parent for p in path.glob("*/config.yaml"))
        near = f"; there is one in {inside[0]}" if inside else ""
        raise UserError(
            f"no run in {path}: it has no config.yaml{near or '; name a run directory'}"
        )
    return RunOnDisk(path)


def spread(file: BinaryIO, most: int) -> tuple[dict[int, bytes], int]:
    """Complete lines of a file by the byte at which they start, ascending, and how many there are
    in all.

    A file of more than `most` bytes gives lines of about as many, from places that are spread up to
    its end, and its last one; a long line is as likely to be among them as a short one. How many
    there are is an estimate then, to three digits. Little more is read than these lines: the file
    may be larger than memory. It may be shortened meanwhile: what is gone is left out.
    """
    end = line_end(file, 0, file.seek(0, os.SEEK_END))
    if end <= most:
        lines = dict(_lines(file, 0, end))
        return lines, len(lines)
    windows, lines = max(1, min(WINDOWS, most)), {}
    width, chance = max(1, most // windows), random.Random(0)  # even steps may meet even lines
    for window in range(windows):
        first, after = end * window // windows, end * (window + 1) // windows
        start = chance.randint(first, after - width)
        lines |= _begun_in(file, start, start + width)
    last = dict(_lines(file, line_end(file, 0, end - 1), end))
    lengths = [len(line) for line in (lines or last).values()]
    lines |= last
    if not lines:
        return {}, 0
    in_all = end * len(lengths) / sum(lengths)
    return lines, max(len(lines), round(float(f"{in_all:.3g}")))


def _begun_in(file: BinaryIO, start: int, end: int) -> dict[int, bytes]:
    """The complete lines that begin in the bytes from `start` to `end` of a file."""
    if start:
        file.seek(start - 1)
        before = file.readline(end - start)
        if not before.endswith(b"\n"):
            return {}
        start += len(before) - 1
    return dict(_lines(file, start, end))


def _lines(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The complete lines of a file from `start`, where one begins, up to the last one that begins
    before `end`; each with where it does."""
    file.seek(start)
    while start < end and (line := file.readline()).endswith(b"\n"):
        yield start, line
        start += len(line)


def chosen(groups: Iterable[Row], step: int | None, order: str, number: int) -> list[Row]:
    """At most `number` groups to look at, of `step` or of all steps: the first ones, or those with
    the `best` or `worst` mean reward. Groups without a reward come last. No others are kept in
    memory."""
    kept = (row for row in groups if step is None or row["step"] == step)
    if not order:
        return list(itertools.islice(kept, number))
    sign = -1 if order == "best" else 1

    def key(group: Row) -> tuple[bool, float]:
        mean = mean_reward(group)
        return mean is None, sign * (mean or 0.0)

    return heapq.nsmallest(number, kept, key)


def _is_group(row: object) -> bool:
    return isinstance(row, dict) and "step" in row


def mean_reward(group: Row) -> float | None:
    """Over the completions of a group that have one; None where none has."""
    rewards = [said.get("reward") for said in group.get("completions", ())]
    found = [reward for reward in rewards if reward is not None]
    return sum(found) / len(found) if found else None


def _is_held(lock: Path) -> bool:
    """Whether a process trains here. None does on a file system without locks: it was refused."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
