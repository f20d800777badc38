"""Workers of a Ray that are forked: Ray sees their death, they leave nothing, figures stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.forks import owner, wire
from tests.cluster.forks.test_server import DEADLINE_S, gone, until

pytestmark = pytest.mark.slow

DRIVER = """
import os, sys, time
import ray
from cluster.session import session
from cluster.specs import ClusterSpec

class Worker:
    def where(self):
        print("said in a worker", flush=True)
        return os.getpid(), os.getppid(), "statistics" in sys.modules

with session(ClusterSpec(), cpus=1, imports=["statistics", "ray.actor"]):
    workers = [ray.remote(Worker).remote() for _ in range(2)]
    for worker in workers:
        print(*ray.get(worker.where.remote()))
    logs = ray._private.worker.global_worker.node.get_logs_dir_path()
    print(logs, flush=True)
    time.sleep(600)
"""


def test_forked_workers_log_as_others_do_and_end_with_a_driver_that_is_killed() -> None:
    environment = {n: v for n, v in os.environ.items() if n not in (wire.SOCKET, "RAY_ADDRESS")}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().split() for _ in range(3)]
            tree = psutil.Process(process.pid).children(recursive=True)
            servers = {p.pid for p in tree if p.cmdline()[1:2] == [str(owner.SERVER)]}
        finally:
            process.kill()
    workers = [(int(pid), int(parent)) for pid, parent, _ in lines[:2]]
    assert [imported for *_, imported in lines[:2]] == ["True", "True"]
    assert {parent for _, parent in workers} <= servers
    said = [
        p for p in Path(lines[2][0]).glob("worker-*.out") if "said in a worker" in p.read_text()
    ]
    assert len(said) == 2
    for one in [pid for pid, _ in workers] + sorted(servers):
        until(lambda one=one: gone(one), f"the end of process {one}")


class Trained:
    def __init__(self) -> None:
        import torch

        self._threads = torch.get_num_threads()

    def where(self) -> tuple[int, list[str]]:
        return os.getpid(), psutil.Process(os.getppid()).cmdline()

    def figures(self, model: str) -> tuple[list[float], float]:
        """Losses of a few steps and their threads; a number drawn without a seed."""
        import torch
        from transformers import AutoModelForCausalLM

        drawn = torch.rand(1).item()
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        tokens = torch.randint(0, 16, (8, 32))
        losses = []
        for _ in range(3):
            loss = made(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return [*losses, self._threads, torch.get_num_threads()], drawn


def test_a_forked_worker_computes_what_another_does_bit_for_bit(
    ray_session: None, tiny_model: Path
) -> None:
    """In other threads than those of the imports."""
    import ray

    figures, forked, drawn = [], [], []
    for socket in (None, None, "off"):
        variables = {"OMP_NUM_THREADS": "2"} | ({wire.SOCKET: socket} if socket else {})
        worker = ray.remote(Trained).options(runtime_env={"env_vars": variables}).remote()
        computed, number = ray.get(worker.figures.remote(str(tiny_model)))
        figures.append(computed)
        drawn.append(number)
        forked.append(str(owner.SERVER) in ray.get(worker.where.remote())[1])
        ray.kill(worker)
    assert forked == [True, True, False]
    assert figures[0] == figures[1] == figures[2]
    assert len(set(drawn)) == 3


def test_ray_hears_of_the_death_of_a_forked_worker_and_starts_another(ray_session: None) -> None:
    import ray

    worker = ray.remote(Trained).options(max_restarts=1, max_task_retries=-1).remote()
    pid, parent = ray.get(worker.where.remote())
    assert str(owner.SERVER) in parent
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    assert ray.get(worker.where.remote(), timeout=DEADLINE_S)[0] != pid
    assert time.monotonic() - started < DEADLINE_S
    ray.kill(worker)
