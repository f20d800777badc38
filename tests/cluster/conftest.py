"""Three nodes that tests share, and runs submitted to them."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.nodes import Nodes, cluster, remove_leftovers, why_no_namespaces
from tests.e2e.conftest import read

REWARD = '''\
"""A reward of the user's own, which travels with the job."""


import os


def digits(completions, **columns):
    """The share of characters that are digits."""
    return [sum(c.isdigit() for c in text) / (len(text) or 1) for text in completions]


def digits_with_a_secret(completions, **columns):
    """The same, for those who know the word."""
    assert len(os.environ["SECRET_WORD"]) == 10
    return digits(completions)
'''


NODES = 3


@pytest.fixture(scope="package")
def shared_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """The nodes; they share the session's temporary folder. They end with the files that need them,
    which come one after the other: idle, they would take processor time from all other tests."""
    lacking = why_no_namespaces()
    if not lacking:
        remove_leftovers()
    with cluster(tmp_path_factory.getbasetemp(), NODES, namespaces=not lacking) as made:
        yield made


@pytest.fixture
def nodes(shared_nodes: Nodes) -> Nodes:
    """Three nodes that are alive; those that a test has lost are replaced."""
    while len(shared_nodes.alive()) < NODES:
        shared_nodes.add_node()
    return shared_nodes


@pytest.fixture(autouse=True)
def _needs_namespaces(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("namespaces") and (lacking := why_no_namespaces()):
        pytest.skip(f"this needs network namespaces: {lacking}")


@pytest.fixture
def project(tiny_model: Path, tmp_path: Path) -> Path:
    """A working directory: a config of a short run on two nodes, its data, a reward."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "rewards.py").write_text(REWARD)
    rows = [{"prompt": f"{10 + i}+{i % 10}", "answer": str(10 + i + i % 10)} for i in range(40)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spread = {"cpus": 1, "placement": "SPREAD"}
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.0},
        "model": {"name": str(tiny_model)},
        "data": {"path": "questions.jsonl"},
        "rewards": [{"function": "rewards:digits"}],
        "output_dir": str(tmp_path / "run"),
        "train": {"steps": 4, "groups_per_step": 4, "completions_per_group": 4, "seed": 1},
        "rollout": {
            "engine": "transformers",
            "replicas": 2,
            "resources": spread,
            "max_completion_length": 6,
            "max_prompt_length": 16,
        },
        "policy": {"learning_rate": 1e-3},
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "tracking": {"trackers": [], "samples_per_step": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


@dataclass
class Command:
    """`aligntune` in a process of its own, beside the cluster."""

    process: subprocess.Popen[str]
    output: Path

    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace")

    def finish(self, deadline_s: float = 240.0) -> int:
        """The exit code. Where it does not end in time, its stacks and output are shown."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler is on
            self.process.wait(10)
            raise AssertionError(f"no end in {deadline_s:g} s: {self.text()}") from None


@dataclass
class Runs:
    """Starts `aligntune` commands against the nodes, and looks into run directories."""

    nodes: Nodes
    folder: Path
    started: list[Command] = field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> Command:
        """`aligntune ARGUMENTS`."""
        output = self.folder / f"output-{len(self.started)}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["aligntune", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**self.nodes.environment, "PYTHONFAULTHANDLER": "1", **environment},
                cwd=self.folder,
                text=True,
            )
        self.started.append(Command(process, output))
        return self.started[-1]

    def submit(self, project: Path, *arguments: str, **environment: str) -> Command:
        """`aligntune submit` of the project's config."""
        return self.start(
            *("submit", str(project / "config.yaml"), *arguments),
            *("--working-dir", str(project), "--address", self.nodes.jobs_url),
            **environment,
        )

    def jobs(self, *arguments: str, **environment: str) -> Command:
        """`aligntune jobs ARGUMENTS` of the cluster."""
        return self.start("jobs", *arguments, "--address", self.nodes.jobs_url, **environment)

    def wait_for(
        self, condition: Callable[[], Any], command: Command, deadline_s: float = 180.0
    ) -> Any:
        """The first true value of `condition`; fails when the command ends or the time does."""
        end = time.monotonic() + deadline_s
        while not (value := condition()):
            assert command.process.poll() is None, f"it ended: {command.text()}"
            assert time.monotonic() < end, f"waited {deadline_s:g} s in vain: {command.text()}"
            time.sleep(0.1)
        return value


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind so far."""
    return [e for e in read(run_dir / "events.jsonl") if e["kind"] == kind]


@pytest.fixture
def runs(nodes: Nodes, tmp_path: Path) -> Iterator[Runs]:
    """See `Runs`; every job of the test has ended after it."""
    made = Runs(nodes, tmp_path)
    yield made
    for command in made.started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait(30)
    stop_all(nodes)


def stop_all(nodes: Nodes) -> None:
    """Stop every job that still runs, and wait until it has ended."""
    script = (
        "import sys; from cluster.jobs.client import Jobs; jobs = Jobs(sys.argv[1]); "
        "[jobs.stop(job.submission_id, 60) for job in jobs.all() if not job.status.is_terminal()]"
    )
    done = subprocess.run(
        ["python", "-c", script, nodes.jobs_url],
        env=nodes.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
