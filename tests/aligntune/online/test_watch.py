"""What looks after a run from beside it: stalls, a dead Ray, a time limit, nodes that go."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from aligntune.errors import Interrupted, RunFailed
from aligntune.online import assemble, watch
from tests.aligntune.online.world import STEPS, World, ahead


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that the run takes for a raylet."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    needed = {"raylet": psutil.Process(sleeper.pid)}
    monkeypatch.setattr(assemble, "ray_processes", lambda: needed)
    yield sleeper
    sleeper.kill()
    sleeper.wait(30)


def test_a_run_in_which_nothing_moves_ends_and_says_what_everybody_was_at(world: World) -> None:
    world.configure(train={**ahead(0), "stall_timeout_s": 0.4})

    async def generate(*_: Any) -> None:
        await asyncio.Event().wait()

    world.during["generate"] = generate
    with pytest.raises(RunFailed, match=r"nothing has moved for train\.stall_timeout_s=0\.4 s"):
        world.run(evaluated=False)
    (event,) = world.events("stalled")
    told = Path(event["path"]).read_text()
    assert Path(event["path"]).parent == world.folder / "logs"
    assert "task group-0" in told, "the driver's tasks"
    assert "in generate" in told, "and where they are"
    assert "thread MainThread" in told
    world.during = {}
    world.run(evaluated=False)
    assert world.trained() == [[0, 1], [2, 3], [4, 5]], "the same command goes on"


def test_a_stalled_run_says_so_where_nothing_can_be_written(world: World) -> None:
    world.configure(train={**ahead(0), "stall_timeout_s": 0.4})

    async def generate(*_: Any) -> None:
        await asyncio.Event().wait()

    world.during["generate"] = generate
    (world.folder / "logs").write_text("no folder")
    with pytest.raises(RunFailed, match=r"nothing has moved .* could not be written"):
        world.run(evaluated=False)
    assert world.events("stalled")[0]["path"] is None


def test_a_run_whose_ray_dies_ends_with_the_reason(
    world: World, process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def update(step: int) -> None:
        if step == 2:
            process.kill()
            await asyncio.Event().wait()

    world.during["update"] = update
    began = time.monotonic()
    with pytest.raises(RunFailed, match="Ray's raylet on this machine has died"):
        world.run(evaluated=False)
    assert time.monotonic() - began < 20
    monkeypatch.setattr(assemble, "ray_processes", dict)
    world.during = {}
    world.run(evaluated=False)
    assert [row["step"] for row in world.rows()] == list(range(1, STEPS + 1))


def test_a_time_limit_stops_a_run_as_a_signal_does(world: World) -> None:
    world.configure(train={**ahead(0), "time_limit_s": 0.2}, checkpoint={"every_steps": 9})

    async def update(step: int) -> None:
        if step == 2:
            await asyncio.sleep(0.5)

    world.during["update"] = update
    with pytest.raises(Interrupted, match=r"train\.time_limit_s=0\.2 is over") as stopped:
        world.run(evaluated=False)
    assert stopped.value.signal == 15
    assert [event["step"] for event in world.events("checkpoint_saved")] == [2]


def test_a_node_that_is_drained_stops_the_run_that_has_ranks_on_it(
    world: World, process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drained: set[str] = set()
    in_vain = threading.Event()

    def draining(nodes: set[str]) -> str | None:
        if not in_vain.is_set():
            in_vain.set()
            raise RuntimeError("the head does not answer for a while")
        return min(drained & nodes, default=None)

    async def update(step: int) -> None:
        assert await asyncio.to_thread(in_vain.wait, 30)
        drained.add("of another run" if step == 1 else "the rank's")
        await asyncio.sleep(0.2)

    monkeypatch.setattr(watch, "DRAIN_SECONDS", 0.02)
    monkeypatch.setattr(watch, "draining", draining)
    monkeypatch.setattr("tests.aligntune.online.world.FakeLearner.nodes", {"the rank's"})
    world.during["update"] = update
    with pytest.raises(Interrupted, match="node the rank is being drained"):
        world.run(evaluated=False)
    assert world.events("checkpoint_saved")[-1]["step"] == 2
