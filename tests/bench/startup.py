"""Seconds to the first trained step, over those of bare vLLM to its first token.

The quickstart's model and settings, without held-out data. A start is a process of its own: `bare`
is tests/bench/bare_vllm.py, `eager` the same without compiling, `ours` is `aligntune train`. Cold
ones find no cache of what vLLM and torch compile, and leave one to the warm ones of their system.
All take turns, round by round; each is a file, as in tests/bench/end_to_end/parts.py.

python -m tests.bench startup [--rounds 3] [--parts 1] [--again]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from pydantic import BaseModel, ConfigDict

from tests.bench.end_to_end.parts import FOLDER, Options, Unfinished
from tests.bench.report import REPOSITORY, Measured, Target, commit

SYSTEMS = ("bare", "eager", "ours")
KINDS = tuple((system, caches) for caches in ("cold", "warm") for system in SYSTEMS)
LIMIT_S = 540.0
Seen = tuple[float, dict[str, float], dict[str, float]]
"""Wall seconds, processor seconds by process, and stages."""
LONGEST = 40  # tokens of prompt and answer, as the quickstart has them


class Start(BaseModel):
    """One start: seconds since the process began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str
    caches: str
    commit: str
    load: float  # of the machine, before
    wall_s: float
    cpu_s: dict[str, float]  # by whose process it was; those that have ended too
    stages: dict[str, float]  # when each was over


def measure(options: Options) -> Measured:
    """Medians over all rounds. Raises Unfinished where starts are left for another call."""
    found: dict[tuple[str, str], list[Start]] = {kind: [] for kind in KINDS}
    left = made = 0
    for round_ in range(1, options.rounds + 1):
        for system, caches in KINDS:
            path = FOLDER / "startup" / f"{round_}-{caches}-{system}.json"
            start = None if options.again else there(path, system)
            if start is None and (options.parts is None or made < options.parts):
                print(f"round {round_} of {options.rounds}: {system}, {caches}", flush=True)
                start, made = begun(system, caches), made + 1
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(start.model_dump_json())
            if start is None:
                left += 1
            else:
                found[system, caches].append(start)
    if left:
        raise Unfinished(f"{left} starts are left; run it again")
    return joined(found)


def there(path: Path, system: str) -> Start | None:
    """A start that was measured before and counts."""
    if not path.exists():
        return None
    start = Start.model_validate_json(path.read_text())
    return start if system != "ours" or start.commit == commit() else None


def joined(found: Mapping[tuple[str, str], Sequence[Start]]) -> Measured:
    """Medians of each kind, and ours over bare."""
    table: dict[str, float] = {}
    for (system, caches), starts in found.items():
        name = f"{caches}/{system}"
        table[f"{name}/wall_s"] = statistics.median(start.wall_s for start in starts)
        table[f"{name}/cpu_s"] = statistics.median(sum(start.cpu_s.values()) for start in starts)
        for whose in sorted({whose for start in starts for whose in start.cpu_s}):
            each = [start.cpu_s.get(whose, 0.0) for start in starts]
            table[f"{name}/cpu_s/{whose}"] = statistics.median(each)
        for stage in starts[0].stages:
            each = [start.stages[stage] for start in starts]
            table[f"{name}/until_s/{stage}"] = statistics.median(each)
    for caches in ("cold", "warm"):
        for what in ("wall", "cpu"):
            bare, eager, ours = (table[f"{caches}/{system}/{what}_s"] for system in SYSTEMS)
            table[f"{caches}/{what}_over_bare"] = ours / bare
            table[f"{caches}/{what}_over_eager"] = ours / eager
    targets = tuple(Target(f"{caches}/wall_over_bare", 1.3) for caches in ("cold", "warm"))
    loads = {"/".join(kind): [start.load for start in starts] for kind, starts in found.items()}
    return Measured(table, targets, {"load": loads})


def begun(system: str, caches: str) -> Start:
    """Start it, and end it when it is there."""
    home = FOLDER / "startup" / f"home-{system}"  # warm starts find the same model, by its path
    if caches == "cold":
        shutil.rmtree(home, ignore_errors=True)
    shutil.rmtree(home / "run", ignore_errors=True)
    if not (home / "config.yaml").exists():
        home.mkdir(parents=True)
        write(home)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "VLLM_CACHE_ROOT": str(home / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "inductor"),
    }
    load = os.getloadavg()[0]
    if system == "ours":
        wall_s, cpu_s, stages = ours(home, environment)
    else:
        wall_s, cpu_s, stages = bare(home, environment, system)
    return Start(
        system=system,
        caches=caches,
        commit=commit(),
        load=load,
        wall_s=wall_s,
        cpu_s=cpu_s,
        stages=stages,
    )


