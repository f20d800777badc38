"""One run of every role that is hit again and again; after each hit it must be whole.

The next hit comes when the last is overcome: the victim's role has a new process, and two more
steps are done. A run of twelve hits takes little longer than one of one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from aligntune.quickstart.task import make_model, make_tokenizer
from tests import drivers
from tests.chaos.trial import (
    PARENTS,
    PAUSE_S,
    RAY,
    Hit,
    books_at_the_end,
    books_of,
    find,
    lines_of,
    role_starts,
    shared_memory,
)

GROUPS, STALENESS = 4, 1
BETWEEN = 2  # steps that a run makes after a hit, before it counts as overcome
IN_A_PAUSE = 8  # steps at most while one stands still, for rewards are held then: see `JUDGE`
DEADLINE_S = 240.0  # for a hit to be overcome, a run to start, and what it leaves to be gone

HELD = "held"

Process = subprocess.Popen[bytes] | drivers.Forked

# While the file is there each call takes seconds, or a fast machine would make its last step in a
# pause.
JUDGE = """\
import os
import time


def judge(completions, **columns):
    end = time.monotonic() + 5
    while os.path.exists(HELD) and time.monotonic() < end:
        time.sleep(0.05)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


@dataclass(frozen=True)
class Parts:
    """What the run is made of."""

    engine: str = "transformers"
    strategy: str = "torch"

    def victims(self, known: list[str]) -> list[str]:
        """Those of the known victims that such a run has."""
        return [name for name in known if name != "engine" or self.engine == "vllm"]


