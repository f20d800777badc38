"""Whom the death of a replica is blamed on: a prompt that kills, and those that were beside it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.answers import ObjectsLost, ReplicaLost
from actors.messages import (
    FinishReason,
    GroupRecord,
    GroupSampling,
    Prompt,
    Scores,
    VersionSpan,
)
from actors.scoring.criteria import RewardFailed, RewardFailure
from actors.supervise import ReplicaSet, RoleExhausted
from aligntune.errors import RunFailed
from aligntune.online import rolling
from aligntune.online.attempts import GroupFailed, again
from aligntune.online.ledger import audit
from tests.actors.stand_in_actors import Actor
from tests.aligntune.online.hands import Company
from tests.aligntune.online.world import STEPS, World, ahead

ATTEMPTS = 3
SCORES = Scores(0, (), (), 0.0)


class Engine:
    """Makes groups all at once; one of them kills the process it is made in."""

    def __init__(self, poison: frozenset[int]) -> None:
        self.poison = poison
        self.death: Callable[[], None] = lambda: None

    async def start(self) -> None: ...

    async def generate(self, group: int) -> int:
        await asyncio.sleep(0)
        if group in self.poison:
            self.death()
        for _ in range(20):
            await asyncio.sleep(0)
        return group


async def make_all(
    groups: int, poison: frozenset[int], deaths: int = 0, replicas: int = 1, slots: int = 32
) -> tuple[list[Any], int]:
    """What becomes of each group, and how many replicas were lost; `deaths` are by chance."""
    lost: list[str] = []
    engines: list[Actor] = []

    def make(index: int, name: str) -> Any:
        engine = Engine(poison)
        engines.append(Actor(engine))
        engine.death = engines[-1].kill
        return engines[-1]

    async def start(handle: Any, name: str) -> None: ...

    def event(kind: str, **_: Any) -> None:
        if kind == "replica_lost":
            lost.append(kind)

    role = ReplicaSet(
        "rollout",
        replicas,
        make,
        start,
        slots=slots,
        max_restarts=10,
        event=event,
        kill=lambda handle: handle.kill(),
        drop=lambda ref: ref.drop(),
    )
    await role.start()

    async def one(group: int) -> Any:
        async def call(company: int | None) -> Any:
            options = {"deadline_s": 30, "queue_s": 60, "company": company}
            return (await role.call("generate", group, **options))[0]

        try:
            return await again(call, ATTEMPTS, lambda reason: None)
        except (GroupFailed, RoleExhausted) as failed:
            return failed

    tasks = [asyncio.create_task(one(group)) for group in range(groups)]
    for _ in range(deaths):
        for _ in range(8):
            await asyncio.sleep(0)
        engines[-1].kill()
    made = await asyncio.gather(*tasks)
    await role.close()
    return made, len(lost)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    poison=st.integers(0, 39), replicas=st.integers(1, 3), slots=st.sampled_from([1, 2, 7, 16, 32])
)
def test_a_prompt_that_kills_its_replica_is_found_and_no_other_is_blamed(
    poison: int, replicas: int, slots: int
) -> None:
    run = make_all(40, frozenset({poison}), replicas=replicas, slots=slots)
    made, lost = asyncio.run(asyncio.wait_for(run, 60))
    assert isinstance(made[poison], GroupFailed), made[poison]
    assert made[poison].lost
    del made[poison]
    assert made == [group for group in range(40) if group != poison]
    assert lost <= 8, "within the restarts that a role has"


def test_replicas_that_die_by_chance_cost_no_group() -> None:
    made, lost = asyncio.run(make_all(32, frozenset(), deaths=6))
    assert made == list(range(32))
    assert lost == 6


@pytest.mark.slow
def test_arrays_that_are_lost_say_nothing_of_their_group() -> None:
    losses = iter(range(6))

    async def make(company: int | None) -> str:
        if next(losses, None) is not None:
            raise ObjectsLost("with its node")
        return "made"

    heard: list[str] = []
    assert asyncio.run(again(make, 1, heard.append)) == "made"
    assert len(heard) == 6


class Replicas:
    """Rolls out at once; scores once nothing more of `failures` is left."""

    def __init__(self, *failures: RewardFailure) -> None:
        self.failures = list(failures)

    async def call(self, method: str, *_: Any, **options: Any) -> tuple[Any, ...]:
        if method == "score" and self.failures:
            raise RewardFailed("judge", self.failures.pop(0), "why")
        return (SCORES, "texts") if method == "score" else ("record", "tensors")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []

    async def sleep(seconds: float) -> None:
        taken.append(seconds)

    monkeypatch.setattr(rolling.asyncio, "sleep", sleep)
    return taken


def rolled(world: World, attempts: int, *failures: RewardFailure) -> tuple[Any, list[str]]:
    world.configure(reward={"max_attempts": attempts})
    both: Any = Replicas(*failures)
    heard: list[str] = []
    asked: Any = "prompt"
    made = rolling.Rolling(world.config, both, both).roll_and_score(
        asked, asked, None, heard.append
    )
    return asyncio.run(made).scores, heard


def test_a_service_that_is_away_is_waited_for_and_costs_no_attempt(
    world: World, pauses: list[float]
) -> None:
    scores, heard = rolled(world, 1, *[RewardFailure.UNREACHED] * 7)
    assert scores is SCORES
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert len(heard) == 7
    assert "unreached" in heard[0]


@pytest.mark.parametrize("away", [0, 1, 3])
def test_what_a_service_says_once_it_is_there_again_counts(
    world: World, pauses: list[float], away: int
) -> None:
    unreached = [RewardFailure.UNREACHED] * away
    bad = [*unreached, RewardFailure.RAISED, *unreached, RewardFailure.RAISED]
    assert rolled(world, 3, *bad)[0] is SCORES
    with pytest.raises(GroupFailed, match="raised"):
        rolled(world, 2, *bad)


def test_a_service_that_stays_away_fails_its_group_in_the_end(
    world: World, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling, "UNREACHED_SECONDS", 0.0)
    with pytest.raises(GroupFailed, match="unreached"):
        rolled(world, 3, RewardFailure.UNREACHED)


def test_groups_that_are_lost_never_end_a_run_as_bad_prompts_do(world: World) -> None:
    """Every other group kills its replica, each alone on it."""
    world.configure(train={**ahead(0), "max_quarantined_fraction": 0.0})

    def die(prompt: Any, sampling: Any) -> None:
        if sampling.group_id % 2:
            raise ReplicaLost("rollout-0", "died", company=1)

    world.during["generate"] = die
    world.run(evaluated=False)
    books = audit(world.folder / "ledger.jsonl")
    assert (books.trained, books.balanced) == (2 * STEPS, True)
    assert books.quarantined >= 2 * STEPS - 1
    assert world.controller is not None
    assert world.controller._recorder.books is not None
    assert world.controller._recorder.books() == books
    assert {e["lost"] for e in world.events("group_quarantined")} == {True}


def test_groups_that_fail_beside_lost_ones_are_counted_alone(world: World, tmp_path: Path) -> None:
    """Two are lost, then one cannot be scored: of 10 it is a tenth, and the run goes on; the next
    is too many."""
    world.configure(train=ahead(0), reward={"max_attempts": 1})

    def die(prompt: Any, sampling: Any) -> None:
        if sampling.group_id in (1, 2):
            raise ReplicaLost("rollout-0", "died", company=1)

    bad = {4}

    def fail(prompt: Any, group: int) -> None:
        if group in bad:
            raise RewardFailed("length", RewardFailure.RAISED, "no")

    world.during = {"generate": die, "score": fail}
    world.run(evaluated=False)

    again = World(tmp_path / "more")
    again.folder.mkdir()
    again.configure(train=ahead(0), reward={"max_attempts": 1})
    bad.add(5)
    again.during = {"generate": die, "score": fail}
    with pytest.raises(RunFailed, match=r"2 of \d+ groups were quarantined"):
        again.run(evaluated=False)


class Mute:
    """An actor of any role that never answers one thing that it is asked for."""

    def __init__(self, name: str, never: str) -> None:
        self.name = name
        self.never = never

    async def _answers(self, method: str) -> None:
        if method == self.never:
            await asyncio.Event().wait()

    async def start(self) -> dict[str, Any]:
        return {}

    async def generate(self, prompt: Prompt, sampling: GroupSampling) -> tuple[GroupRecord, int]:
        await self._answers("generate")
        group, stop = sampling.group_id, (FinishReason.STOP,) * 2
        spans = ((VersionSpan(0, 1),),) * 2
        return GroupRecord(group, 1, (1, 1), stop, spans, 0.1, self.name), group

    async def score(self, prompt: Prompt, group: int) -> tuple[Scores, tuple[str, ...]]:
        await self._answers("score")
        return Scores(group, ("length",), ((1.0,), (0.0,)), 0.1), ("a", "b")

    async def logprobs(self, group: int, temperature: float) -> tuple[int, None]:
        await self._answers("logprobs")
        return 2, None

    async def load_weights(self, weights: str) -> float:
        await self._answers("load_weights")
        return 0.1


@pytest.mark.parametrize(
    ("role", "method", "limit"),
    [
        ("rollout", "generate", "rollout.generation_timeout_s"),
        ("rollout", "load_weights", "rollout.weight_timeout_s"),
        ("reference", "logprobs", "reference.timeout_s"),
        ("reward", "score", "rewards.0.timeout_s"),
    ],
)
def test_a_run_that_ends_by_a_deadline_names_its_setting(
    world: World, monkeypatch: pytest.MonkeyPatch, role: str, method: str, limit: str
) -> None:
    monkeypatch.setattr(rolling, "IMPORT_SECONDS", 0.0)
    section, _, key = limit.rpartition(".")
    limits: dict[str, Any] = {
        name: {"max_restarts": 0, **({key: 0.05} if name == section else {})}
        for name in ("rollout", "reference", "reward")
    }
    timeout = {key: 0.01} if role == "reward" else {}
    rewards = [{"function": "length", **timeout}]
    world.configure(algorithm={"name": "grpo", "beta": 0.1}, rewards=rewards, **limits)
    actors = ("rollout", "reference", "reward")
    world.roles = Company({name: lambda made: Mute(made, method) for name in actors})
    world.replica_set = functools.partial(
        ReplicaSet, kill=lambda hand: hand.kill(), drop=lambda ref: ref.drop()
    )
    with pytest.raises(RoleExhausted) as ended:
        world.run(evaluated=False)
    said = str(ended.value)
    assert said.startswith(f"no {role} replica is left ({method} had no answer within ")
    assert said.endswith(f" ({limit})); raise {limit} or mend the cause")
