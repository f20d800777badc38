"""The loop itself, over roles that answer at once: what it does at stops, losses and restarts."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from actors.answers import ObjectsLost
from actors.fetching import ArraysLost
from actors.messages import Prompt, UpdateResult
from actors.restarts import Restarts
from actors.timeline import spanned
from aligntune.algorithms.dapo import DAPO
from aligntune.errors import Interrupted, RunFailed
from aligntune.online import rank_starts
from aligntune.online.controller import Controller
from aligntune.online.learner import PolicyLost
from aligntune.online.ledger import audit
from aligntune.runs.jsonl import read_lines
from tests.aligntune.online.world import (
    EVALUATED,
    STEPS,
    FakeLearner,
    FakeReplicas,
    Reference,
    World,
    ahead,
    settle,
)


class Stricter(DAPO):
    """Keeps what scores above a bar that it raises with every step."""

    bar: float = 0.0

    def keep(self, scores: dict[str, list[float]]) -> bool:
        return max(scores["length"]) > self.bar

    def after_step(self, metrics: dict[str, float], completions: int) -> Stricter:
        return self.model_copy(update={"bar": self.bar + 1})

    def carried_on(self, saved: Mapping[str, Any]) -> Stricter:
        return self.model_copy(update={"bar": saved["bar"]})


def test_figures_that_overflow_are_told_and_end_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights have changed: a figure is no reason to lose the step."""
    figures = {"loss/policy": 0.5, "kl/update": float("inf"), "policy/entropy": float("nan")}

    async def update(*_: Any) -> UpdateResult:
        return UpdateResult(metrics=figures, seconds=0.1)

    monkeypatch.setattr(FakeLearner, "update", update)
    world.configure()
    world.run()
    assert [row["kl/update"] for row in world.rows()] == [sys.float_info.max] * STEPS
    assert all("policy/entropy" not in row for row in world.rows())
    told = world.events("figures_overflowed")
    assert [(e["step"], e["figures"]) for e in told] == [
        (step, "kl/update, policy/entropy") for step in range(1, STEPS + 1)
    ]


@pytest.mark.slow
def test_groups_are_filtered_by_the_algorithm_as_it_has_adapted(
    world: World, tmp_path: Path
) -> None:
    """Group i scores i and 0: above the bars 0, 1 and 2 of the steps are 1 and 2, 3 and 4, ..."""
    world.configure(algorithm=Stricter(overlong_shaping=False))
    world.scores = lambda group: (float(group % 5), 0.0)
    world.run()
    expected = world.trained()
    assert expected == [[1, 2], [3, 4], [8, 9]]

    world.folder = tmp_path / "killed"
    world.folder.mkdir()
    world.configure(algorithm=Stricter(overlong_shaping=False))

    def die(step: int) -> None:
        if step == 3:
            raise MemoryError("killed")

    world.during["update"] = die
    with pytest.raises(MemoryError):
        world.run()
    world.during = {}
    world.run()
    assert world.trained() == expected


