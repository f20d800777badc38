"""Episodes in an environment actor: whose death costs what, and that nothing is sampled twice."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors import environment
from actors.environment import EnvironmentActor, EnvironmentStuck, EpisodesGroup, RolloutGone
from actors.environments.base import EpisodeFailed, EpisodeLimits
from actors.environments.specs import EpisodeCode, EpisodesSpec
from actors.messages import FinishReason, GroupSampling, VersionSpan
from actors.specs import ModelSpec
from tests.actors.environments.toy import PROMPT, ToyEpisodes, ToyRollout, failing
from tests.histories.clock import VirtualLoop

LIMITS = EpisodeLimits(8, 8, 64, 128, 1.0, 5.0, 1000)
SAMPLING = GroupSampling(64, 1.0, completions=6, seed=7, group_id=3)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyEpisodes:
    made = ToyEpisodes()
    monkeypatch.setattr(environment, "episodes_of", lambda *args: made)
    return made


def actor(lockstep: bool = False, **changes: Any) -> EnvironmentActor:
    spec = EpisodesSpec(**changes)
    return EnvironmentActor(
        *(ModelSpec(name="m"), spec, EpisodeCode(), LIMITS, "environment-0", 30.0, lockstep),
        drop=lambda ref: ref.drop(),
    )


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


async def played(
    made: EnvironmentActor, rollout: ToyRollout, sampling: GroupSampling = SAMPLING
) -> EpisodesGroup:
    group = await made.generate("life", PROMPT, sampling, rollout.handle, rollout.name)
    await made.end("life")
    return group


def same(one: EpisodesGroup, other: EpisodesGroup) -> bool:
    """Whether two groups have the same tokens, log-probs and rewards."""
    return (
        one[0].lengths == other[0].lengths
        and one[0].version_spans == other[0].version_spans
        and one[0].episodes == other[0].episodes
        and all(
            np.array_equal(getattr(one[1], name), getattr(other[1], name))
            for name in ("prompt_ids", "token_ids", "logprobs", "mask", "rewards")
        )
    )


@pytest.mark.parametrize("lockstep", [False, True])
def test_a_group_of_episodes_has_their_tokens_turns_rewards_and_conversations(
    toy: ToyEpisodes, lockstep: bool
) -> None:
    rollout = ToyRollout()
    record, tensors, talks = run(played(actor(lockstep, discount=0.5), rollout))
    assert record.turns == (1, 2, 3, 1, 2, 3)
    assert tensors.prompt_ids.tolist() == [1, 2, 3]
    assert record.replica == "rollout-0"
    assert record.load is not None
    assert record.episodes is not None
    whole = {1: 1.0, 2: 1.0 + 0.5 * 2, 3: 1.0 + 0.5 * 2 + 0.25 * 3}
    assert record.episodes.rewards == {"environment": tuple(whole[n] for n in record.turns)}
    assert record.episodes.final == (0.0,) * 6
    assert record.episodes.figures["tool_calls"] == 6
    assert talks.answers == [[{"role": "assistant", "content": "b"}]] * 6
    assert len(toy.seeds) == 1
    for row in range(6):
        cut = tensors.completion(row)
        mask, rewards = tensors.mask[cut], tensors.rewards[cut]
        ends = [i for i in range(len(mask)) if mask[i] and (i + 1 == len(mask) or not mask[i + 1])]
        assert rewards[ends].tolist() == [1.0 + turn for turn in range(record.turns[row])]
        assert rewards.sum() == rewards[ends].sum()
        assert set(tensors.token_ids[cut][~mask].tolist()) <= {90, 91}


def test_without_rewards_of_turns_the_end_s_is_the_environment_s(toy: ToyEpisodes) -> None:
    toy.per_turn = False
    record, tensors, _ = run(played(actor(), ToyRollout()))
    assert record.episodes is not None
    assert record.episodes.rewards == {"environment": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)}
    assert record.episodes.final is None
    assert tensors.rewards is None


def test_in_lockstep_a_turn_of_all_episodes_is_one_call_in_their_order(toy: ToyEpisodes) -> None:
    rollout = ToyRollout()

    async def slowly(number: int, turn: int) -> None:
        for _ in range(7 - number):
            await asyncio.sleep(0)

    toy.before_turn = slowly
    run(played(actor(True), rollout))
    places = [[key.removeprefix("7/3/") for key in call] for call in rollout.asked]
    assert places == [
        [f"{number}/0" for number in range(6)],
        ["1/1", "2/1", "4/1", "5/1"],
        ["2/2", "5/2"],
    ]


def test_without_lockstep_no_episode_waits_for_another(toy: ToyEpisodes) -> None:
    held, rollout = asyncio.Event(), ToyRollout()

    async def hold(number: int, turn: int) -> None:
        if number == 0:
            await held.wait()
        if (number, turn) == (5, 2):
            held.set()  # the last turn of the longest one lets the first one go

    toy.before_turn = hold
    run(played(actor(), rollout))
    assert rollout.asked[-1] == ["7/3/0/0"] or rollout.asked.index(["7/3/0/0"]) > 5


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_rollout_replica_that_dies_costs_a_turn_and_no_episode(
    toy: ToyEpisodes, lockstep: bool, turn: int
) -> None:
    undisturbed = run(played(actor(lockstep), ToyRollout()))
    toy.begun.clear()
    first, second = ToyRollout("rollout-0"), ToyRollout("rollout-1")

    def die(turns: Any) -> None:
        first.lost = first.lost or any(t.key.endswith(f"/{turn}") for t in turns)

    first.during = die

    async def two() -> EpisodesGroup:
        made = actor(lockstep)
        with pytest.raises(RolloutGone, match=r"rollout-0: died during sample"):
            await made.generate("life", PROMPT, SAMPLING, first.handle, first.name)
        return await made.generate("life", PROMPT, SAMPLING, second.handle, second.name)

    again = run(two())
    assert same(undisturbed, again)
    assert sorted(toy.begun) == list(range(6))
    answered = {key for call in first.asked for key in call if not key.endswith(f"/{turn}")}
    assert not any(key in answered for call in second.asked for key in call if turn == 2)


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("at", [(2, 0), (2, 1), (2, 2)])
def test_an_episode_that_fails_is_begun_anew_alone_and_nothing_is_sampled_twice(
    toy: ToyEpisodes, lockstep: bool, at: tuple[int, int]
) -> None:
    """A game that is a function of its seed goes as it went: its turns have their answers."""
    undisturbed, rollout = run(played(actor(lockstep), ToyRollout())), ToyRollout()
    toy.begun.clear()
    toy.before_turn = failing(2, at)
    record, tensors, talks = run(played(actor(lockstep), rollout))
    assert record.episodes is not None
    assert record.episodes.figures["retried"] == 2
    assert sorted(toy.begun) == [0, 1, 2, 2, 2, 3, 4, 5]
    keys = [key for call in rollout.asked for key in call]
    assert len(keys) == len(set(keys))
    calm = replace(record.episodes, figures={**record.episodes.figures, "retried": 0})
    assert same(undisturbed, (replace(record, episodes=calm), tensors, talks))
    if lockstep:
        assert [len(call) for call in rollout.asked] == [6, 4, 2]


@pytest.mark.parametrize("infrastructure", [False, True])
def test_a_group_fails_when_an_episode_has_failed_as_often_as_it_may(
    toy: ToyEpisodes, infrastructure: bool
) -> None:
    toy.before_turn = failing(2, (1, 1), infrastructure)
    with pytest.raises(EpisodeFailed, match=r"failed 2 times, the last: its process died") as seen:
        run(played(actor(max_attempts=2), ToyRollout()))
    assert seen.value.infrastructure is infrastructure
    assert sorted(toy.ended) == sorted(toy.begun), "no sibling is left behind"


@pytest.mark.parametrize("per_turn", [False, True])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_turn_that_loses_its_environment_each_time_costs_its_own_episode_alone(
    toy: ToyEpisodes, per_turn: bool, turn: int
) -> None:
    """What a model may do on purpose. Its siblings are kept, and nothing is said of its worth."""
    toy.per_turn = per_turn
    toy.loses = lambda number, at: (number, at) == (2, turn)
    rollout = ToyRollout()
    record, tensors, _ = run(played(actor(), rollout))
    stop, error = FinishReason.STOP, FinishReason.ERROR
    assert record.finish_reasons == (stop, stop, error, stop, stop, stop)
    assert record.turns == (1, 2, 1 + turn, 1, 2, 3)
    assert record.episodes is not None
    rewards = record.episodes.rewards["environment"]
    assert [number for number, worth in enumerate(rewards) if worth is None] == [2]
    assert (record.episodes.figures["retried"], record.episodes.figures["lost"]) == (1, 1)
    if per_turn:
        assert record.episodes.final == (0.0, 0.0, None, 0.0, 0.0, 0.0)
        assert not tensors.rewards[tensors.completion(2)].any()
    assert sorted(toy.begun) == [0, 1, 2, 2, 3, 4, 5]
    keys = [key for call in rollout.asked for key in call]
    assert len(keys) == len(set(keys)), "the turn had its answer"


def test_an_environment_that_is_lost_once_or_elsewhere_each_time_is_begun_anew(
    toy: ToyEpisodes,
) -> None:
    left = [(2, 0), (2, 1)]

    def loses(number: int, turn: int) -> bool:
        if left and (number, turn) == left[0]:
            left.pop(0)
            return True
        return False

    toy.loses = loses
    record, _, _ = run(played(actor(), ToyRollout()))
    assert set(record.finish_reasons) == {FinishReason.STOP}
    assert record.episodes is not None
    assert (record.episodes.figures["retried"], record.episodes.figures["lost"]) == (2, 0)


def test_a_group_whose_episodes_all_lose_their_environment_fails(toy: ToyEpisodes) -> None:
    toy.loses = lambda number, turn: True
    with pytest.raises(EpisodeFailed, match=r"twice at the same turn, the last: its pro") as seen:
        run(played(actor(), ToyRollout()))
    assert seen.value.infrastructure


def test_faults_of_the_row_and_of_machines_have_budgets_of_their_own(toy: ToyEpisodes) -> None:
    of_machines, of_the_row = failing(1, (1, 1)), failing(1, (1, 0), infrastructure=False)

    def both(number: int, turn: int) -> None:
        of_machines(number, turn)
        of_the_row(number, turn)

    toy.before_turn = both
    record, _, _ = run(played(actor(max_attempts=2), ToyRollout()))
    assert record.episodes is not None
    assert record.episodes.figures["retried"] == 2


def test_a_call_that_is_repeated_goes_on_with_the_same_episodes(toy: ToyEpisodes) -> None:
    rollout = ToyRollout()

    async def twice() -> list[EpisodesGroup]:
        made = actor()
        calls = [
            made.generate("life", PROMPT, SAMPLING, rollout.handle, rollout.name) for _ in range(2)
        ]
        groups = await asyncio.gather(*calls)
        groups.append(await made.generate("life", PROMPT, SAMPLING, rollout.handle, "rollout-0"))
        return groups

    one, other, after = run(twice())
    assert one is other is after
    assert sorted(toy.begun) == list(range(6))


def test_the_end_of_a_life_ends_its_episodes_and_frees_it(toy: ToyEpisodes) -> None:
    async def ended() -> None:
        made, rollout = actor(), ToyRollout()
        held, all_begun = asyncio.Event(), asyncio.Event()

        async def hold(number: int, turn: int) -> None:
            if len(toy.begun) == 6:
                all_begun.set()
            await held.wait()

        toy.before_turn = hold
        call = asyncio.create_task(
            made.generate("life", PROMPT, SAMPLING, rollout.handle, rollout.name)
        )
        await all_begun.wait()
        await made.end("life")
        assert sorted(toy.ended) == list(range(6))
        with pytest.raises(asyncio.CancelledError):
            await call
        await made.close()

    run(ended())


@pytest.mark.parametrize("lockstep", [False, True])
def test_the_end_of_a_life_ends_its_turns_at_the_replica(toy: ToyEpisodes, lockstep: bool) -> None:
    ended: list[int] = []

    async def ends() -> None:
        made, rollout = actor(lockstep), ToyRollout()
        all_asked = asyncio.Event()

        async def hold(turns: Any) -> None:
            if sum(map(len, rollout.asked)) == 6:
                all_asked.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(len(turns))
                raise

        rollout.during = hold
        call = asyncio.create_task(
            made.generate("life", PROMPT, SAMPLING, rollout.handle, rollout.name)
        )
        await all_asked.wait()
        await made.end("life")
        with pytest.raises(asyncio.CancelledError):
            await call

    run(ends())
    assert ended == ([6] if lockstep else [1] * 6)


def test_what_no_try_can_mend_is_raised_as_it_is(toy: ToyEpisodes) -> None:
    """A defect of what runs the episodes is no episode's failure."""

    def broken(number: int, turn: int) -> None:
        raise KeyError("a defect")

    toy.before_turn = broken
    with pytest.raises(KeyError):
        run(played(actor(), ToyRollout()))


