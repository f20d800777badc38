"""A run of an hour with a death a minute: whether memory and open files stay as they were.

make chaos ARGS="--soak 60 --seed 0"

The quickstart's task by GRPO with a reference model, one step after the other until the time is
over. A minute after the last a process of another role gets SIGKILL; the driver lives throughout.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from aligntune.online.ledger import audit
from aligntune.quickstart.run import ACCURACY
from tests.chaos.campaign import launched
from tests.chaos.trial import KILL, find, lines_of

VICTIMS = ("rollout", "reward", "reward child", "reference", "policy")
WATCHED = ("rollout", "reward", "reference", "policy")
EVERY_S = 5.0  # between two looks at memory
PER_DEATH_S = 60.0
WARM_S = {"driver": 600.0}  # of a life, in which memory may grow: all has been done once then
WARM_ACTOR_S = 90.0
WINDOW_S = 60.0  # whose median is compared
GROWTH = 1.05
FILES = 2  # more open files than before
FILES_OF_A_CHILD = 2
"""What a process of a reward costs its actor, which starts another where calls wait for one."""
TARGET = 0.9
SETTINGS = {
    "algorithm.beta": 0.001,
    "rollout.engine": "transformers",
    "eval.every_steps": 100,
    "checkpoint.every_steps": 25,
    "reward.max_concurrent_groups": 2,  # or more processes of rewards come as groups wait
    "train.steps": 1_000_000,
    **{f"{role}.max_restarts": 1000 for role in ("rollout", "reward", "reference", "policy")},
}


@dataclass(frozen=True)
class Look:
    """At one process, `age` seconds after its start."""

    age: float
    memory: int  # bytes that are resident; a fork shares some with the others
    files: int


@dataclass(frozen=True)
class Life:
    """Of one process, from warm to its end: medians over a window at either side."""

    role: str
    seconds: float
    memory: tuple[float, float]
    files: tuple[float, float]


def lived(role: str, looks: Sequence[Look]) -> Life | None:
    """What a process held when it was warm, and at its end; None where it had no time for both."""
    warm = WARM_S.get(role, WARM_ACTOR_S)
    if not looks or looks[-1].age < warm + 2 * WINDOW_S:
        return None
    first = [look for look in looks if warm <= look.age < warm + WINDOW_S]
    last = [look for look in looks if look.age > looks[-1].age - WINDOW_S]
    return Life(
        role,
        looks[-1].age,
        (median(look.memory for look in first), median(look.memory for look in last)),
        (median(look.files for look in first), median(look.files for look in last)),
    )


def grown(lives: Sequence[Life]) -> list[str]:
    """What is not flat: within a life, and from a role's first life to its last. Pure."""
    found = [f"{life.role} in {life.seconds:.0f} s: {_told(life)}" for life in lives if _rose(life)]
    for role in sorted({life.role for life in lives}):
        first, *others = [life for life in lives if life.role == role]
        if others:
            across = Life(
                role,
                sum(life.seconds for life in lives if life.role == role),
                (first.memory[1], others[-1].memory[1]),
                (first.files[1], others[-1].files[1]),
            )
            if _rose(across):
                found.append(f"{role} from its first process to its last: {_told(across)}")
    return found


def _rose(life: Life) -> bool:
    return life.memory[1] > GROWTH * life.memory[0] or life.files[1] > life.files[0] + FILES


def _told(life: Life) -> str:
    memory = " to ".join(f"{value / 2**20:.1f}" for value in life.memory)
    return f"{memory} MiB, {life.files[0]:g} to {life.files[1]:g} files"


def soak(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Run for so long; what became of it. `problems` is empty where all held."""
    settings = {**SETTINGS, "train.time_limit_s": 60 * minutes}
    process = launched(
        folder,
        *("quickstart", "--algorithm", "grpo", "--seed", str(seed)),
        *("--out", str(folder / "quickstart")),
        *(f"{key}={value}" for key, value in settings.items()),
    )
    run, dice = folder / "quickstart" / "run", random.Random(seed)
    deaths: list[str] = []
    looks: dict[tuple[str, int], list[Look]] = {}
    began = due = time.monotonic()
    victims: list[str] = []
    while process.poll() is None:
        time.sleep(EVERY_S)
        now = time.monotonic()
        if now > began + 60 * minutes + 600:
            process.kill()
        if not (run / "metrics.jsonl").exists():
            due = now + PER_DEATH_S
            continue
        for role, pid in _processes(process.pid, run).items():
            _look(looks.setdefault((role, pid), []), role, pid)
        if now >= due and process.poll() is None:
            victims = victims or dice.sample(VICTIMS, len(VICTIMS))
            time.sleep(dice.uniform(0, 1))
            found = find(victims[-1], psutil.Process(process.pid), run)
            if found is not None:
                found.send_signal(KILL)
                deaths.append(victims.pop())
                due = now + PER_DEATH_S
    return _summary(folder, process.returncode, minutes, seed, deaths, looks)


def _processes(driver: int, run: Path) -> dict[str, int]:
    """The process of each role, by its name."""
    found = {"driver": driver}
    for role in WATCHED:
        process = find(role, psutil.Process(driver), run)
        if process is not None:
            found[role] = process.pid
    for child in psutil.Process(driver).children():
        if any(part.endswith("forks/server.py") for part in _command(child)):
            found["fork server"] = child.pid
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _look(looks: list[Look], role: str, pid: int) -> None:
    try:
        process = psutil.Process(pid)
        age = time.time() - process.create_time()
        children = len(process.children()) if role == "reward" else 0
        files = process.num_fds() - FILES_OF_A_CHILD * children
        looks.append(Look(age, process.memory_info().rss, files))
    except psutil.Error:  # it has just ended
        pass


def _summary(
    folder: Path,
    code: int,
    minutes: float,
    seed: int,
    deaths: list[str],
    looks: Mapping[tuple[str, int], Sequence[Look]],
) -> dict[str, Any]:
    run = folder / "quickstart" / "run"
    problems = []
    if code != 143:  # as the time limit ends a run
        said = (folder / "output.txt").read_text(errors="replace")[-2000:]
        problems.append(f"exit code {code}: {said}")
    if not (run / "ledger.jsonl").exists():
        return {"minutes": minutes, "seed": seed, "problems": problems}
    lives = [life for (role, _), seen in looks.items() if (life := lived(role, seen))]
    accuracies = [row[ACCURACY] for row in lines_of(run / "evals.jsonl")]
    steps = len(lines_of(run / "metrics.jsonl"))
    books = audit(run / "ledger.jsonl")
    problems += grown(lives)
    if not accuracies or accuracies[-1] < TARGET:
        problems.append(f"held-out accuracy {accuracies[-3:]}, not {TARGET}")
    if not books.balanced or books.quarantined:
        problems.append(f"the books: {books}")
    return {
        "minutes": minutes,
        "seed": seed,
        "steps": steps,
        "deaths": dict(Counter(deaths)),
        "accuracy": [accuracies[0], accuracies[-1]] if accuracies else [],
        "lives": {
            role: [_told(life) for life in lives if life.role == role]
            for role in sorted({life.role for life in lives})
        },
        "driver, MiB by minute": [
            by_minute(seen) for (role, _), seen in looks.items() if role == "driver"
        ],
        "problems": problems,
    }


def by_minute(looks: Sequence[Look]) -> list[int]:
    """The memory of a process in MiB, at the first look of each minute of its life."""
    minutes: dict[int, int] = {}
    for look in looks:
        minutes.setdefault(int(look.age // 60), look.memory // 2**20)
    return list(minutes.values())
