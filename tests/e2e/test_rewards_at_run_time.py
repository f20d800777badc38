"""A reward that fails is retried, then its group is quarantined; the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aligntune.errors import RunFailed, UserError
from aligntune.ledger import audit
from aligntune.trainers import create_rl_trainer
from tests.e2e.conftest import read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def events(tree: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [e for e in read(Path(tree["output_dir"]) / "events.jsonl") if e["kind"] == kind]


def reward(tree: dict[str, Any], name: str, timeout_s: float = 60.0, **options: Any) -> None:
    tree["rewards"] = [
        {
            "function": f"tests.e2e.rewards:{name}",
            "name": "judged",
            "timeout_s": timeout_s,
            "options": options,
        }
    ]
    tree["train"]["steps"] = 10  # one pass over the forty prompts, so the bad one comes once


@pytest.mark.parametrize(
    ("name", "timeout_s", "reason"),
    [("nan_for", 60.0, "not_finite"), ("hangs_for", 0.5, "timeout")],
)
def test_a_group_whose_reward_keeps_failing_is_quarantined_and_the_run_goes_on(
    tree: dict[str, Any], name: str, timeout_s: float, reason: str
) -> None:
    reward(tree, name, timeout_s, bad="25+5")
    result = create_rl_trainer(config=tree).train()
    assert (result.books.trained, result.books.quarantined, result.books.open) == (40, 1, 0)
    (quarantined,) = events(tree, "group_quarantined")
    assert reason in quarantined["reason"]
    assert "judged" in quarantined["reason"]
    assert len(events(tree, "group_retried")) == 2
    assert audit(Path(tree["output_dir"]) / "ledger.jsonl") == result.books


def test_a_reward_that_fails_once_costs_a_retry_only(tree: dict[str, Any], tmp_path: Path) -> None:
    reward(tree, "raises_until", bad="25+5", counter=str(tmp_path / "asked"))
    result = create_rl_trainer(config=tree).train()
    assert (result.books.trained, result.books.quarantined) == (40, 0)
    (retried,) = events(tree, "group_retried")
    assert "flaky" in retried["reason"]


def test_too_many_quarantined_groups_stop_the_run_with_the_reason(tree: dict[str, Any]) -> None:
    reward(tree, "always_raises")
    with pytest.raises(RunFailed, match=r"max_quarantined_fraction=0\.1") as failed:
        create_rl_trainer(config=tree).train()
    assert "this reward is broken" in str(failed.value)
    assert "broken" in events(tree, "run_stopped")[0]["reason"]


def test_stale_rollouts_stay_within_their_bound_and_every_group_is_trained_once(
    tree: dict[str, Any],
) -> None:
    tree["train"].update(steps=8, max_staleness=2)
    tree["rollout"]["replicas"] = 2
    result = create_rl_trainer(config=tree).train()
    rows = read(result.output_dir / "metrics.jsonl")
    assert max(row["staleness/max"] for row in rows) <= 2
    assert any(row["staleness/max"] > 0 for row in rows), "nothing overlapped"
    assert (result.books.trained, result.books.open) == (32, 0)
    moved = [
        group
        for record in read(result.output_dir / "ledger.jsonl")
        if record["event"] == "move" and record["to"] == "TRAINED"
        for group in record["groups"]
    ]
    assert sorted(moved) == sorted(set(moved))


def test_a_run_is_not_resumed_on_other_data(tree: dict[str, Any], questions: Path) -> None:
    tree["train"]["steps"] = 1
    create_rl_trainer(config=tree).train()
    config = Path(tree["output_dir"]) / "config.yaml"
    before = config.read_text()
    tree["train"]["steps"] = 2
    tree["data"]["max_samples"] = 20
    with pytest.raises(UserError, match="have changed since the checkpoint of step 1"):
        create_rl_trainer(config=tree).train()
    assert config.read_text() == before
