"""Runs over three nodes: each part where it was asked to be, jobs stopped and resumed, a node cut
off."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from aligntune.online.ledger import audit
from tests.cluster.conftest import Runs, events
from tests.cluster.nodes import Nodes
from tests.e2e.conftest import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRET = "Rumpel-417"


def test_a_job_on_two_nodes_a_role_that_is_stopped_checkpoints_and_the_next_submit_resumes(
    nodes: Nodes, runs: Runs, project: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (
        *("policy.ranks=2", "policy.strategy=deepspeed"),
        *("policy.resources.placement=STRICT_SPREAD", "checkpoint.every_steps=1000"),
        *("rewards.0.function=rewards:digits_with_a_secret", "--env", "SECRET_WORD"),
    )
    first = runs.submit(project, "train.steps=500", *options, SECRET_WORD=SECRET)
    runs.wait_for(lambda: len(read(run / "metrics.jsonl")) >= 2, first, 300)
    where = {e["role"].split(".")[0]: e["node_id"] for e in events(run, "role_started")}
    assert where["rollout-0"] != where["rollout-1"]
    assert where["policy-0"] != where["policy-1"]
    assert set(where.values()) <= nodes.alive()

    first.process.send_signal(signal.SIGINT)  # no terminal to ask: the job goes on
    assert first.finish(30) == 130, first.text()
    stop = re.search(r"aligntune jobs stop (\S+) --address \S+", first.text())
    assert stop, first.text()
    job_id = stop[1]
    following = runs.jobs("logs", job_id, "--follow")
    runs.wait_for(lambda: "step 1/500" in following.text(), following)
    stopping = runs.jobs("stop", job_id)
    assert stopping.finish(90) == 0, stopping.text()
    assert following.finish(60) == 143, following.text()

    done = len(read(run / "metrics.jsonl"))
    assert done < 500
    assert events(run, "checkpoint_saved")[-1]["step"] == done
    assert f"{run}/checkpoints, the newest step-{done:06d}" in stopping.text()
    status = runs.jobs("status", job_id)
    assert status.finish(30) == 0, status.text()
    assert "STOPPED" in status.text()
    assert "SECRET_WORD" in status.text()

    last = done + 2
    fewer = (f"train.steps={last}", "rollout.replicas=1")
    second = runs.submit(project, *fewer, *options, SECRET_WORD=SECRET)
    assert second.finish() == 0, second.text()
    assert events(run, "resumed")[-1]["step"] == done
    assert [row["step"] for row in read(run / "metrics.jsonl")] == list(range(1, last + 1))
    books = audit(run / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (4 * last, 0, True)
    assert (run / "model" / "model.safetensors").is_file()
    text = second.text()
    assert [text.count(f"step {step}/{last} ") for step in (done + 1, last)] == [1, 1], text

    listed = runs.jobs("list")
    assert listed.finish(30) == 0, listed.text()
    assert re.search(rf"{job_id} +STOPPED .* {run}\n", listed.text())
    for command in runs.started:
        assert SECRET not in command.text()
    assert nodes.files_with(job_id), "Ray's logs are there"
    assert nodes.files_with(SECRET) == []


@pytest.mark.long
@pytest.mark.namespaces
def test_a_node_cut_off_in_mid_run_costs_its_groups_alone(
    nodes: Nodes, runs: Runs, project: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    whole_node = "policy.resources.cpus=4"  # so that no rollout is beside it
    command = runs.submit(project, "train.steps=30", whole_node)
    runs.wait_for(lambda: len(read(run / "metrics.jsonl")) >= 2, command)
    rollouts = [e for e in events(run, "role_started") if e["role"].startswith("rollout")]
    address = next(e["node"] for e in rollouts if e["node"] != nodes.head.address)
    nodes.cut(next(node for node in nodes.nodes if node.address == address))

    assert command.finish() == 0, command.text()
    assert events(run, "replica_lost")
    assert not events(run, "policy_rebuilt")
    books = audit(run / "ledger.jsonl")
    assert (books.trained, books.quarantined, books.open) == (120, 0, 0)
    assert books.balanced


def test_wrong_input_is_told_at_once(nodes: Nodes, runs: Runs, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong-token"
    wrong.write_text("0" * 64)
    unknown = runs.jobs("status", "never-submitted")
    other = runs.jobs("list", RAY_AUTH_TOKEN_PATH=str(wrong))
    without = runs.jobs("list", RAY_AUTH_MODE="disabled")
    for command, said in (
        (unknown, "no job 'never-submitted' at http://"),
        (other, "refuses this token"),
        (without, "wants a token; set RAY_AUTH_MODE=token"),
    ):
        assert command.finish(30) == 2, command.text()
        (line,) = command.text().splitlines()
        assert line.startswith("aligntune: ")
        assert said in line