def config(folder: Path, parts: Parts, steps: int, seed: int) -> dict[str, Any]:
    """A run of every role, of about a second a step."""
    model = make_model(seed=0)
    model.save_pretrained(folder / "model")
    Qwen2ForSequenceClassification(
        Qwen2Config(**model.config.to_dict() | {"num_labels": 1, "pad_token_id": 0})
    ).save_pretrained(folder / "reward_model")
    for name in ("model", "reward_model"):
        make_tokenizer().save_pretrained(folder / name)
    rows = [{"prompt": f"{10 + i}+{i % 10}", "answer": str(10 + i + i % 10)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(JUDGE.replace("HELD", repr(str(folder / HELD))))
    return {
        "algorithm": {"name": "ppo"},
        "model": {"name": str(folder / "model")},
        "data": {"path": str(folder / "data.jsonl")},
        "rewards": [
            {"function": f"{folder / 'judge.py'}:judge", "timeout_s": 10.0},
            {"model": str(folder / "reward_model")},
        ],
        "output_dir": str(folder / "run"),
        "train": {
            "steps": steps,
            "groups_per_step": GROUPS,
            "completions_per_group": 4,
            "max_staleness": STALENESS,
            "seed": seed,
            "silence_timeout_s": 10.0,
        },
        "rollout": {
            "engine": parts.engine,
            "max_completion_length": 6,
            "max_prompt_length": 16,
            "max_restarts": 200,
        },
        "policy": {"strategy": parts.strategy, "max_restarts": 200},
        **{role: {"max_restarts": 200} for role in ("reward", "reference")},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "tracking": {"trackers": [], "samples_per_step": 1},
        "cluster": {"object_store_gib": 0.25},
    }


class Campaign:
    """A run, its hits one after the other, and what each came to."""

    def __init__(self, folder: Path, parts: Parts, hits: list[Hit], seed: int) -> None:
        """Writes the run's config into `folder`."""
        self.folder, self.run, self.hits, self.seed = folder, folder / "run", hits, seed
        pauses = sum(hit.pauses for hit in hits)
        self.steps = (len(hits) + 1) * (BETWEEN + 2) + pauses * IN_A_PAUSE
        self.dice = random.Random(seed)
        self.seen: dict[int, psutil.Process] = {}
        self.path = folder / "config.yaml"
        self.path.write_text(yaml.safe_dump(config(folder, parts, self.steps, seed)))
        self.process = self._launched()

    def results(self) -> Iterator[dict[str, Any]]:
        """One row a hit, as it is overcome; its `problems` are empty where all held. The row of the
        last hit has those of the run's end too. After a problem nothing more is hit."""
        before = shared_memory()
        try:
            self._until(lambda: self._step() >= 1, "the first step")
            for number, hit in enumerate(self.hits, start=1):
                row = self._row(hit)
                if number == len(self.hits) and not row["problems"]:
                    row["problems"] = self._end(before)
                yield row
                if row["problems"]:
                    break
        finally:
            self.process.kill()
            self.process.wait()

    def _row(self, hit: Hit) -> dict[str, Any]:
        problems: list[str] = []
        seconds = None
        at_step = self._step()
        try:
            seconds = self._overcome(hit)
        except TimeoutError as error:
            problems.append(str(error))
        problems += books_of(self.run, STALENESS)
        row = {
            "victim": hit.victim,
            "signal": hit.signal.name,
            "at_step": at_step,
            "seed": self.seed,
            "seconds": None if seconds is None else round(seconds, 1),
            "problems": problems,
        }
        if problems:
            row["output"] = self._said()
        return row

    def _overcome(self, hit: Hit) -> float:
        """Hit, and wait until the run is as if nothing had been; returns how long that took."""
        time.sleep(self.dice.uniform(0, 0.7))  # anywhere in a step
        victim = self._until(lambda: self._found(hit.victim), f"a process of {hit.victim}")
        role = PARENTS.get(hit.victim, hit.victim)
        starts, step = role_starts(role, self.run), self._step()
        began = time.monotonic()
        self._notice_children()
        if hit.pauses:
            (self.folder / HELD).touch()
        victim.send_signal(hit.signal)
        if hit.pauses:
            time.sleep(PAUSE_S)
            victim.resume()
            (self.folder / HELD).unlink()
        elif hit.ends_the_command:
            self._until(lambda: self.process.poll() is not None, "the end of the command", True)
            self.process = self._launched()  # at once; `_end` sees that what was before it is gone
        elif hit.victim not in ("reward child", *RAY):
            self._until(lambda: role_starts(role, self.run) > starts, f"a new {role}")
        self._until(lambda: self._step() >= step + BETWEEN, f"step {step + BETWEEN}")
        return time.monotonic() - began

    def _end(self, before: set[str]) -> list[str]:
        """What is wrong once the run has made its last step."""
        self._until(lambda: self.process.poll() is not None, "the end of the run", True)
        problems = []
        if self.process.returncode:
            problems.append(f"exit code {self.process.returncode}")
        problems += books_at_the_end(self.run, self.steps, GROUPS, STALENESS)
        try:
            self._nothing_is_left()
        except TimeoutError as error:
            problems.append(str(error))
        if leaked := shared_memory() - before:
            problems.append(f"shared memory is left: {', '.join(sorted(leaked))}")
        return problems

    def _until(self, holds: Any, what: str, ended_is_well: bool = False) -> Any:
        """The first true value of `holds`. Raises TimeoutError past the deadline, or where the
        command has ended meanwhile."""
        end = time.monotonic() + DEADLINE_S
        while not (value := holds()):
            if self.process.poll() is not None and not ended_is_well:
                raise TimeoutError(
                    f"ended with {self.process.returncode} before {what}: {self._said()[-600:]}"
                )
            if time.monotonic() > end:
                raise TimeoutError(f"waited {DEADLINE_S:g} s for {what}")
            self._notice_children()
            time.sleep(0.1)
        return value

    def _found(self, victim: str) -> psutil.Process | None:
        try:
            return find(victim, psutil.Process(self.process.pid), self.run)
        except psutil.NoSuchProcess:  # the command has ended, which `_until` says
            return None

    def _notice_children(self) -> None:
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass

    def _nothing_is_left(self) -> None:
        """Wait for the processes of a run that has ended. Raises TimeoutError with those left."""
        _, left = psutil.wait_procs(list(self.seen.values()), timeout=120)
        self.seen.clear()
        if left:
            raise TimeoutError(f"left behind: {', '.join(f'{p.pid} {p.name()}' for p in left)}")

    def _said(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")[-6000:]

    def _step(self) -> int:
        return len(lines_of(self.run / "metrics.jsonl"))

    def _launched(self) -> Process:
        return launched(self.folder, "train", str(self.path))


def launched(folder: Path, *arguments: str) -> Process:
    """`aligntune` with these arguments, on a Ray of its own, with its output in `folder`."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (folder / "output.txt").open("ab") as output:
        return drivers.start(
            ["-m", "aligntune.cli", *arguments],
            output=output,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )


def draw(trials: int, seed: int, victims: list[str], known: dict[str, Any]) -> list[Hit]:
    """So many hits of the victims, each before any comes again, in an order by the seed."""
    dice = random.Random(seed)
    every = [Hit(name, sent) for name in victims for sent in known[name]]
    hits: list[Hit] = []
    while len(hits) < trials:
        hits += dice.sample(every, len(every))
    return hits[:trials]
