"""Evaluations beside training: of one version, written once, and lost by no stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from actors.supervise import RoleExhausted
from aligntune.errors import Interrupted
from aligntune.online.evaluation import evaluation_id
from aligntune.online.learner import PolicyLost
from aligntune.online.ledger import audit
from tests.aligntune.online.world import EVALUATED, STEPS, World, ahead, settle


@pytest.mark.parametrize("stopped_at", range(STEPS + 1))
def test_a_stop_amid_an_evaluation_loses_no_figure(
    world: World, tmp_path: Path, stopped_at: int
) -> None:
    whole = world.run()
    expected = world.rows()
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    assert world.evaluated() == EVALUATED
    assert whole["eval/reward/mean"] == 0.5 + STEPS / 10

    world.folder = tmp_path / "stopped"
    world.folder.mkdir()
    world.configure()

    async def stop(version: int) -> None:
        if version == stopped_at:
            world.stop()
            await asyncio.Event().wait()

    world.during["evaluate"] = stop
    with pytest.raises(Interrupted):
        world.run()
    assert len(world.rows()) == len(world.evaluated()) == stopped_at
    del world.during["evaluate"]
    last = world.run()
    assert world.rows() == expected
    assert world.evaluated() == EVALUATED
    assert last.keys() == whole.keys()
    assert audit(world.folder / "ledger.jsonl").balanced


@pytest.mark.parametrize("stopped_at", [0, 2])
def test_figures_are_written_once_however_often_a_checkpoint_is_gone_back_to(
    world: World, stopped_at: int
) -> None:
    async def stop(version: int) -> None:
        if version == stopped_at:
            world.stop()
            await asyncio.Event().wait()

    def die(step: int) -> None:
        raise MemoryError("killed")

    world.during["evaluate"] = stop
    with pytest.raises(Interrupted):
        world.run()
    world.during = {"update": die}
    with pytest.raises(MemoryError):
        world.run()
    world.during = {}
    world.run()
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))
    assert world.evaluated() == EVALUATED


def test_a_stop_while_an_update_runs_keeps_it_and_then_finishes_the_evaluation_before_it(
    world: World,
) -> None:
    """The policy has gone on, so version 1 could never be evaluated again."""
    world.configure(checkpoint={"every_steps": 1000})
    saved = asyncio.Event()
    order: list[str] = []

    async def evaluate(version: int) -> None:
        if version == 1:
            await saved.wait()
            await settle()
            order.append("evaluated")

    def update(step: int) -> None:
        if step == 2:
            world.stop()

    def save() -> None:
        if world.controller and world.controller.state.version == 2:
            order.append("saved")
            saved.set()

    world.during = {"evaluate": evaluate, "update": update, "save": save}
    with pytest.raises(Interrupted):
        world.run()
    assert order == ["saved", "evaluated"]
    assert [row["step"] for row in world.rows()] == [1, 2]
    assert world.evaluated() == EVALUATED[:2]
    world.during = {}
    world.run()
    assert world.evaluated() == EVALUATED
    assert [step for step, _ in world.updates] == [1, 2, 3]


def test_an_evaluation_that_fails_under_a_stop_is_told_and_the_run_has_stopped(
    world: World,
) -> None:
    world.configure(checkpoint={"every_steps": 1000})
    saved = asyncio.Event()

    async def evaluate(version: int) -> None:
        if version == 1:
            await saved.wait()
            raise RoleExhausted("no rollout replica is left")

    def update(step: int) -> None:
        if step == 2:
            world.stop()

    def save() -> None:
        if world.controller and world.controller.state.version == 2:
            saved.set()

    world.during = {"evaluate": evaluate, "update": update, "save": save}
    with pytest.raises(Interrupted):
        world.run()
    (told,) = world.events("not_evaluated")
    assert (told["step"], told["reason"]) == (1, "no rollout replica is left")
    assert [e["step"] for e in world.events("checkpoint_saved")] == [2]


def test_an_evaluation_that_weights_on_their_way_wait_for_may_fail_under_a_stop(
    world: World,
) -> None:
    """It fails before the stop is heard, and after the loop has looked for failures."""
    world.configure(train=ahead(3), eval={"every_steps": None})
    saving = asyncio.Event()

    async def evaluate(version: int) -> None:
        await saving.wait()
        raise RoleExhausted("no rollout replica is left")

    async def save() -> None:
        if not saving.is_set():
            saving.set()
            await settle()
            world.stop()

    world.during = {"evaluate": evaluate, "save": save}
    with pytest.raises(Interrupted):
        world.run()
    (told,) = world.events("not_evaluated")
    assert (told["step"], told["reason"]) == (0, "no rollout replica is left")
    assert [e["step"] for e in world.events("checkpoint_saved")] == [1]


def test_the_next_update_runs_beside_an_evaluation_and_its_weights_wait_for_its_end(
    world: World,
) -> None:
    order: list[str] = []
    updated = asyncio.Event()

    async def evaluate(version: int) -> None:
        order.append(f"evaluates {version}")
        if version == 1:
            await updated.wait()
            await settle()
        order.append(f"evaluated {version}")

    def update(step: int) -> None:
        order.append(f"update {step}")
        if step == 2:
            updated.set()

    def load(bundle: str) -> None:
        order.append(bundle)

    world.during = {"evaluate": evaluate, "update": update, "load_weights": load}
    world.run()
    about = ["evaluates 1", "update 2", "evaluated 1", "weights 2"]
    assert [what for what in order if what in about] == about
    assert world.evaluated() == EVALUATED


def test_an_evaluation_that_is_gone_back_behind_is_made_again_and_written_once(
    world: World,
) -> None:
    """The checkpoint is of step 2; the evaluation of step 3 is never made before the ranks die."""
    world.configure(checkpoint={"every_steps": 2}, eval={"every_steps": 1, "at_start": False})
    dead: list[int] = []

    def update(step: int) -> None:
        if step == 3 and not dead:
            dead.append(step)
            raise PolicyLost("policy-0: died during update")

    world.during = {"update": update}
    world.run()
    assert world.evaluated() == EVALUATED[1:]
    assert [row["step"] for row in world.rows()] == [1, 2, 3]


def test_held_out_prompts_draw_from_no_training_group(world: World) -> None:
    seen: list[int] = []
    world.during["generate"] = lambda prompt, sampling: seen.append(sampling.group_id)
    world.run()
    evaluated = [evaluation_id(index) for index in range(1000)]
    assert not {*seen} & {*evaluated}
    assert len({*evaluated}) == 1000


def test_a_stop_in_the_last_update_of_a_run_that_evaluates_nothing_more_ends_it_well(
    world: World,
) -> None:
    """There is nothing to wait for, so nothing is broken off."""

    def update(step: int) -> None:
        if step == STEPS:
            world.stop()

    world.during = {"update": update}
    world.run(evaluated=False)
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))


def test_a_stop_in_the_last_update_leaves_its_evaluation_to_the_process_that_goes_on(
    world: World,
) -> None:
    """The run is not done without it, though nothing else is left to do."""
    saving = asyncio.Event()

    async def evaluate(version: int) -> None:
        if version == STEPS - 1:
            await saving.wait()

    def update(step: int) -> None:
        if step == STEPS:
            world.stop()

    async def save() -> None:
        if world.controller and world.controller.state.version == STEPS:
            saving.set()
            await settle()

    world.during = {"evaluate": evaluate, "update": update, "save": save}
    with pytest.raises(Interrupted):
        world.run()
    assert world.evaluated() == EVALUATED[:-1]
    world.during = {}
    world.run()
    assert world.evaluated() == EVALUATED
    assert len(world.updates) == STEPS


def test_no_checkpoint_is_complete_before_the_evaluation_of_an_earlier_version_is_written(
    world: World,
) -> None:
    """Rollouts run ahead, so the evaluation of the start goes on beside the first steps; whoever
    went on from a checkpoint of them could never make it again."""
    world.configure(train=ahead(3), eval={"every_steps": None})
    checkpoints = world.folder / "checkpoints"
    found: list[list[str]] = []
    updated = asyncio.Event()

    async def evaluate(version: int) -> None:
        if version == 0:
            await updated.wait()
            found.append([path.name for path in checkpoints.glob("step-??????")])

    async def update(step: int) -> None:
        if step == 2:  # the loop goes on meanwhile
            await asyncio.sleep(0.1)
            updated.set()

    world.during = {"evaluate": evaluate, "update": update}
    world.run()
    assert found == [[]]
    assert world.evaluated() == [EVALUATED[0], EVALUATED[-1]]
    kept = [event["step"] for event in world.events("checkpoint_saved")]
    assert kept == list(range(1, STEPS + 1))
