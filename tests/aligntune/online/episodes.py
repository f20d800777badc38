"""A run of episodes without processes: the real environment actors over a toy game and policy."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from actors import environment
from actors.environment import EnvironmentActor
from actors.environments.specs import EpisodeCode
from actors.messages import Conversations, GroupTensors, Prompt, Scores
from actors.scoring.criteria import EpisodeCriterion, RewardCriterion
from actors.supervise import ReplicaSet
from aligntune.online.ledger import audit
from aligntune.online.role_table import limits_of
from tests.actors.environments.toy import ToyEpisodes, ToyRollout
from tests.aligntune.online.hands import Company
from tests.aligntune.online.world import STEPS, World


class Rollout(ToyRollout):
    """A rollout replica that takes weights, such as `weights 3`."""

    async def start(self) -> dict[str, Any]:
        """It is ready."""
        return {"engine": "toy", "engine_version": "1", "version": self.version}

    async def load_weights(self, weights: str) -> None:
        """They are a number."""
        self.version = int(weights.removeprefix("weights "))

    async def sample(self, turns: Any) -> Any:
        """See `RolloutActor`."""
        return await self._sample(turns)

    async def work(self) -> Any:
        """See `RolloutActor`."""
        return await self._work()


class Judge:
    """A reward actor: a rollout's tokens, counted."""

    def __init__(self) -> None:
        self.talks: list[Conversations] = []

    async def start(self) -> dict[str, Any]:
        """It is ready."""
        return {}

    async def score(
        self, prompt: Prompt, tensors: GroupTensors, conversations: Conversations
    ) -> tuple[Scores, tuple[str, ...]]:
        """See `RewardActor`."""
        self.talks.append(conversations)
        lengths = [float(tensors.lengths[row]) for row in conversations.last_rows]
        values = tuple((length,) for length in lengths)
        return Scores(tensors.group_id, ("length",), values, 0.0), ("text",) * len(lengths)


class Play:
    """A run of episodes, and who plays it."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.world = world
        self.toy = ToyEpisodes()
        monkeypatch.setattr(environment, "episodes_of", lambda *args: self.toy)
        self.judge = Judge()
        self.rollouts: dict[str, Rollout] = {}
        world.configure(
            **{
                "agent": "a.game:play",
                "rewards": ["environment", "length"],
                "episodes": {"replicas": 2, "discount": 0.5, "max_tokens": 64},
                "rollout": {"replicas": 2, "max_prompt_length": 8, "engine": "transformers"},
                **changes,
            }
        )
        self.company = Company(
            {"rollout": self._rollout, "reward": lambda name: self.judge, "environment": self._play}
        )
        world.roles = self.company
        world.replica_set = functools.partial(
            ReplicaSet, kill=lambda hand: hand.kill(), drop=lambda ref: ref.drop()
        )
        world.criteria = (
            EpisodeCriterion("environment", "environment"),
            RewardCriterion("length", "m:length", 1.0),
        )

    def _rollout(self, name: str) -> Rollout:
        made = self.rollouts[name] = Rollout(name)
        made.during = lambda turns: self.world.happens("sample", name, turns)
        return made

    def _play(self, name: str) -> EnvironmentActor:
        config = self.world.config
        return EnvironmentActor(
            config.model,
            config.episodes,
            EpisodeCode(),
            limits_of(config),
            name,
            30.0,
            True,
            drop=lambda ref: ref.drop(),
        )

    def run(self) -> list[dict[str, Any]]:
        """The whole run, audited; its rows without times and without who did what."""
        self.world.run()
        books = audit(self.world.folder / "ledger.jsonl")
        assert (books.trained, books.open) == (STEPS * 2, 0)
        return [
            {k: v for k, v in row.items() if k != "episodes/retried"} for row in self.world.rows()
        ]