def test_tokens_keep_the_versions_that_made_them_where_a_newer_replica_takes_over(
    toy: ToyEpisodes,
) -> None:
    old, new = ToyRollout("rollout-0", version=4), ToyRollout("rollout-1", version=5)

    def die(turns: Any) -> None:
        old.lost = old.lost or turns[0].key.endswith("/1")

    old.during = die

    async def two() -> EpisodesGroup:
        made = actor(True)
        with pytest.raises(RolloutGone):
            await made.generate("life", PROMPT, SAMPLING, old.handle, old.name)
        return await made.generate("life", PROMPT, SAMPLING, new.handle, new.name)

    record, _, _ = run(two())
    assert record.replica == "rollout-1"
    assert record.load is None
    for spans, turns in zip(record.version_spans, record.turns, strict=True):
        assert [span.version for span in spans] == [4, 5, 5][:turns]
        assert all(isinstance(span, VersionSpan) for span in spans)
    assert record.oldest_version == 4


def test_an_actor_in_which_nothing_moves_any_more_says_so(
    toy: ToyEpisodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "longest_silence", lambda *_: 0.1)
    toy.before_turn = lambda number, turn: asyncio.Event().wait()
    with pytest.raises(EnvironmentStuck, match=r"no turn was answered .* for 0\.1 s"):
        run(played(actor(), ToyRollout()))


