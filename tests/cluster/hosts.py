"""Hosts without Ray: three machines in namespaces, on which other programs start Ray.

They are `nodes.Namespaces`, with a home folder and names for each other, and run a service (sshd,
slurmd) instead of a raylet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.nodes import OWN_FILES, REPOSITORY, Namespaces, Node

HOME = "/tmp/home"  # of root on a host; its /tmp is its own

START = f"""{OWN_FILES}\
mkdir -p "$HOME"
chmod 700 "$HOME"
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
mount --bind "$SHARED/hosts" /etc/hosts
mount --bind "$SHARED/passwd" /etc/passwd
hostname "$NODE"
"$@" &
wait $!
"""


class Hosts(Namespaces):
    """`service` gives the command that each host runs."""

    def __init__(self, shared: Path, count: int, service: Callable[[Node], list[str]]) -> None:
        super().__init__(shared)
        self._service = service
        names = [f"{self._net}.{n} node{n}" for n in range(1, count + 1)]
        (shared / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(names) + "\n")
        accounts = Path("/etc/passwd").read_text().splitlines()
        (shared / "passwd").write_text(
            "".join(
                (f"root:x:0:0:root:{HOME}:/bin/bash" if line.startswith("root:") else line) + "\n"
                for line in accounts
            )
        )

    @property
    def outside(self) -> str:
        """The address of the test's own process."""
        return f"{self._net}.254"

    def alive(self) -> set[str]:
        """No Ray is asked."""
        return set()

    def wait_alive(self, count: int, deadline_s: float = 0.0) -> None:
        """No Ray is asked."""

    def _start(self, node: Node, space: str, cpus: int) -> None:
        apart = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.shared / f"{node.name}.log").open("ab") as output:
            node.process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", space),
                    *("unshare", *apart, "sh", "-ec", START, "sh", *self._service(node)),
                ],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": HOME,
                    "SHARED": str(self.shared),
                    "REPOSITORY": str(REPOSITORY),
                    "NODE": node.name,
                },
            )


def missing(*programs: str) -> str:
    """Which programs this machine lacks, or ''."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [program for program in programs if shutil.which(program, path=path) is None]
    return f"no {', '.join(lacking)} here" if lacking else ""


def tiny_run(shared: Path, tiny_model: Path, **train: Any) -> dict[str, Any]:
    """A run whose files lie in `shared`: each role has a node of one CPU for itself."""
    shutil.copytree(tiny_model, shared / "model")
    rows = [{"prompt": f"{10 + i}+{i % 10}", "answer": str(10 + i + i % 10)} for i in range(40)]
    (shared / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "algorithm": {"name": "grpo", "beta": 0.0},
        "model": {"name": "model"},
        "data": {"path": "data.jsonl"},
        "rewards": ["exact_match"],
        "output_dir": "runs/tiny",
        "train": {"groups_per_step": 2, "completions_per_group": 2, "seed": 1, **train},
        "rollout": {"engine": "transformers", "max_completion_length": 4, "max_prompt_length": 16},
        "checkpoint": {"every_steps": 1, "keep_last": 2},
        "tracking": {"trackers": []},
    }


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]
