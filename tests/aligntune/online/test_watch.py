"""What looks after a run from beside it: stalls, a dead Ray, a time limit, nodes that go."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from actors.timeline import Timeline, spanned
from aligntune.errors import Interrupted, RunFailed
from aligntune.online import assemble, watch
from aligntune.online.learner import PolicyLost
from aligntune.online.watch import LOOKS, Watch
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("what", ["load", "write"])
def test_what_has_a_deadline_of_its_own_is_no_stall(
    world: World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A policy is lost, and loading the checkpoint takes longer than nothing may move; a disk takes
    as long for a checkpoint that the next one waits for."""
    looks, looked, progress = [0], asyncio.Event(), Watch._progress

    def look(watch: Watch) -> object:
        looks[0] += 1
        if looks[0] > LOOKS + 2:
            looked.set()
        return progress(watch)

    async def slow(*_: Any) -> None:
        looks[0] = 0
        with spanned("policy-0", what):
            await asyncio.wait_for(looked.wait(), 30)

    def lose(step: int) -> None:
        if step == 2 and not world.events("policy_lost"):
            raise PolicyLost("policy-0: died")

    monkeypatch.setattr(Watch, "_progress", look)
    world.configure(train={**ahead(0), "stall_timeout_s": 2.0})
    world.during = {what: slow, "update": lose if what == "load" else lambda step: None}
    world.run(evaluated=False)
    assert looked.is_set()
    assert world.events("stalled") == []
    assert len(world.trained()) == STEPS


@pytest.mark.parametrize(
    ("method", "moves"),
    [
        *((m, True) for m in ("address", "start", "load", "snapshot", "save_model")),
        *((m, True) for m in ("export_weights", "load_weights")),
        *((m, False) for m in ("write", "generate", "score", "update")),
    ],
)
def test_calls_that_show_nothing_count_as_movement_while_they_last(
    world: World, method: str, moves: bool
) -> None:
    """But for a write, which goes on after its deadline: `Keeper.timed` ends with that."""
    timeline, still = Timeline(), SimpleNamespace(progress=0, timed=False)
    watched: Any = (SimpleNamespace(), timeline, still, still, still)
    world.configure()
    over = Watch(world.config, *watched, {})
    before = over._progress()
    assert over._progress() == before
    span = timeline.begin("policy-0", method, "")
    assert (over._progress() != over._progress()) is moves
    timeline.end(span)
    assert over._progress() == over._progress()


@pytest.mark.slow
def test_a_stalled_run_says_so_where_nothing_can_be_written(world: World) -> None:
    world.configure(train={**ahead(0), "stall_timeout_s": 0.4})

    async def generate(*_: Any) -> None:
        await asyncio.Event().wait()

    world.during["generate"] = generate
    (world.folder / "logs").write_text("no folder")
    with pytest.raises(RunFailed, match=r"nothing has moved .* could not be written"):
        world.run(evaluated=False)
    assert world.events("stalled")[0]["path"] is None


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_time_limit_counts_from_when_the_run_was_called(world: World) -> None:
    """Data are fetched and Ray is started before the loop runs."""
    world.configure(train={**ahead(0), "time_limit_s": 3600})
    with pytest.raises(Interrupted, match=r"train\.time_limit_s=3600 is over"):
        world.run(since=time.monotonic() - 3601)
    assert world.trained() == []
    world.run(since=time.monotonic())
    assert len(world.trained()) == STEPS, "the same command goes on"


@pytest.mark.slow
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
