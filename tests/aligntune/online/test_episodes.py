"""Episodes in the loop itself: the real controller, replica sets and environment actors over a toy
environment and policy, some of which die."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray

from actors import environment
from actors.environment import EnvironmentActor
from actors.environments.specs import EpisodeCode
from actors.environments.turns import Turns
from actors.messages import Conversations, GroupSampling, GroupTensors, Prompt, Scores
from actors.scoring.criteria import EpisodeCriterion, RewardCriterion
from actors.supervise import ReplicaSet
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.ppo import PPO
from aligntune.errors import RunFailed
from aligntune.online.groups import ReadyGroup, group_works
from aligntune.online.ledger import audit
from aligntune.online.role_table import limits_of
from aligntune.runs.jsonl import read_lines
from tests.actors.environments.toy import PROMPT, ToyEpisodes, ToyRollout, failing
from tests.aligntune.online.hands import Company
from tests.aligntune.online.world import STEPS, World, ahead


@pytest.fixture(autouse=True)
def _no_ray() -> Iterator[None]:
    """What would start a Ray here would be found by every test that follows."""
    before = ray.is_initialized()
    yield
    assert ray.is_initialized() == before


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
                "environment": "a.game:Game",
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
            config.model, config.episodes, EpisodeCode(), limits_of(config), name, 30.0, True
        )

    def run(self) -> list[dict[str, Any]]:
        """The whole run, audited; its rows without times and without who did what."""
        self.world.run()
        books = audit(self.world.folder / "ledger.jsonl")
        assert (books.trained, books.open) == (STEPS * 2, 0)
        return [
            {k: v for k, v in row.items() if k != "episodes/retried"} for row in self.world.rows()
        ]


@pytest.fixture
def play(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Play]:
    """A run of episodes in a folder of its own each time."""
    count = [0]

    def make(**changes: Any) -> Play:
        count[0] += 1
        world.folder = world.folder.parent / f"run-{count[0]}"
        world.folder.mkdir()
        world.during = {}
        world.updates.clear()
        return Play(world, monkeypatch, **changes)

    return make


def test_a_run_of_episodes_trains_evaluates_and_tells_of_turns_tools_and_talk(
    play: Callable[..., Play],
) -> None:
    made = play()
    rows = made.run()
    assert len(rows) == STEPS
    for row in rows:
        assert (row["turns/mean"], row["turns/max"]) == (1.5, 2.0)
        assert (row["tools/calls"], row["turns/extended"]) == (2.0, 2.0)
        assert 0 < row["tokens/environment_fraction"] < 1
        assert row["reward/environment/mean"] == (1.0 + 2.0) / 2
        assert row["reward/mean"] == row["reward/environment/mean"] + row["reward/length/mean"]
    folder = made.world.folder
    sample = read_lines(folder / "samples.jsonl")[0]["completions"][1]
    assert sample["turns"] == 2
    assert [message["role"] for message in sample["messages"]] == ["user", "assistant"]
    assert list(sample["scores"]) == ["environment", "length"]
    evaluated = read_lines(folder / "evals.jsonl")
    assert [row["version"] for row in evaluated] == list(range(STEPS + 1))
    assert {row["eval/turns/mean"] for row in evaluated} == {1.0}
    assert made.judge.talks[0].answers[0] == [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("role", ["rollout", "environment"])
@pytest.mark.parametrize("call", [0, 3, 4, 9])
def test_a_replica_killed_amid_an_episode_costs_nothing_but_time(
    play: Callable[..., Play], role: str, call: int
) -> None:
    expected = play().run()
    made, calls = play(), [0]

    async def kill(name: str, turns: Any) -> None:
        calls[0] += 1
        if calls[0] - 1 == call:
            busy = [
                hand
                for hand in made.company.hands.values()
                if not hand.dead and isinstance(hand.actor, EnvironmentActor) and hand.actor._lives
            ]
            (made.company.hands[name] if role == "rollout" else busy[0]).kill()
            await asyncio.sleep(0)

    made.world.during["sample"] = kill
    assert made.run() == expected
    lost = made.world.events("replica_lost")
    assert [event["role"] for event in lost] == [role]
    retried = made.world.events("group_retried")
    assert retried
    begun_again = "its episodes go on" not in retried[0]["reason"]
    assert begun_again == (role == "environment")


def test_an_episode_that_fails_costs_itself_alone(play: Callable[..., Play]) -> None:
    expected = play().run()
    made = play()
    made.toy.before_turn = failing(2, (1, 1))
    assert made.run() == expected
    assert sum(row["episodes/retried"] for row in made.world.rows()) <= 2
    assert not made.world.events("group_retried")


def test_a_group_whose_episode_keeps_failing_is_quarantined_and_is_never_a_score(
    play: Callable[..., Play],
) -> None:
    made = play(train={**ahead(0), "max_quarantined_fraction": 0.5}, eval={"at_start": False})
    made.toy.before_turn = failing(3, (1, 1), infrastructure=False)
    made.world.run(evaluated=False)
    books = audit(made.world.folder / "ledger.jsonl")
    assert (books.trained, books.quarantined, books.open) == (STEPS * 2, 1, 0)
    (event,) = made.world.events("group_quarantined")
    assert event["reason"] == "an episode failed 3 times, the last: its process died"


def test_a_run_whose_episodes_all_fail_ends_and_says_why(play: Callable[..., Play]) -> None:
    made = play()
    made.toy.before_turn = failing(10_000, (0, 0))
    with pytest.raises(RunFailed, match="its process died"):
        made.world.run()


def test_stale_episodes_stay_within_their_bound_and_every_group_is_trained_once(
    play: Callable[..., Play],
) -> None:
    made = play(train=ahead(2))
    rows = made.run()
    assert all(row["staleness/max"] <= 2 for row in rows)
    trained = [group for step in made.world.trained() for group in step]
    assert len(trained) == len(set(trained)) == STEPS * 2


def test_ppo_is_told_what_each_turn_earned_and_a_group_algorithm_the_sum(
    play: Callable[..., Play],
) -> None:
    made = play(rewards=[{"function": "environment", "weight": 2.0}, "length"])
    record, tensors, talks = environment.made_group(
        0, asyncio.run(_episodes(made.toy)), 0.5, 0.1, "r"
    )
    assert record.episodes is not None
    values = tuple((e, 10.0) for e in record.episodes.rewards["environment"])
    scores = Scores(0, ("environment", "length"), values, 0.0)
    group = ReadyGroup(PROMPT, record, scores, None, tensors, talks)
    (of_group,) = group_works(made.world.config, GRPO(), [group])
    assert of_group.scores == tuple(2 * e + 10 for e, _ in values)
    assert of_group.turn_weight == 0
    (of_ppo,) = group_works(made.world.config, PPO(), [group])
    assert of_ppo.scores == (10.0,) * 3
    assert of_ppo.turn_weight == 2
    assert isinstance(tensors.rewards, np.ndarray)


async def _episodes(toy: ToyEpisodes) -> list[Any]:
    rollout, made = ToyRollout(), []
    turns = Turns(GroupSampling(64, 1.0, 3, 0, 0), False, _ask)
    turns.use(rollout, rollout.name)
    for number in range(3):
        turns.begin(number)
        made.append(await toy.run(PROMPT, number, 0, turns.sampler(number)))
    return made


async def _ask(rollout: ToyRollout, name: str, turns: Any) -> Any:
    return await rollout._sample(turns)
