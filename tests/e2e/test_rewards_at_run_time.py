"""A reward that fails is retried, then its group is quarantined; the run goes on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from aligntune.errors import RunFailed, UserError
from aligntune.online.ledger import audit
from aligntune.trainers import create_rl_trainer
from tests.e2e.conftest import read

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


QUARANTINED = "group_quarantined"


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


def test_failing_rewards_are_retried_then_their_groups_quarantined_and_the_run_goes_on(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    bad = {"25+5": "nan", "26+6": "hang", "27+7": "raise", "28+8": "once"}
    reward(tree, "misbehaves_for", 0.5, bad=bad, counter=str(tmp_path / "asked"))
    tree["train"].update(steps=9, max_quarantined_fraction=0.5)  # 36 and 3 of forty prompts
    result = create_rl_trainer(config=tree).train()
    assert (result.books.trained, result.books.quarantined, result.books.open) == (36, 3, 0)
    reasons = sorted(e["reason"].split("(")[1].split(")")[0] for e in events(tree, QUARANTINED))
    assert reasons == ["not_finite", "raised", "timeout"]
    assert all("'judged'" in e["reason"] for e in events(tree, QUARANTINED))
    retried = [e["reason"] for e in events(tree, "group_retried")]
    assert sum("flaky" in reason for reason in retried) == 1, "once is a retry and no more"
    assert len(retried) == 3 * 2 + 1
    assert audit(Path(tree["output_dir"]) / "ledger.jsonl") == result.books


def test_too_many_quarantined_groups_stop_the_run_with_the_reason(tree: dict[str, Any]) -> None:
    reward(tree, "always_raises")
    tree["rewards"][0]["try_first"] = False  # which would refuse it before the run
    with pytest.raises(RunFailed, match=r"max_quarantined_fraction=0\.1") as failed:
        create_rl_trainer(config=tree).train()
    assert "this reward is broken" in str(failed.value)
    assert "broken" in events(tree, "run_stopped")[0]["reason"]


def test_dynamic_sampling_that_finds_nothing_to_train_on_stops_with_the_scores(
    tree: dict[str, Any],
) -> None:
    reward(tree, "undecided")
    tree["algorithm"] = {"name": "dapo", "max_sampling_rounds": 2, "overlong_cache": 2}
    tree["train"]["groups_per_minibatch"] = 4
    with pytest.raises(RunFailed, match=r"filtered in 2 rounds and 0 of 4 kept") as failed:
        create_rl_trainer(config=tree).train()
    assert re.search(r"those filtered: 0\.1 x \d+\. The completions", str(failed.value))
    assert "too hard, too easy" in str(failed.value)
    books = audit(Path(tree["output_dir"]) / "ledger.jsonl")
    assert books.trained == 0
    assert books.filtered >= 8
    assert books.balanced


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
