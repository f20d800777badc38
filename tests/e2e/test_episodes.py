"""Runs of episodes on Ray, by both doors: they train, and are the same when killed and resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from aligntune.online.ledger import audit
from aligntune.quickstart.agent import POSITIONS, _lessons, make_agent_tokenizer, make_sums
from aligntune.quickstart.tiny import supervised_loss, tiny_model
from tests.e2e.conftest import Run, read
from tests.e2e.test_recovery import figures, trained_order

pytestmark = pytest.mark.long


@pytest.fixture(scope="session")
def agent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model for agents, after a few steps of a warm-up by both of its teachers: it
    calls its tool once or twice, so that rewards of a group differ."""
    folder = tmp_path_factory.mktemp("agent-model")
    sums, _ = make_sums(0)
    tokenizer = make_agent_tokenizer()
    model = tiny_model(0, tokenizer, POSITIONS)
    both = (_lessons(tokenizer, sums[:16], hasty) for hasty in (False, True))
    lessons = [torch.cat(parts) for parts in zip(*both, strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(40):
        optimizer.zero_grad()
        supervised_loss(model, *lessons).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["environment", "agent"])
def playing(
    tree: dict[str, Any], agent_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """A run of short episodes: the model has learnt to call a tool, and no more."""
    tree["model"]["name"] = str(agent_model)
    asked = [[{"role": "user", "content": one.prompt}] for one in make_sums(0)[0][:16]]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked))
    tree["data"]["path"] = str(data)
    tree["policy"]["learning_rate"] = 1e-4
    names = {"environment": "tests.e2e.games:Adding", "agent": "tests.e2e.games:adds"}
    tree[request.param] = names[request.param]
    tree["episodes"] = {"max_turns": 3, "max_attempts": 1}
    tree["rollout"].update(max_completion_length=40, max_prompt_length=40)
    said = {"environment": "tests.e2e.games:asked", "agent": "environment"}[request.param]
    tree["rewards"] = [said, "tests.e2e.games:messages"]
    return tree


@pytest.mark.timeout(600)  # three runs
def test_a_run_of_episodes_killed_and_resumed_is_bit_identical(
    playing: dict[str, Any], tmp_path: Path, launch: Callable[..., Run]
) -> None:
    steps = playing["train"]["steps"] = 2
    playing["data"].update(split="train[4:]", eval_split="train[:4]")
    playing["eval"] = {"at_start": False, "completions": 2, "temperature": 1.0}
    whole = launch()
    assert whole.finish() == 0, whole.output()
    rows = read(whole.output_dir / "metrics.jsonl")
    assert all(row["tools/calls"] > 0 and row["turns/max"] > 1 for row in rows)
    assert all(0 < row["tokens/environment_fraction"] < 1 for row in rows)
    assert all(row["groups/constant_fraction"] < 1 for row in rows), "a step teaches something"
    for row in rows:
        assert row["reward/environment/mean"] > 0
        if "environment" in playing:
            assert row["reward/environment/mean"] == row["reward/asked/mean"]
        assert row["reward/messages/mean"] >= 1
    (sample, *_) = read(whole.output_dir / "samples.jsonl")
    roles = [m["role"] for one in sample["completions"] for m in one["messages"]]
    assert {"user", "assistant", "tool"} <= set(roles)

    playing["output_dir"] = str(tmp_path / "killed")
    run = launch()
    metrics = run.output_dir / "metrics.jsonl"
    run.wait_for(lambda: len(read(metrics)) >= 1)
    run.kill_group(signal.SIGKILL)
    run.finish()
    run = launch()
    assert run.finish() == 0, run.output()

    first, second = Path(whole.output_dir), Path(run.output_dir)
    assert figures(first) == figures(second)
    assert read(first / "evals.jsonl") == read(second / "evals.jsonl")
    assert trained_order(first) == trained_order(second)
    weights, resumed = (load_file(d / "model" / "model.safetensors") for d in (first, second))
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    start = load_file(Path(playing["model"]["name"]) / "model.safetensors")
    assert any(not torch.equal(start[name], weights[name]) for name in start), "nothing was trained"
    books = audit(second / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (4 * steps, 0, True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("playing", ["environment"], indirect=True)
def test_an_engine_of_vllm_that_is_killed_amid_episodes_costs_their_turns_and_nothing_else(
    playing: dict[str, Any], tmp_path: Path, launch: Callable[..., Run]
) -> None:
    """Its process stops while tools are called, is asked for the turns after them, and is killed;
    the episodes stay as they are, and another engine answers."""
    pytest.importorskip("vllm")
    log, gate = tmp_path / "log", tmp_path / "gate"
    data = Path(playing["data"]["path"])
    asked = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [{**row, "log": str(log), "gate": str(gate)} for row in asked]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    playing["environment"] = "tests.e2e.games:Gated"
    playing["episodes"]["call_timeout_s"] = 300.0
    playing["rollout"].update(engine={"name": "vllm", "kv_cache_gib": 0.25})
    playing["train"].update(steps=2, max_staleness=0)

    def said(what: str) -> int:
        return log.read_text().split().count(what) if log.exists() else 0

    run = launch()
    run.wait_for(lambda: said("asked") >= 4, 240.0)
    replica = next(e for e in run.events("role_started") if e["role"].startswith("rollout"))
    process = psutil.Process(replica["pid"])
    # It is forked as the replica is, or the replica spawns it.
    near = [*process.parent().children(), *process.children(recursive=True)]
    (engine,) = [each for each in near if "EngineCore" in each.name()]
    engine.suspend()
    gate.touch()
    run.wait_for(lambda: said("answered") == said("asked"))
    os.kill(engine.pid, signal.SIGKILL)
    assert run.finish(400.0) == 0, run.output()

    (lost,) = run.events("replica_lost")
    assert lost["role"] == "rollout"
    reasons = [event["reason"] for event in run.events("group_retried")]
    assert reasons
    assert all("its episodes go on" in reason for reason in reasons)
    steps, rows = 2, read(run.output_dir / "metrics.jsonl")
    assert [row["episodes/retried"] for row in rows] == [0] * steps
    assert said("begun") == steps * 16, "no episode was begun again"
    assert said("answered") == said("asked") == sum(row["tools/calls"] for row in rows)
    books = audit(run.output_dir / "ledger.jsonl")
    assert (books.trained, books.quarantined, books.open, books.balanced) == (4 * steps, 0, 0, True)
