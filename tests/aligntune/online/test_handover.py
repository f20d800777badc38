"""New weights beside the next update: in order, and nothing is lost with what breaks them off."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.answers import ObjectsLost
from actors.transfer.base import Offer
from aligntune.errors import Interrupted
from aligntune.online.learner import PolicyLost
from aligntune.online.ledger import audit
from tests.aligntune.online.world import EVALUATED, STEPS, World, ahead, settle

NO_EVALUATION = {"at_start": False, "at_end": False}


def every_group_is_trained_once(world: World) -> bool:
    books = audit(world.folder / "ledger.jsonl")
    trained = sorted(group for step in world.trained() for group in step)
    return books.balanced and trained == list(range(2 * STEPS))


def test_the_policy_trains_on_while_an_evaluation_holds_its_weights_back(world: World) -> None:
    world.configure(train=ahead(1), eval={"at_start": True, "at_end": False})
    order: list[str] = []
    updating = asyncio.Event()

    async def evaluate(version: int) -> None:
        await updating.wait()
        await settle()
        order.append(f"evaluated {version}")

    def update(step: int) -> None:
        order.append(f"update {step}")
        if step == 2:
            updating.set()

    world.during = {"evaluate": evaluate, "update": update, "load_weights": order.append}
    world.run()
    assert order[:4] == ["update 1", "update 2", "evaluated 0", "weights 1"]
    assert world.evaluated() == [(0, 0, 0.5)]
    assert every_group_is_trained_once(world)


def test_without_staleness_the_policy_waits_for_the_load(world: World) -> None:
    world.configure(eval=NO_EVALUATION)
    order: list[str] = []

    async def load(weights: str) -> None:
        await settle()
        order.append(weights)

    world.during = {"load_weights": load, "update": lambda step: order.append(f"update {step}")}
    world.run()
    assert order == [f"{what} {n}" for n in (1, 2, 3) for what in ("update", "weights")]


def test_the_policy_trains_on_once_a_broadcast_of_its_weights_has_ended(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would change what it sends."""
    world.configure(train=ahead(1), eval=NO_EVALUATION)
    order: list[str] = []

    class Meets:
        rereadable = False
        sent_fraction = None

        async def publish(self, version: int, receive: Callable[[Offer], Awaitable[None]]) -> Offer:
            offer = Offer(version, f"weights {version}")
            order.append(f"sends {version}")
            await asyncio.gather(settle(), receive(offer))
            order.append(f"sent {version}")
            return offer

    monkeypatch.setattr("aligntune.online.assemble.transport", lambda *_: Meets())
    world.during["update"] = lambda step: order.append(f"update {step}")
    world.run()
    assert order == [f"{what} {n}" for n in (1, 2, 3) for what in ("update", "sends", "sent")]
    assert every_group_is_trained_once(world)


def test_weights_lost_beside_an_update_rebuild_the_policy(world: World) -> None:
    world.configure(train=ahead(1), eval=NO_EVALUATION)
    losses = [ObjectsLost("an argument of load_weights is lost")]

    async def load(weights: str) -> None:
        await settle()
        if weights == "weights 1" and losses:
            raise losses.pop()

    world.during = {"load_weights": load, "update": lambda step: settle()}
    world.run()
    (rebuilt,) = world.events("policy_rebuilt")
    assert "the weights of version 1" in rebuilt["reason"]
    assert every_group_is_trained_once(world)


def test_a_rank_lost_beside_a_load_brings_no_older_weights_after_newer(world: World) -> None:
    world.configure(train=ahead(1), eval=NO_EVALUATION)
    order: list[str] = []
    losses = [PolicyLost("policy-0: died")]
    lost = asyncio.Event()

    async def load(weights: str) -> None:
        order.append(f"{weights} begins")
        if len(order) == 1:
            await lost.wait()
        await settle()
        order.append(f"{weights} ends")

    async def update(step: int) -> None:
        await settle()
        if step == 2 and losses:
            lost.set()
            raise losses.pop()

    world.during = {"load_weights": load, "update": update}
    world.run()
    assert [what.split()[2] for what in order] == ["begins", "ends"] * (len(order) // 2)
    assert order[-1] == f"weights {STEPS} ends"
    assert every_group_is_trained_once(world)


def test_a_stop_beside_a_load_ends_in_a_checkpoint_and_the_run_goes_on(world: World) -> None:
    world.configure(train=ahead(1), eval=NO_EVALUATION, checkpoint={"every_steps": 1000})
    loads: list[str] = []

    async def load(weights: str) -> None:
        world.stop()
        await settle()
        loads.append(weights)

    world.during["load_weights"] = load
    with pytest.raises(Interrupted):
        world.run()
    assert loads == ["weights 1"], "a load that has begun comes to its end"
    kept = [event["step"] for event in world.events("checkpoint_saved")]
    assert len(kept) == 1
    world.during = {}
    world.run()
    assert every_group_is_trained_once(world)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_whatever_breaks_off_beside_an_update_every_group_and_evaluation_is_there_once(
    world: World, seed: int
) -> None:
    """Ranks and weights are lost and the run is stopped, at random, at any staleness."""
    draw = random.Random(seed)
    world.configure(
        train=ahead(seed % 3),
        eval={"every_steps": 1 + seed % 2},
        checkpoint={"every_steps": draw.choice([1, 2, 1000])},
        policy={"max_restarts": 50},
    )
    left = [4]

    def hook(what: str) -> Callable[..., Awaitable[None]]:
        async def happens(*_: Any) -> None:
            for _ in range(draw.choice([0, 0, 1, 3, 20, 80])):
                await asyncio.sleep(0)
            if left[0] and draw.random() < 0.15:
                left[0] -= 1
                if what == "load_weights" and draw.random() < 0.5:
                    raise ObjectsLost("an argument of load_weights is lost")
                if what in ("update", "export") and draw.random() < 0.6:
                    raise PolicyLost("policy-0: died")
                world.stop()

        return happens

    world.during = {
        what: hook(what) for what in ("update", "export", "load_weights", "generate", "evaluate")
    }
    for _ in range(6):
        try:
            world.run()
        except Interrupted:
            continue
        break
    assert every_group_is_trained_once(world)
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))
    due = [step for step in range(STEPS + 1) if step % (1 + seed % 2) == 0 or step == STEPS]
    assert world.evaluated() == [EVALUATED[step] for step in due]