def write(folder: Path) -> None:
    """The quickstart's model, without its lessons, and its questions; how `ours` is called."""
    from aligntune.quickstart.task import make_model, make_task, make_tokenizer

    make_model(seed=1).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": each.prompt, "answer": each.answer} for each in make_task(1).train]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "algorithm": {"name": "grpo"},
        "model": {"name": str(folder / "model")},
        "data": {"path": str(data)},
        "rewards": ["exact_match"],
        "output_dir": str(folder / "run"),
        "rollout": {"engine": "vllm"},
        "checkpoint": {"at_end": False},
        "tracking": {"profile": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


def bare(folder: Path, environment: Mapping[str, str], system: str) -> Seen:
    """Bare vLLM."""
    output = folder / "output.txt"
    command = [sys.executable, "-m", "tests.bench.bare_vllm", str(folder / "model"), str(LONGEST)]
    command += [system] if system == "eager" else []

    def done() -> bool:
        return output.read_text().endswith("}\n")

    began, wall_s, cpu_s = watched(command, environment, output, done)
    said = json.loads(output.read_text().splitlines()[-1])
    return wall_s, cpu_s, {stage: at - began for stage, at in said.items()}


def ours(folder: Path, environment: Mapping[str, str]) -> Seen:
    """A run to its first trained step."""
    from aligntune.quickstart.settings import quickstart_settings

    settings = {**quickstart_settings("grpo"), "train.steps": 1}
    overrides = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
    command = [sys.executable, "-m", "aligntune.cli", "train", str(folder / "config.yaml")]
    run = folder / "run"

    def done() -> bool:
        rows = run / "metrics.jsonl"
        return rows.exists() and rows.read_bytes().endswith(b"\n")

    began, wall_s, cpu_s = watched([*command, *overrides], environment, folder / "out.txt", done)
    return wall_s, cpu_s, stages(json.loads((run / "trace.json").read_text()), began)


def watched(
    command: Sequence[str], environment: Mapping[str, str], output: Path, done: Callable[[], bool]
) -> tuple[float, float, dict[str, float]]:
    """Run it to its end: when it began, by time.monotonic, and the wall and processor seconds
    until it was `done`. Raises RuntimeError where it fails or takes too long."""
    wall_s, cpu_s = 0.0, {}
    with output.open("wb") as file:
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None and time.monotonic() < began + LIMIT_S:
                if not wall_s and done():
                    wall_s, cpu_s = time.monotonic() - began, spent(psutil.Process(process.pid))
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode or not wall_s:
        raise RuntimeError(f"{' '.join(command)}: {output.read_text()[-3000:]}")
    return began, wall_s, cpu_s


def spent(process: psutil.Process, whose: str = "main") -> dict[str, float]:
    """Processor seconds of a process and its descendants by whose they are: an actor's by its
    class, vLLM's engine's, Ray's own, or those of the process above."""
    found: dict[str, float] = {}
    try:
        whose = owner(" ".join(process.cmdline()), whose)
        times = process.cpu_times()
        children = process.children()
    except psutil.NoSuchProcess:
        return found
    found[whose] = times.user + times.system + times.children_user + times.children_system
    for child in children:
        for name, seconds in spent(child, whose).items():
            found[name] = found.get(name, 0.0) + seconds
    return found


def owner(title: str, above: str) -> str:
    """Whose a process of this title is, under one of `above`."""
    if actor := re.match(r"ray::(\w+)", title):
        own = actor[1]
        return "Ray" if own.endswith("Agent") or own == "IDLE" else own
    if title.startswith("VLLM::"):
        return title.partition(" ")[0]
    return "Ray" if above == "main" and "site-packages/ray/" in title else above


def stages(trace: Iterable[Mapping[str, Any]], began: float) -> dict[str, float]:
    """Seconds from `began` until Ray ran and each role was there, and until the first rollouts,
    rewards and update were over."""
    calls = [event for event in trace if event["ph"] == "X"]

    def ends(name: str, role: str) -> list[float]:
        own = [each for each in calls if (each["name"], each["cat"]) == (name, role)]
        return [(each["ts"] + each["dur"]) / 1e6 - began for each in own]

    starts = [each for each in calls if each["name"] == "start"]
    found = {"ray": min(each["ts"] for each in starts) / 1e6 - began}
    roles = sorted({each["cat"] for each in starts})
    found |= {role: max(ends("start", role)) for role in roles}
    found["first rollout"] = min(ends("generate", "rollout"))
    found["first reward"] = min(ends("score", "reward"))
    found["update"] = min(ends("update", "policy"))
    return found
