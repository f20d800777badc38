"""Whatever is killed, the run goes on or resumes, the books balance, and nothing differs."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from aligntune import create_rl_trainer
from aligntune.errors import UserError
from aligntune.loops import STOPPING
from aligntune.online.ledger import audit
from tests.e2e.conftest import Run, read

pytestmark = pytest.mark.slow


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without those that measure time and the load of replicas."""
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "rollout/"))}
        for row in read(run_dir / "metrics.jsonl")
    ]


def trained_order(run_dir: Path) -> list[list[int]]:
    """Groups of each step in the surviving history."""
    steps: dict[int, list[int]] = {}
    for record in read(run_dir / "ledger.jsonl"):
        if record["event"] == "restore":
            steps = {step: groups for step, groups in steps.items() if step <= record["step"]}
        if record["event"] == "move" and record["to"] == "TRAINED":
            steps[record["step"]] = record["groups"]
    return [steps[step] for step in sorted(steps)]


def test_a_run_killed_at_random_and_resumed_is_bit_identical(
    tree: dict[str, Any], tmp_path: Path, launch: Callable[..., Run]
) -> None:
    tree["algorithm"]["beta"] = 0.04
    tree["data"].update(split="train[8:]", eval_split="train[:8]")
    tree["eval"] = {"every_steps": 1, "completions": 2, "temperature": 1.0}
    steps = tree["train"]["steps"]
    whole = launch()
    assert whole.finish() == 0, whole.output()

    tree["output_dir"] = str(tmp_path / "killed")
    killed_after = random.Random().randrange(1, steps)
    run = launch()
    metrics = run.output_dir / "metrics.jsonl"
    run.wait_for(lambda: len(read(metrics)) >= killed_after)
    run.kill_group(signal.SIGKILL)
    run.finish()
    run = launch()
    assert run.finish() == 0, run.output()

    first, second = Path(whole.output_dir), Path(run.output_dir)
    assert figures(first) == figures(second), f"killed after step {killed_after}"
    evaluated = read(first / "evals.jsonl")
    assert [row["step"] for row in evaluated] == list(range(steps + 1))
    assert evaluated == read(second / "evals.jsonl")
    assert trained_order(first) == trained_order(second)
    weights, resumed = (load_file(d / "model" / "model.safetensors") for d in (first, second))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert weights.keys() == resumed.keys()
    start = load_file(Path(tree["model"]["name"]) / "model.safetensors")
    assert any(not torch.equal(start[name], weights[name]) for name in start), "nothing was trained"
    books = audit(second / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (4 * steps, 0, True)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_signal_ends_in_a_checkpoint_and_the_run_resumes(
    tree: dict[str, Any], launch: Callable[..., Run], number: signal.Signals
) -> None:
    tree["train"]["steps"] = 200
    tree["checkpoint"]["every_steps"] = 1000
    run = launch()
    run.wait_for(lambda: len(read(run.output_dir / "metrics.jsonl")) >= 2)
    run.kill_group(number)
    assert run.finish() == 128 + number, run.output()
    done = len(read(run.output_dir / "metrics.jsonl"))
    assert run.events("checkpoint_saved")[-1]["step"] == done
    assert "resume with: aligntune train" in run.output()
    assert run.output().count(STOPPING) == 1

    tree["train"]["steps"] = done + 1
    run = launch()
    assert run.finish() == 0, run.output()
    assert [row["step"] for row in figures(run.output_dir)] == list(range(1, done + 2))
    assert audit(run.output_dir / "ledger.jsonl").open == 0

    began = len(run.events("run_started"))
    again = create_rl_trainer(config=tree).train()
    assert again.describe().startswith("done before (a higher train.steps or train.epochs goes on)")
    assert (again.steps, again.already) == (done + 1, True)
    tree["train"]["steps"] = done
    with pytest.raises(UserError, match=f"makes {done} steps .* is of step {done + 1}; raise it"):
        create_rl_trainer(config=tree).train()
    assert len(run.events("run_started")) == began, "nothing was started"

    newest = next((run.output_dir / "checkpoints").glob("step-*"))
    tree["output_dir"] = str(run.output_dir.parent / "elsewhere")
    tree["train"]["steps"] = done + 3
    other = launch("--resume", str(newest))
    assert other.finish() == 0, other.output()
    books = audit(other.output_dir / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (4 * (done + 3), 0, True)


# tests/chaos/test_dozen.py kills a replica and a policy in every `make test`.
@pytest.mark.long
@pytest.mark.parametrize("role", ["rollout", "reward", "reference"])
def test_a_replica_killed_in_a_run_costs_nothing_but_time(
    tree: dict[str, Any], launch: Callable[..., Run], role: str
) -> None:
    tree["train"]["steps"] = 30
    if role == "reference":
        tree["algorithm"]["beta"] = 0.04
    run = launch()
    run.wait_for(lambda: len(read(run.output_dir / "metrics.jsonl")) >= 2)
    victim = next(e for e in run.events("role_started") if e["role"].startswith(role))
    os.kill(victim["pid"], signal.SIGKILL)
    assert run.finish() == 0, run.output()
    assert any(e["role"] == role for e in run.events("replica_restarted"))
    books = audit(run.output_dir / "ledger.jsonl")
    assert (books.trained, books.quarantined, books.open) == (120, 0, 0)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_policy_rank_killed_rolls_back_to_the_checkpoint_and_the_run_finishes(
    tree: dict[str, Any], launch: Callable[..., Run], ranks: int
) -> None:
    if ranks > 1:
        tree["policy"].update(strategy="deepspeed", ranks=ranks)
    tree["train"]["steps"] = 12
    tree["checkpoint"]["every_steps"] = 3
    run = launch()
    run.wait_for(lambda: len(read(run.output_dir / "metrics.jsonl")) >= 4)
    last = f"policy-{ranks - 1}"
    victim = next(e for e in run.events("role_started") if e["role"] == last)
    os.kill(victim["pid"], signal.SIGKILL)
    assert run.finish() == 0, run.output()
    (rebuilt,) = run.events("policy_rebuilt")
    assert rebuilt["to_version"] % 3 == 0
    assert rebuilt["to_version"] >= 3
    assert [row["step"] for row in figures(run.output_dir)] == list(range(1, 13))
    books = audit(run.output_dir / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (48, 0, True)


@pytest.mark.long
def test_a_run_of_fsdp_goes_on_with_fewer_ranks_and_says_so(
    tree: dict[str, Any], launch: Callable[..., Run]
) -> None:
    tree["policy"].update(strategy="fsdp", ranks=2)
    tree["train"]["steps"] = 2
    assert launch().finish() == 0
    tree["policy"]["ranks"] = 1
    tree["train"]["steps"] = 4
    run = launch()
    assert run.finish() == 0, run.output()
    assert [row["step"] for row in figures(run.output_dir)] == [1, 2, 3, 4]
    assert run.events("run_started")[-1]["changed"]["policy.ranks"] == 1
    books = audit(run.output_dir / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (16, 0, True)


@pytest.mark.long
def test_a_stopped_rollout_replica_is_replaced_at_its_deadline(
    tree: dict[str, Any], launch: Callable[..., Run]
) -> None:
    tree["train"]["steps"] = 20
    tree["rollout"]["generation_timeout_s"] = 5.0
    run = launch()
    run.wait_for(lambda: len(read(run.output_dir / "metrics.jsonl")) >= 2)
    victim = next(e for e in run.events("role_started") if e["role"].startswith("rollout"))
    os.kill(victim["pid"], signal.SIGSTOP)
    assert run.finish() == 0, run.output()
    assert any("no answer within 5 s" in e["reason"] for e in run.events("replica_lost"))
    books = audit(run.output_dir / "ledger.jsonl")
    assert (books.trained, books.quarantined, books.open) == (80, 0, 0)


def test_a_raylet_that_is_killed_ends_the_run_with_the_command_that_resumes_it(
    tree: dict[str, Any], launch: Callable[..., Run]
) -> None:
    tree["train"]["steps"] = 200
    run = launch(alone=True)
    run.wait_for(lambda: len(read(run.output_dir / "metrics.jsonl")) >= 2)
    below = psutil.Process(run.process.pid).children(recursive=True)
    next(process for process in below if process.name() == "raylet").kill()
    assert run.finish() == 1, run.output()
    assert "Ray's raylet on this machine has died" in run.output()
    assert "resume with: aligntune train" in run.output()
    assert "raylet" in run.events("run_stopped")[-1]["reason"]
    _, left = psutil.wait_procs(below, timeout=60)
    assert not left, "processes of the run are left"
