"""The actors on both sides of weights that ranks send to those who take them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from actors.engines.base import WeightMismatch
from actors.engines.specs import ENGINES
from actors.policy import PolicyActor
from actors.rollout import RolloutActor
from actors.specs import ModelSpec, PolicySpec, RolloutSpec
from actors.transfer.base import Arrival, Refused
from actors.transfer.specs import WEIGHT_SYNCS, NcclSpec
from tests.actors.engines.test_new_engine import EchoEngine, EchoSpec


class Reached(EchoEngine):
    """Keeps what it is told to load; `failure` is what comes of it."""

    failure: Exception | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.told: list[Any] = []

    async def load_weights(self, bundle: Any) -> float:  # type: ignore[override]
        self.told.append(bundle)
        if self.failure is not None:
            raise self.failure
        return 0.5


class ReachedSpec(EchoSpec):
    implementation = f"{__name__}:Reached"


class SentSpec(NcclSpec):
    engine = "echo"


class Sent:
    """Version 3, which is sent to rollout-0 alone."""

    version = 3

    def arrival(self, replica: str) -> Arrival | None:
        return Arrival(3, {"names": ["a"]}) if replica == "rollout-0" else None


def replica(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[RolloutActor, Reached]:
    monkeypatch.setitem(ENGINES, "echo", ReachedSpec)
    monkeypatch.setitem(WEIGHT_SYNCS, "nccl", SentSpec)
    spec = RolloutSpec.model_validate({"engine": "echo", "weight_sync": "nccl"})
    actor = RolloutActor(ModelSpec(name="none"), spec, name, 0, 2, 0)
    engine: Any = actor._engine
    return actor, engine


def test_a_replica_has_its_engine_take_what_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, engine = replica("rollout-0", monkeypatch)
    assert asyncio.run(actor.receive_weights(Sent())) == 0.5
    assert engine.told == [Arrival(3, {"names": ["a"]})]


def test_one_that_is_sent_nothing_says_so_and_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor, engine = replica("rollout-1", monkeypatch)
    answer = asyncio.run(actor.receive_weights(Sent()))
    assert answer == Refused("rollout-1", "version 3 was not sent to it")
    assert engine.told == []


def test_one_that_did_not_get_all_of_it_ends_instead_of_ending_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Ended(BaseException):
        pass

    def exit_(code: int) -> None:
        raise Ended

    actor, engine = replica("rollout-0", monkeypatch)
    engine.failure = WeightMismatch("weights of version 3 did not load: NCCL error")
    monkeypatch.setattr(os, "_exit", exit_)
    with pytest.raises(Ended):
        asyncio.run(actor.receive_weights(Sent()))
    assert "rollout replica rollout-0 ends: weights of version 3" in capfd.readouterr().err


def test_an_engine_that_cannot_take_what_is_sent_is_refused_as_its_replica_starts() -> None:
    spec = RolloutSpec.model_validate({"engine": "transformers", "weight_sync": "nccl"})
    with pytest.raises(ValueError, match=r"nccl needs rollout\.engine=vllm, and here it is trans"):
        RolloutActor(ModelSpec(name="none"), spec, "rollout-0", 0, 2, 0)


class Sender:
    """A rank's side of a transport of one's own."""

    made = 0

    def __init__(self, strategy: Any) -> None:
        type(self).made += 1
        self.strategy = strategy

    def add(self, a: int, b: int) -> tuple[Any, int]:
        return self.strategy, a + b


def test_a_rank_makes_its_side_of_a_transport_once_and_of_its_strategy() -> None:
    actor = PolicyActor(ModelSpec(name="none"), PolicySpec(), 0, 1, 1, 0)
    strategy: Any = object()
    actor._strategy = strategy
    named = f"{__name__}:Sender"
    assert actor.send(named, "add", 1, 2) == (strategy, 3)
    assert actor.send(named, "add", 3, 4) == (strategy, 7)
    assert Sender.made == 1