def test_what_was_lost_without_a_restart_is_asked_for_while_a_step_waits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Group 1 has one replica too few until another group has ended."""
    ended: list[int] = []
    refilled = asyncio.Event()

    async def generate(prompt: Prompt, sampling: Any) -> None:
        if sampling.group_id == 1:
            await asyncio.wait_for(refilled.wait(), 30)

    monkeypatch.setattr(FakeReplicas, "refill", lambda _: refilled.set() if ended else None)
    world.configure()
    world.during = {"generate": generate, "score": lambda prompt, group: ended.append(group)}
    world.run(evaluated=False)
    assert world.trained()[0] == [0, 1]


def test_a_finished_run_that_is_called_again_gives_its_last_figures(world: World) -> None:
    first = world.run()
    assert world.run() == first
    assert len(world.updates) == STEPS


def test_options_changed_on_resume_are_those_that_train(world: World) -> None:
    world.during["evaluate"] = lambda version: world.stop() if version == 1 else None
    with pytest.raises(Interrupted):
        world.run()
    del world.during["evaluate"]
    world.configure(algorithm={"name": "grpo", "beta": 0.0, "clip_high": 0.5})
    world.run()
    assert [(step, algorithm.clip_high) for step, algorithm in world.updates] == [
        (1, 0.2),
        (2, 0.5),
        (3, 0.5),
    ]


SAMPLES_AGAIN = {"name": "dapo", "overlong_shaping": False}


def test_a_group_filtered_while_a_checkpoint_is_written_counts_in_the_resumed_run_too(
    world: World, tmp_path: Path
) -> None:
    """Group 4 comes to its end between the figures of step 2 and the checkpoint of step 2."""

    def configure() -> None:
        world.configure(algorithm=SAMPLES_AGAIN, train=ahead(1))
        world.scores = lambda group: (1.0, 1.0) if group == 4 else (1.0, 0.0)
        saving = asyncio.Event()

        async def score(prompt: Prompt, group: int) -> None:
            if group == 4:
                await saving.wait()

        async def save() -> None:
            assert world.controller is not None
            if world.controller.state.version == 2:
                saving.set()
                await settle()

        world.during = {"score": score, "save": save}

    configure()
    world.run()
    expected = [row["groups/filtered"] for row in world.rows()]
    assert expected == [0, 0, 1]

    world.folder = tmp_path / "killed"
    world.folder.mkdir()
    configure()

    def die(step: int) -> None:
        if step == 3:
            raise MemoryError("killed")

    world.during["update"] = die
    with pytest.raises(MemoryError):
        world.run()
    del world.during["update"]
    world.run()
    assert [row["groups/filtered"] for row in world.rows()] == expected


def test_a_group_filtered_during_an_update_is_replaced_during_it(world: World) -> None:
    world.configure(algorithm=SAMPLES_AGAIN, train=ahead(1))
    world.scores = lambda group: (1.0, 1.0) if group in (2, 3) else (1.0, 0.0)
    rolled: list[int] = []
    updating = asyncio.Event()

    async def score(prompt: Prompt, group: int) -> None:
        rolled.append(group)
        if group in (2, 3):
            await updating.wait()

    async def update(step: int) -> None:
        if step == 1:
            assert rolled == [0, 1, 2, 3]
            updating.set()
            await settle()
            assert rolled == [0, 1, 2, 3, 4, 5]

    world.during = {"score": score, "update": update}
    world.run()
    assert len(world.updates) == STEPS


def test_a_full_step_is_trained_on_however_much_was_filtered(world: World) -> None:
    world.configure(algorithm={**SAMPLES_AGAIN, "max_sampling_rounds": 1}, train=ahead(3))
    world.scores = lambda group: (1.0, 1.0) if group < 2 else (1.0, 0.0)
    world.run()
    assert [step for step, _ in world.updates] == [1, 2, 3]


def test_a_step_that_waits_for_an_older_group_is_not_short_of_groups(world: World) -> None:
    """Group 2 must be trained now and is late. 4 and 6 are filtered, 3, 5 and 7 are kept."""
    world.configure(algorithm={**SAMPLES_AGAIN, "max_sampling_rounds": 1}, train=ahead(1))
    world.scores = lambda group: (1.0, 1.0) if group in (4, 6) else (1.0, 0.0)
    late = asyncio.Event()
    releasing: list[asyncio.Task[None]] = []

    async def release() -> None:
        await settle()
        late.set()

    async def score(prompt: Prompt, group: int) -> None:
        if group == 2:
            await late.wait()
        if group == 7:
            releasing.append(asyncio.create_task(release()))

    world.during["score"] = score
    world.run(evaluated=False)
    assert world.trained()[1] == [2, 3]
    assert [row["groups/filtered"] for row in world.rows()] == [0, 2, 0]


def test_a_step_that_never_fills_ends_with_the_metric_that_was_looked_at(world: World) -> None:
    world.configure(algorithm={**SAMPLES_AGAIN, "metric": "length"}, train=ahead(0))
    world.scores = lambda group: (0.25, 0.25)
    with pytest.raises(RunFailed, match=r"length of those filtered: 0\.25 x \d+"):
        world.run()


def test_a_text_that_is_lost_with_its_node_costs_its_sample_and_nothing_else(world: World) -> None:
    lost = ObjectLostError("0" * 56, None, "")
    world.texts = lambda group: lost if group == 1 else (f"{group}a", f"{group}b")
    world.run()
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))
    samples = read_lines(world.folder / "samples.jsonl")
    texts = [[told["text"] for told in sample["completions"]] for sample in samples]
    assert texts[:3] == [["0a", "0b"], [None, None], ["2a", "2b"]]


@pytest.mark.parametrize("turns", range(6))
def test_a_loop_that_is_cancelled_as_a_group_ends_is_cancelled(
    world: World, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    async def run(controller: Controller, _: object) -> dict[str, float]:
        waiting = asyncio.create_task(controller._next_batch())
        await settle()
        controller._changed.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await settle()
        assert waiting.cancelled()
        return {}

    monkeypatch.setattr(Controller, "run", run)
    world.run()


def test_a_group_that_ends_though_it_is_cancelled_starts_no_other(world: World) -> None:
    """Its successor would go on beside the rebuilt policy, under a number that is given anew."""
    world.configure(algorithm=SAMPLES_AGAIN, train=ahead(1))
    world.scores = lambda group: (1.0, 1.0) if group == 4 else (1.0, 0.0)
    lost = False
    begun: list[int] = []  # while the policy is rebuilt
    stubborn: list[int] = []

    async def score(prompt: Prompt, group: int) -> None:
        if group == 4 and not stubborn:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                stubborn.append(group)

    def generate(prompt: Prompt, sampling: Any) -> None:
        if lost:
            begun.append(sampling.group_id)

    async def update(step: int) -> None:
        nonlocal lost
        if step == 2 and not stubborn:
            await settle()
            lost = True
            raise PolicyLost("policy-0: died")

    def load() -> None:
        nonlocal lost
        lost = False

    world.during = {"score": score, "generate": generate, "update": update, "load": load}
    world.run()
    assert stubborn == [4]
    assert begun == []
    assert audit(world.folder / "ledger.jsonl").balanced


def test_weights_lost_with_their_node_rebuild_the_policy(world: World) -> None:
    lost = iter([False, True])

    def load(bundle: Any) -> None:
        if next(lost, False):
            raise ObjectsLost("an argument of load_weights is lost")

    world.during["load_weights"] = load
    world.run()
    (rebuilt,) = world.events("policy_rebuilt")
    assert (rebuilt["from_version"], rebuilt["to_version"]) == (2, 1)
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))
    assert len(world.events("role_started")) == 2, "the new ranks say who they are too"


class Starting:
    """A rollout actor that starts; the first weights that it takes are gone."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        said = Reference({"max_concurrent_groups": 7})
        self.start = SimpleNamespace(remote=lambda: said)
        self.load_weights = SimpleNamespace(remote=self.load)

    def load(self, bundle: str) -> Any:
        self.loaded.append(bundle)
        gone = ObjectLostError("0" * 56, None, "")
        return Reference(gone if len(self.loaded) == 1 else 0.1)