def test_an_actor_in_which_something_moves_is_not_taken_for_stuck(
    toy: ToyEpisodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long one group takes."""
    monkeypatch.setattr(environment, "longest_silence", lambda *_: 0.01)

    async def others(made: EnvironmentActor) -> None:
        while True:
            made.done += 1
            await asyncio.sleep(0)

    async def wait() -> None:
        made = actor()
        moving = asyncio.create_task(others(made))
        await made._until_either([asyncio.create_task(asyncio.sleep(0.2))])
        moving.cancel()

    run(wait())


def test_the_last_movement_is_what_silence_is_counted_from(
    toy: ToyEpisodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the window that it fell into: the actor is replaced before the run counts as stalled."""
    monkeypatch.setattr(environment, "longest_silence", lambda *_: 1000.0)
    loop = VirtualLoop()

    async def stuck() -> None:
        made = actor()
        loop.call_later(10.0, setattr, made, "done", 1)
        with pytest.raises(EnvironmentStuck):
            await made._until_either([asyncio.create_task(asyncio.Event().wait())])

    loop.run(stuck())
    assert 1000.0 < loop.now < 1000.0 * (1 + 1 / environment.LOOKS) + 10.0


def test_what_user_code_prints_goes_to_a_file_by_a_path_without_links(tmp_path: Path) -> None:
    """A sandbox hides the folders that links of the given path may lie in."""
    (tmp_path / "scratch" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    found = environment.log_file(str(tmp_path / "link" / "run" / "logs" / "reward.log"))
    assert found == str(tmp_path.resolve() / "scratch" / "run" / "logs" / "reward.log")
    assert Path(found).parent.is_dir()
    assert environment.log_file(str(tmp_path / "elsewhere" / "logs" / "reward.log")) is None


def test_silence_is_bounded_by_the_limits_of_an_episode_and_of_a_turn() -> None:
    """Minutes, where episodes take minutes: not the sum of all their turns and tries."""
    assert environment.longest_silence(LIMITS, 20.0, 30.0) == 300 + 60 + 1 + 5 + 20 + 30
