"""A run keeps its best checkpoint beside the newest ones, whatever stops it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from aligntune.errors import Interrupted, UserError
from aligntune.online.figures import check_best
from aligntune.runs.best import best_checkpoint, best_of
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.rundir import RunDir
from tests.aligntune.online.world import STEPS, World

REWARD = "eval/reward/mean"  # it rises with the step


@pytest.fixture
def keeping(world: World) -> World:
    """A run that keeps its newest checkpoint and the one with the lowest reward: the first."""
    world.checkpoints = lambda folder, _: Checkpoints(folder, 1)
    world.configure(checkpoint=best("min"))
    return world


def best(mode: str, **more: Any) -> dict[str, Any]:
    return {"every_steps": 1, "best": {"metric": REWARD, "mode": mode}, **more}


def kept(world: World) -> list[int]:
    return Checkpoints(world.folder / "checkpoints", 1, to_read=True).steps()


def best_step(world: World) -> int:
    return best_checkpoint(RunDir(world.folder), best_of(world.config.checkpoint))[0].step


def test_the_best_one_stays_while_newer_ones_come_and_go(keeping: World) -> None:
    keeping.run()
    assert kept(keeping) == [1, STEPS]
    assert best_step(keeping) == 1


def test_one_that_is_better_takes_its_place_at_the_end_too(keeping: World) -> None:
    keeping.configure(checkpoint=best("max"))
    keeping.run()
    assert kept(keeping) == [STEPS]
    assert best_step(keeping) == STEPS


def test_every_step_that_is_evaluated_makes_a_checkpoint(keeping: World) -> None:
    keeping.configure(checkpoint=best("min", every_steps=1000, at_end=False))
    keeping.run()
    assert [event["step"] for event in keeping.events("checkpoint_saved")] == [1, 2, STEPS]
    assert kept(keeping) == [1, STEPS]


@pytest.mark.parametrize("stopped_at", range(1, STEPS + 1))
def test_a_stop_amid_an_evaluation_loses_no_best_one(keeping: World, stopped_at: int) -> None:
    async def stop(version: int) -> None:
        if version == stopped_at:
            keeping.stop()
            await asyncio.Event().wait()

    keeping.during["evaluate"] = stop
    with pytest.raises(Interrupted):
        keeping.run()
    assert min(kept(keeping)) == 1
    del keeping.during["evaluate"]
    keeping.run()
    assert kept(keeping) == [1, STEPS]


def test_a_checkpoint_waits_for_its_evaluation_before_a_newer_one_takes_its_place(
    keeping: World,
) -> None:
    """A stop beside update 2 saves step 2 while version 1 is being evaluated."""
    saved = asyncio.Event()
    seen: list[list[int]] = []

    async def evaluate(version: int) -> None:
        if version == 1:
            await saved.wait()
            while 2 not in kept(keeping):  # noqa: ASYNC110 - what comes true sets no event
                await asyncio.sleep(0.01)
            seen.append(kept(keeping))

    def update(step: int) -> None:
        if step == 2:
            keeping.stop()
            saved.set()

    keeping.during = {"evaluate": evaluate, "update": update}
    with pytest.raises(Interrupted):
        keeping.run()
    assert seen == [[1, 2]]
    assert best_step(keeping) == 1


def test_a_damaged_best_one_is_not_what_a_good_one_goes_for(keeping: World) -> None:
    def damage(step: int) -> None:
        path = Path(keeping.folder / "checkpoints" / "step-000001" / "policy" / "weights")
        if step == STEPS and path.exists():
            path.write_text("y")

    keeping.during["update"] = damage
    keeping.run()
    assert kept(keeping) == [2, STEPS]
    assert best_step(keeping) == 2


def test_a_figure_that_no_evaluation_has_is_refused_with_what_was_meant(world: World) -> None:
    world.configure(checkpoint={"best": {"metric": "eval/reward/lenght/mean"}})
    with pytest.raises(UserError, match="did you mean 'eval/reward/length/mean'"):
        check_best(world.config, ["length"])
    world.configure(checkpoint={"best": {"metric": "eval/reward/length/mean"}})
    check_best(world.config, ["length"])


def test_a_best_one_without_evaluations_between_the_ends_is_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"set eval\.every_steps, or remove it"):
        world.configure(checkpoint=best("max"), eval={"at_start": False})