def test_a_replica_that_starts_with_lost_weights_has_the_policy_rebuilt(world: World) -> None:
    """Its own restarts are not spent on weights that no longer exist."""
    slots: list[asyncio.Task[int]] = []
    starting = Starting()

    async def join(bundle: str) -> None:
        if bundle == "weights 2" and not slots:
            assert world.prepare is not None
            slots.append(asyncio.create_task(world.prepare(starting, "rollout-1")))
            await settle()

    world.during["load_weights"] = join
    world.run()
    assert slots[0].result() == 7
    (rebuilt,) = world.events("policy_rebuilt")
    assert "load_weights" in rebuilt["reason"]
    assert len(starting.loaded) >= 2


@pytest.mark.parametrize("version", [1, STEPS])
def test_weights_that_no_replica_has_any_more_end_the_wait_for_their_evaluation(
    world: World, version: int
) -> None:
    """Of version 1 the weights of the next step wait for it, of the last one the end of the run."""
    slots: list[asyncio.Task[int]] = []
    training = asyncio.Event()  # the last batch is there before the weights are gone

    async def evaluate(now: int) -> None:
        if now == version and not slots:
            await training.wait()
            assert world.prepare is not None
            slots.append(asyncio.create_task(world.prepare(Starting(), "rollout-1")))
            await asyncio.wait_for(asyncio.Event().wait(), 5)  # for a replica that serves

    async def update(step: int) -> None:
        if step == min(version + 1, STEPS):
            training.set()
            await settle()

    world.during = {"evaluate": evaluate, "update": update}
    world.run()
    assert slots[0].result() == 7
    (rebuilt,) = world.events("policy_rebuilt")
    assert rebuilt["reason"].startswith(f"the weights of version {version}: ")
    assert world.evaluated() == EVALUATED
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))


def test_an_evaluation_goes_on_where_a_replica_still_has_the_weights_that_are_gone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeReplicas, "serving", 1)
    slots: list[asyncio.Task[int]] = []
    exported = asyncio.Event()  # nothing is left but to wait for the evaluation

    async def save_model(_: FakeLearner, folder: Path) -> None:
        os.makedirs(folder, exist_ok=True)
        exported.set()

    monkeypatch.setattr(FakeLearner, "save_model", save_model)

    async def evaluate(now: int) -> None:
        if now == STEPS:
            await exported.wait()
            await settle()
            assert world.prepare is not None
            slots.append(asyncio.create_task(world.prepare(Starting(), "rollout-1")))
            await settle()

    world.during["evaluate"] = evaluate
    world.run()
    assert len(slots) == 1
    assert world.events("policy_rebuilt") == []
    assert world.evaluated() == EVALUATED


