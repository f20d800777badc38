"""One trial: a run, a process of it that is killed or stopped, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from aligntune.online.ledger import LedgerError, audit
from aligntune.quickstart.task import make_model, make_tokenizer
from aligntune.runs.jsonl import read_lines

STEPS, GROUPS, STALENESS = 12, 4, 1
DEADLINE_S = 600.0  # for a run to end, and for what it leaves to be gone
KILL, STOP = signal.SIGKILL, signal.SIGSTOP

VICTIMS: dict[str, tuple[signal.Signals, ...]] = {
    "rollout": (KILL, STOP),
    "reward": (KILL, STOP),
    "reward child": (KILL, STOP),
    "reference": (KILL, STOP),
    "policy": (KILL, STOP),
    "critic": (KILL, STOP),
    "driver": (KILL,),
    "raylet": (KILL,),
    "gcs_server": (KILL,),
}
"""What may be hit, and how. A driver or a Ray that is stopped for ever is the machine's own."""

AGAIN = frozenset({"driver", "raylet", "gcs_server"})  # the same command goes on after these


@dataclass(frozen=True)
class Trial:
    """Who is hit, how, and after which step."""

    victim: str
    signal: signal.Signals
    at_step: int

    def describe(self) -> str:
        """In one line."""
        return f"{self.signal.name} to {self.victim} after step {self.at_step}"


def config(folder: Path, trial: Trial, seed: int) -> dict[str, Any]:
    """A run of every role that the trial needs, of a few seconds a step at most."""
    make_model(seed=0).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{10 + i}+{i % 10}", "answer": str(10 + i + i % 10)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(
        "def judge(completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]\n"
    )
    return {
        "algorithm": {"name": "ppo"}
        if trial.victim == "critic"
        else {"name": "grpo", "beta": 0.04},
        "model": {"name": str(folder / "model")},
        "data": {"path": str(folder / "data.jsonl")},
        "rewards": [{"function": f"{folder / 'judge.py'}:judge", "timeout_s": 20.0}],
        "output_dir": str(folder / "run"),
        "train": {
            "steps": STEPS,
            "groups_per_step": GROUPS,
            "completions_per_group": 4,
            "max_staleness": STALENESS,
            "seed": seed,
            "silence_timeout_s": 20.0,
        },
        "rollout": {"engine": "transformers", "max_completion_length": 6, "max_prompt_length": 16},
        "checkpoint": {"every_steps": 2, "keep_last": 2},
        "tracking": {"trackers": [], "samples_per_step": 1},
        "cluster": {"object_store_gib": 0.25},
    }


def run_trial(folder: Path, trial: Trial, seed: int) -> dict[str, Any]:
    """What became of a trial; `problems` is empty where all held."""
    path, run = folder / "config.yaml", folder / "run"
    path.write_text(yaml.safe_dump(config(folder, trial, seed)))
    shared_before = _shared_memory()
    seen: dict[int, psutil.Process] = {}
    codes: list[int | None] = []
    problems: list[str] = []
    began = time.monotonic()
    hit: float | None = None
    recovered: float | None = None
    while len(codes) < 3 and 0 not in codes:
        process = launched(folder, path)
        while process.poll() is None:
            if time.monotonic() - began > DEADLINE_S:
                problems.append("it had not ended in time")
                break
            for child in psutil.Process(process.pid).children(recursive=True):
                seen.setdefault(child.pid, child)
            steps = len(lines_of(run / "metrics.jsonl"))
            if hit is None and steps >= trial.at_step:
                hit = hit_one(trial, process, run)
            elif hit is not None and recovered is None and steps > trial.at_step:
                recovered = time.monotonic() - hit
            time.sleep(0.1)
        if problems:
            process.kill()
        codes.append(process.wait())
    if not problems:
        expected = {0} if trial.victim not in AGAIN else {0, 1, -KILL}
        if codes[-1] != 0 or not set(codes) <= expected:
            problems.append(f"exit codes {codes}")
        problems += _books(run)
    _, left = psutil.wait_procs(list(seen.values()), timeout=60)
    problems += [f"process {each.pid} is left" for each in left]
    if leaked := _shared_memory() - shared_before:
        problems.append(f"shared memory is left: {', '.join(sorted(leaked))}")
    if hit is None:
        problems.append("the run ended before anything was hit")
    said = (folder / "output.txt").read_text(errors="replace")[-4000:]
    return {
        "victim": trial.victim,
        "signal": trial.signal.name,
        "at_step": trial.at_step,
        "seed": seed,
        "exit_codes": codes,
        "seconds": round(time.monotonic() - began, 1),
        "seconds_to_the_next_step": None if recovered is None else round(recovered, 1),
        "problems": problems,
        **({"output": said} if problems else {}),
    }


def launched(folder: Path, path: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "aligntune.cli", "train", str(path)],
            stdout=output,
            stderr=output,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )


def hit_one(trial: Trial, process: subprocess.Popen[bytes], run: Path) -> float | None:
    """When the victim was hit; None where it is not there yet."""
    below = psutil.Process(process.pid).children(recursive=True)
    victim: psutil.Process | None = None
    if trial.victim == "driver":
        victim = psutil.Process(process.pid)
    elif trial.victim in AGAIN:
        victim = _first(below, lambda each: each.name() == trial.victim)
    else:
        role = trial.victim.partition(" ")[0]
        started = [e for e in lines_of(run / "events.jsonl") if e["kind"] == "role_started"]
        pids = [e["pid"] for e in started if e["role"].startswith(f"{role}-")]
        victim = _first(below, lambda each: bool(pids) and each.pid == pids[-1])
        if victim is not None and trial.victim == "reward child":
            victim = next(iter(victim.children(recursive=True)), None)
    if victim is None:
        return None
    victim.send_signal(trial.signal)
    return time.monotonic()


def _first(
    processes: list[psutil.Process], fits: Callable[[psutil.Process], bool]
) -> psutil.Process | None:
    for process in processes:
        try:
            if fits(process):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def _books(run: Path) -> list[str]:
    """What is wrong with what a run that ended well has written."""
    problems = []
    try:
        books = audit(run / "ledger.jsonl")
    except LedgerError as error:
        return [str(error)]
    if not books.balanced or books.open or books.trained != STEPS * GROUPS or books.quarantined:
        problems.append(f"the books: {books}")
    rows = lines_of(run / "metrics.jsonl")
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        problems.append(f"steps {[row['step'] for row in rows]}")
    if any(row["staleness/max"] > STALENESS for row in rows):
        problems.append("a group was too old")
    if not (run / "model" / "model.safetensors").is_file():
        problems.append("no model")
    return problems


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file, none where there is none yet."""
    return list(read_lines(path)) if path.exists() else []


def _shared_memory() -> set[str]:
    return (
        {entry.name for entry in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
    )
