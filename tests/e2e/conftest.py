"""Whole runs: a tiny untrained task, a config for it, and runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import drivers
from tests.drivers import Forked


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts with answers, as a data file."""
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"prompt": f"{10 + i}+{i % 10}", "answer": str(10 + i + i % 10)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tree(tiny_model: Path, questions: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of a few quick steps: transformers engine, 4 groups of 4, a reward that varies."""
    return {
        "algorithm": {"name": "grpo", "beta": 0.0},  # no reference actor to wait for
        "model": {"name": str(tiny_model)},
        "data": {"path": str(questions)},
        "rewards": [{"function": "tests.e2e.rewards:digits", "name": "digits"}],
        "output_dir": str(tmp_path / "run"),
        "train": {"steps": 4, "groups_per_step": 4, "completions_per_group": 4, "seed": 1},
        "rollout": {"engine": "transformers", "max_completion_length": 6, "max_prompt_length": 16},
        "policy": {"learning_rate": 1e-3},
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "tracking": {"trackers": [], "samples_per_step": 1},
        "cluster": {"object_store_gib": 0.25},
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@dataclass
class Run:
    """`aligntune train` in a process of its own."""

    process: subprocess.Popen[bytes] | Forked
    output_dir: Path

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind so far."""
        return [e for e in read(self.output_dir / "events.jsonl") if e["kind"] == kind]

    def wait_for(self, condition: Callable[[], Any], deadline_s: float = 120.0) -> Any:
        """The first true value of `condition`; fails when the run ends or the time does first."""
        end = time.monotonic() + deadline_s
        while not (value := condition()):
            assert self.process.poll() is None, f"the run ended: {self.output()}"
            assert time.monotonic() < end, f"waited {deadline_s} s in vain: {self.output()}"
            time.sleep(0.01)
        return value

    def finish(self, deadline_s: float = 240.0) -> int:
        """The exit code."""
        return self.process.wait(deadline_s)

    def output(self) -> str:
        """What it printed."""
        return (self.output_dir.parent / "output.txt").read_text(encoding="utf-8", errors="replace")

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Signal the driver alone; its actors, or its own Ray, follow it by themselves."""
        os.kill(self.process.pid, number)


@pytest.fixture
def launch(tree: dict[str, Any], tmp_path: Path, ray_session: None) -> Iterator[Callable[..., Run]]:
    """Starts `aligntune train` on `tree` as it is at the call, on the Ray that tests share.

    With `alone` it starts a Ray of its own: where what the driver's environment says has to reach
    the actors, or where a node or its Ray dies.
    """
    import ray

    running: list[subprocess.Popen[bytes] | Forked] = []
    shared = ray.get_runtime_context().gcs_address

    def start(*overrides: str, alone: bool = False) -> Run:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        with (tmp_path / "output.txt").open("ab") as output:
            process = drivers.start(
                ["-m", "aligntune.cli", "train", str(config), *overrides],
                output=output,
                cwd=Path(__file__).parents[2],
                env=environment | ({} if alone else {"RAY_ADDRESS": shared}),
            )
        running.append(process)
        return Run(process, Path(tree["output_dir"]))

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait(30)