@pytest.mark.slow
def test_a_policy_that_keeps_being_lost_ends_the_run(world: World) -> None:
    world.configure(policy={"max_restarts": 2})

    def die(step: int) -> None:
        raise PolicyLost("policy-0: died during update")

    world.during["update"] = die
    with pytest.raises(RunFailed, match="the policy was lost 3 times"):
        world.run()
    assert audit(world.folder / "ledger.jsonl").balanced


@pytest.mark.parametrize(("every_steps", "dies_at"), [(1, 2), (9, 3)])
def test_a_policy_that_gets_no_further_ends_the_run_however_long_each_try_takes(
    world: World, monkeypatch: pytest.MonkeyPatch, every_steps: int, dies_at: int
) -> None:
    """Every restart has come back before the next loss, and steps before are trained again."""
    hours = itertools.count(0.0, 3600.0)
    slow = functools.partial(Restarts, now=lambda: next(hours))
    monkeypatch.setattr(rank_starts, "Restarts", slow)
    monkeypatch.setattr(rank_starts, "pause", lambda failures: 0.0)
    late = "policy-0: update had no answer within 3600 s (policy.update_timeout_s)"

    def die(step: int) -> None:
        assert len(world.updates) < 20, "it goes on and on"
        if step == dies_at:
            raise PolicyLost(late)

    world.configure(policy={"max_restarts": 2}, checkpoint={"every_steps": every_steps})
    world.during["update"] = die
    with pytest.raises(RunFailed) as failed:
        world.run()
    assert str(failed.value) == (
        f"the policy was lost 3 times and the run got no further than step {dies_at - 1}: "
        f"policy.max_restarts=2 allows no more; the last: {late}"
    )
    del world.during["update"]
    world.run()
    assert world.trained() == [[0, 1], [2, 3], [4, 5]], "the same command goes on"


def test_a_policy_that_is_lost_at_every_step_gets_further_and_finishes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = itertools.count(0.0, 3600.0)
    slow = functools.partial(Restarts, now=lambda: next(hours))
    monkeypatch.setattr(rank_starts, "Restarts", slow)
    lost: list[int] = []

    def die(step: int) -> None:
        if step not in lost:
            lost.append(step)
            raise PolicyLost("policy-0: died")

    world.configure(policy={"max_restarts": 1})
    world.during["update"] = die
    world.run()
    assert lost == [1, 2, 3]
    assert len(world.trained()) == STEPS


@pytest.mark.parametrize("place", ["start", "load", "load_weights"])
def test_a_rank_that_is_lost_as_a_run_resumes_costs_a_restart_and_no_more(
    world: World, place: str
) -> None:
    def die(step: int) -> None:
        if step == 3:
            raise MemoryError("killed")

    world.during["update"] = die
    with pytest.raises(MemoryError):
        world.run()
    losses = [PolicyLost("policy-0: died")]

    def lose(*_: Any) -> None:
        if losses:
            raise losses.pop()

    world.during = {place: lose}
    world.run()
    assert [event["reason"] for event in world.events("policy_lost")] == ["policy-0: died"]
    assert [event["step"] for event in world.events("resumed")] == [2]
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))
    assert world.evaluated() == EVALUATED


@pytest.mark.parametrize("place", ["update", "save", "load_weights"])
def test_a_run_that_is_stopped_ends_so_though_a_rank_is_lost_then(world: World, place: str) -> None:
    """The last checkpoint is of a whole step, whatever the ranks had done since."""
    killed: list[str] = []

    def lose(*_: Any) -> None:
        assert world.controller is not None
        if world.controller.state.version == 2 or place == "load_weights":
            world.stop()
            killed.append(place)
            raise PolicyLost("policy-0: died")

    world.during[place] = lose
    world.configure(checkpoint={"every_steps": 2 if place == "save" else 1})
    with pytest.raises(Interrupted):
        world.run()
    assert killed == [place] * len(killed)
    kept = [event["step"] for event in world.events("checkpoint_saved")]
    assert kept == {"update": [1, 2], "save": [], "load_weights": []}[place]
    world.during = {}
    world.run()
    assert world.trained() == [[0, 1], [2, 3], [4, 5]]
    assert world.evaluated() == EVALUATED


