"""Episodes in the loop itself: the real controller, replica sets and environment actors over a toy
environment and policy, some of which die."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray

from actors import environment
from actors.environment import EnvironmentActor
from actors.environments.groups import made_group
from actors.environments.turns import Turns
from actors.messages import GroupSampling, Scores
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.ppo import PPO
from aligntune.errors import RunFailed
from aligntune.online.groups import ReadyGroup, group_works
from aligntune.online.ledger import audit
from aligntune.runs.jsonl import read_lines
from tests.actors.environments.toy import PROMPT, ToyEpisodes, ToyRollout, failing
from tests.aligntune.online.episodes import Play
from tests.aligntune.online.world import STEPS, ahead


@pytest.fixture(autouse=True)
def _no_ray() -> Iterator[None]:
    """What would start a Ray here would be found by every test that follows."""
    before = ray.is_initialized()
    yield
    assert ray.is_initialized() == before


@pytest.mark.slow
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
    assert sample["asked"] == 1
    assert list(sample["scores"]) == ["environment", "length"]
    evaluated = read_lines(folder / "evals.jsonl")
    assert [row["version"] for row in evaluated] == list(range(STEPS + 1))
    assert {row["eval/turns/mean"] for row in evaluated} == {1.0}
    assert made.judge.talks[0].answers[0] == [{"role": "assistant", "content": "b"}]
    assert made.toy.closed == 2, "each actor had the time to let its environments go"


def test_all_turns_of_a_group_are_asked_of_the_replica_that_has_its_prefixes_in_its_cache(
    play: Callable[..., Play],
) -> None:
    made = play(eval={"at_start": False})  # evaluations draw the same keys each time
    made.world.run(evaluated=False)
    homes = defaultdict(set)
    for name, rollout in made.rollouts.items():
        for key in (key for call in rollout.asked for key in call):
            homes[key.rsplit("/", 2)[0]].add(name)
    assert {len(names) for names in homes.values()} == {1}
    assert len(set.union(*homes.values())) == 2


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_environment_actor_in_which_nothing_moves_is_replaced(
    play: Callable[..., Play], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = play().run()
    monkeypatch.setattr(environment, "longest_silence", lambda *_: 0.5)
    made, turns = play(), [0]

    async def hang(rollout: int, turn: int) -> None:
        turns[0] += 1
        if turns[0] == 4:
            await asyncio.Event().wait()

    made.toy.before_turn = hang
    assert made.run() == expected
    lost = made.world.events("replica_lost")
    assert {event["role"] for event in lost} == {"environment"}
    assert all("no turn was answered" in event["reason"] for event in lost)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["sample", "update", "save"])
def test_a_run_of_episodes_whose_driver_dies_goes_on_and_its_books_balance(
    play: Callable[..., Play], place: str
) -> None:
    expected = play().run()
    made, calls = play(), [0]

    def die(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError("killed")

    made.world.during[place] = die
    with pytest.raises(MemoryError):
        made.world.run()
    made.world.during = {}
    assert made.run() == expected


@pytest.mark.slow
def test_an_episode_that_fails_costs_itself_alone(play: Callable[..., Play]) -> None:
    expected = play().run()
    made = play()
    made.toy.before_turn = failing(2, (1, 1))
    assert made.run() == expected
    assert sum(row["episodes/retried"] for row in made.world.rows()) <= 2
    assert not made.world.events("group_retried")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "tests.e2e.algorithms:PPOOnFunctions"])
def test_no_criterion_scores_an_episode_whose_environment_could_not_go_on(
    play: Callable[..., Play], name: str
) -> None:
    made = play(
        algorithm={"name": name, "beta": 0.0},
        episodes={"replicas": 2, "max_tokens": 64},
        eval={"at_start": False},
    )
    made.toy.loses = lambda rollout, turn: rollout == 1
    made.world.run(evaluated=False)
    rows = made.world.rows()
    assert sum(row["episodes/lost"] for row in rows) == STEPS * 2
    assert all(row["reward/environment/mean"] == 1.0 for row in rows), "of its sibling alone"
    for sample in read_lines(made.world.folder / "samples.jsonl"):
        kept, gone = sample["completions"]
        assert None not in kept["scores"].values()
        assert (gone["finish_reason"], gone["reward"]) == ("error", None)
        assert set(gone["scores"].values()) == {None}
        of_completions = name == "grpo"  # PPO's are of tokens, and never come to the driver
        assert [said.get("advantage") for said in (kept, gone)] == [
            0.0 if of_completions else None
        ] * 2
    assert not made.world.events("group_quarantined")


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
    episodes = asyncio.run(_episodes(made.toy))
    record, tensors, talks = made_group(0, episodes, 0.5, 0.1, "r")
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
