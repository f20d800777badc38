"""An evaluation in which a role starts too slowly ends with one line, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from actors.answers import ReplicaLost
from actors.supervise import RoleExhausted
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online import evaluating, running

SAID = "reward: start had no answer within 300 s (reward.start_timeout_s)"


@pytest.fixture
def config() -> RunConfig:
    made = load_config(
        {
            "algorithm": {"name": "grpo", "beta": 0.0},
            "model": {"name": "some/model"},
            "data": {"path": "x.jsonl"},
            "rewards": ["length"],
            "output_dir": "run",
        }
    )
    assert isinstance(made, RunConfig)
    return made


class Replicas:
    """Of rewards, which start too slowly, or of rollouts, which are let go while they start."""

    ended: list[str] = []

    def __init__(self, role: str, *_: Any, **__: Any) -> None:
        self.role = role

    async def start(self) -> None:
        if self.role == "reward":
            await asyncio.sleep(0)
            raise RoleExhausted(SAID)
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.append(self.role)
            raise ReplicaLost(f"{self.role}-0.0", "it was let go")  # as a cancelled start may say

    async def close(self) -> None:
        """Nothing is left to end."""


def test_siblings_that_still_start_are_ended_before_the_reason_is_raised(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "ReplicaSet", Replicas)
    monkeypatch.setattr(Replicas, "ended", [])
    unheard: list[Mapping[str, Any]] = []
    roles: Any = SimpleNamespace(maker=lambda role: None, room=lambda role: None)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, said: unheard.append(said))
        with pytest.raises(RoleExhausted, match="had no answer within 300 s"):
            async with evaluating.served(config, roles, (), lambda name, info: None):
                pytest.fail("the reward has not started")
        assert Replicas.ended == ["rollout"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert unheard == []


@pytest.mark.parametrize("error", [RoleExhausted(SAID), ReplicaLost("policy-0", "it died")])
def test_what_ends_the_work_of_roles_is_one_line_without_the_tracebacks_behind_it(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(running, "session", lambda *_, **__: nullcontext("here"))
    monkeypatch.setattr(running, "reserve", lambda *_, **__: nullcontext(SimpleNamespace()))
    with (
        pytest.raises(RunFailed) as failed,
        running.reserved(config, (), 1, None, lambda text: None, ("rollout", "reward")),
    ):
        raise error
    assert str(failed.value) == str(error)
    assert failed.value.__suppress_context__