def test_a_stop_amid_a_rebuild_saves_nothing_of_ranks_that_have_loaded_nothing(
    world: World,
) -> None:
    saved: list[int] = []
    lost: list[int] = []

    async def start() -> None:
        if lost:
            world.stop()
            await settle()

    def save() -> None:
        assert world.controller is not None
        saved.append(world.controller.state.version)

    def die(step: int) -> None:
        if step == 3:
            lost.append(step)
            raise PolicyLost("policy-0: died")

    world.configure(checkpoint={"every_steps": 5})
    world.during = {"start": start, "update": die, "save": save}
    with pytest.raises(Interrupted):
        world.run()
    assert saved == []
    world.during = {}
    world.run()
    assert world.trained() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("staleness", [0, 2])
def test_groups_whose_arrays_are_lost_are_made_again_and_the_policy_stays(
    world: World, staleness: int
) -> None:
    world.configure(train=ahead(staleness))
    made: list[int] = []

    def make(prompt: Prompt, sampling: Any) -> None:
        made.append(sampling.group_id)

    def lose(step: int) -> None:
        if step == 2 and len(world.updates) == 2:
            raise ArraysLost((3,))

    world.during = {"generate": make, "update": lose}
    world.run()
    assert made.count(3) == 2
    assert len(made) == 2 * STEPS + 1, "no other group is made again"
    assert world.events("policy_lost") == []
    assert [event["group"] for event in world.events("group_retried")] == [3]
    assert [step for step, _ in world.updates] == [1, 2, 2, 3]
    assert sorted(i for step in world.trained() for i in step) == list(range(2 * STEPS))
    assert audit(world.folder / "ledger.jsonl").balanced


@pytest.mark.parametrize("place", ["save", "update"])
def test_the_times_of_a_step_are_of_no_moment_before_it(world: World, place: str) -> None:
    """Replicas roll out beside a checkpoint's copy, and beside an update that is then lost."""
    world.configure(train=ahead(1))

    def roll(*_: Any) -> None:
        if len(world.updates) == 1:
            with spanned("rollout-0", "generate"):
                end = time.monotonic() + 0.1
                while time.monotonic() < end:
                    pass
            if place == "update":
                raise ArraysLost((0,))

    world.during[place] = roll
    world.run()
    rows = read_lines(world.folder / "metrics.jsonl")
    assert len(rows) == STEPS
    assert all(row["time/rollout"] <= row["time/step"] for row in rows)


def test_a_run_goes_on_with_less_staleness_than_it_had_groups_for(world: World) -> None:
    """More groups are open than one step may take: the others wait for theirs."""
    world.configure(train={**ahead(4), "steps": 2 * STEPS})

    def stop(step: int) -> None:
        if step == 1:
            world.stop()

    world.during["update"] = stop
    with pytest.raises(Interrupted):
        world.run()
    world.during = {}
    world.configure(train={**ahead(0), "steps": STEPS})
    world.run()
    assert world.trained() == [[0, 1], [2, 3], [4, 5]]
    assert [row["staleness/max"] for row in world.rows()] == [0.0] * STEPS


def test_a_stop_with_a_lost_rank_finishes_the_evaluation_that_nobody_could_make_again(
    world: World,
) -> None:
    world.configure(train=ahead(3), eval={"every_steps": None})
    saved = world.folder / "checkpoints" / "step-000001"

    async def evaluate(version: int) -> None:
        while version == 0 and not saved.exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.01)

    def lose(step: int) -> None:
        if step == 2:
            world.stop()
            raise PolicyLost("policy-0: died")

    world.during = {"evaluate": evaluate, "update": lose}
    with pytest.raises(Interrupted):
        world.run()
    world.during = {}
    world.run()
    assert world.evaluated() == [EVALUATED[0], EVALUATED[-1]]


def test_a_rank_lost_after_a_stop_leaves_the_evaluation_before_it_its_end(world: World) -> None:
    """The checkpoint of step 1 is complete once the run is to stop, so nobody could make the
    evaluation of the start again; a rank is lost as it exports the weights of step 1."""
    world.configure(train=ahead(3), eval={"every_steps": None})
    saved = world.folder / "checkpoints" / "step-000001"

    async def evaluate(version: int) -> None:
        while version == 0 and not saved.exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.01)
        await settle()

    def lose(version: int) -> None:
        world.stop()
        raise PolicyLost("policy-0: died")

    world.during = {"evaluate": evaluate, "export": lose}
    with pytest.raises(Interrupted):
        world.run()
    assert world.evaluated() == EVALUATED[:1]
    assert [event["reason"] for event in world.events("policy_lost")] == ["policy-0: died"]
    world.during = {}
    world.run()
    assert world.evaluated() == [EVALUATED[0], EVALUATED[-1]]
