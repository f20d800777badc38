"""A node that joins a run is used; when it leaves, the run does without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligntune.online.ledger import audit
from tests.cluster.conftest import Runs, events
from tests.cluster.nodes import Nodes
from tests.e2e.conftest import read

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def test_a_node_that_joins_rolls_out_and_one_that_leaves_is_done_without(
    nodes: Nodes, runs: Runs, project: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = runs.submit(
        project,
        "train.steps=2000",
        "rollout.max_replicas=3",
        "rollout.resources.cpus=4",  # a whole node each: two are left beside the policy's
        "policy.resources.cpus=3",
        "checkpoint.every_steps=1000",
    )
    runs.wait_for(lambda: len(read(run / "metrics.jsonl")) >= 2, command)
    before = nodes.alive()
    assert not events(run, "replica_joined")
    node = nodes.add_node()
    runs.wait_for(lambda: events(run, "replica_joined"), command)
    started = {e["role"]: e for e in events(run, "role_started")}
    (name,) = [role for role in started if role.startswith("rollout-2")]
    assert started[name]["node_id"] not in before
    runs.wait_for(
        lambda: any(line.get("replica") == name for line in read(run / "ledger.jsonl")), command
    )

    nodes.kill_node(node)
    lost = runs.wait_for(lambda: events(run, "replica_lost"), command)
    assert {event["replica"] for event in lost} == {name}
    steps = len(read(run / "metrics.jsonl"))
    runs.wait_for(lambda: len(read(run / "metrics.jsonl")) > steps + 2, command)
    listed = runs.jobs("list")
    assert listed.finish(30) == 0, listed.text()
    (job,) = [line.split()[0] for line in listed.text().splitlines() if line.endswith(str(run))]
    stopping = runs.jobs("stop", job)
    assert stopping.finish(90) == 0, stopping.text()
    assert not events(run, "policy_rebuilt")
    books = audit(run / "ledger.jsonl")
    assert books.balanced
    assert books.quarantined == 0
