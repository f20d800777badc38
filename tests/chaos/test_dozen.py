"""A run of every role is hit again and again, and is whole after each hit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.campaign import Campaign, Parts, draw
from tests.chaos.trial import KILL, OF_THE_MACHINE, STOP, VICTIMS, Hit, lines_of

OF_EACH_KIND = [
    Hit("reward child", KILL),  # its actor starts another
    Hit("rollout", KILL),  # a replica that another takes the place of
    Hit("policy", KILL),  # ranks that go back to a checkpoint
    Hit("policy", STOP),  # who is there and says nothing
    Hit("raylet", STOP),  # what stands still for a while, and is no loss
]


def test_every_victim_is_hit_before_any_comes_again() -> None:
    every = [(name, sent) for name in VICTIMS for sent in VICTIMS[name]]
    hits = [(hit.victim, hit.signal) for hit in draw(len(every) + 3, 1, list(VICTIMS), VICTIMS)]
    assert sorted(hits[: len(every)]) == sorted(every)
    assert len(hits) == len(every) + 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_whole_after_a_hit_of_each_kind(tmp_path: Path) -> None:
    """What is overcome soon: `make chaos` hits every process, the driver and Ray too."""
    campaign = Campaign(tmp_path, Parts(), OF_EACH_KIND, seed=3)
    rows = list(campaign.results())
    assert [row["problems"] for row in rows] == [[]] * len(OF_EACH_KIND)

    def told(kind: str) -> list[dict[str, Any]]:
        return [e for e in lines_of(campaign.run / "events.jsonl") if e["kind"] == kind]

    assert "rollout" in {event["role"] for event in told("replica_restarted")}
    versions = [event["to_version"] for event in told("policy_rebuilt")]
    assert len(versions) >= 2
    assert all(version >= 2 and version % 2 == 0 for version in versions), "those of checkpoints"


@pytest.mark.long  # three minutes beside other work
@pytest.mark.timeout(900)
def test_a_run_is_whole_after_each_of_a_dozen_hits(tmp_path: Path) -> None:
    kills = {name: (KILL,) for name in VICTIMS if name not in {"engine", *OF_THE_MACHINE}}
    hits = [*draw(10, 3, sorted(kills), kills), Hit("raylet", STOP), Hit("policy", STOP)]
    rows = list(Campaign(tmp_path, Parts(), hits, seed=3).results())
    assert [row["problems"] for row in rows] == [[]] * 12


@pytest.mark.long  # five minutes alone, and it must be alone
@pytest.mark.timeout(900)
def test_a_run_is_whole_after_each_hit_of_any_kind(tmp_path: Path) -> None:
    parts = Parts()
    hits = draw(12, 3, parts.victims(sorted(VICTIMS)), VICTIMS)
    rows = list(Campaign(tmp_path, parts, hits, seed=3).results())
    assert [row["problems"] for row in rows] == [[]] * 12
