"""What a run keeps beside the loop: checkpoints, copies and views, and what their failures cost."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.disk import Sums
from aligntune.errors import Interrupted, RunFailed
from aligntune.online import keeper
from aligntune.online.learner import PolicyLost
from aligntune.online.ledger import audit
from aligntune.runs import checkpoint as checkpoint_module
from aligntune.runs import writer
from aligntune.runs.checkpoint import STATE, Checkpoint, Checkpoints
from aligntune.runs.copies import Copies
from aligntune.runs.jsonl import read_lines
from aligntune.runs.rundir import RunDir
from aligntune.tracking.trackers import SERVICES
from tests.aligntune.online.world import EVALUATED, FakeLearner, World


def test_a_checkpoint_comes_to_disk_beside_the_next_step_and_before_the_one_after(
    world: World,
) -> None:
    """The loop goes on while the files of step 1 are forced to disk."""
    order: list[str] = []
    updated = threading.Event()

    class Slow(Checkpoints):
        def commit(self, step: int, *rest: Any) -> Checkpoint:
            if step == 1:
                assert updated.wait(30), "the loop stood while a checkpoint was written"
            order.append(f"committed {step}")
            return super().commit(step, *rest)

    def update(step: int) -> None:
        order.append(f"update {step}")
        if step == 2:
            updated.set()

    world.checkpoints = Slow
    world.during["update"] = update
    world.run()
    assert order.index("update 2") < order.index("committed 1") < order.index("committed 2")
    kept = {path.name for path in (world.folder / "checkpoints").iterdir()}
    assert kept == {"latest", "step-000002", "step-000003"}


def test_what_ranks_have_written_is_not_read_to_make_a_checkpoint_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large one would be read over the network by the driver alone."""

    def checksum(path: Path, *heard: Any) -> int:
        read.add(path.name)
        return real(path, *heard)

    real = checkpoint_module.checksum
    read: set[str] = set()
    monkeypatch.setattr(checkpoint_module, "checksum", checksum)
    world.run()
    assert read == {STATE}
    read.clear()
    newest = Checkpoints(world.folder / "checkpoints", 2).latest()
    assert newest is not None
    assert (newest.step, read) == (3, {STATE, "weights"})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what comes true sets no event
            await asyncio.sleep(0.01)


def test_ranks_write_beside_the_next_update_and_nothing_counts_before_all_is_written(
    world: World,
) -> None:
    updated = asyncio.Event()
    seen: list[str] = []

    async def write(folder: Path) -> None:
        if folder.name == "step-000001.partial":
            await asyncio.wait_for(updated.wait(), 30)
            seen.extend(path.name for path in (world.folder / "checkpoints").iterdir())

    def update(step: int) -> None:
        if step == 2:
            updated.set()

    world.during = {"write": write, "update": update}
    world.run()
    assert seen == ["step-000001.partial"]
    assert [e["step"] for e in world.events("checkpoint_saved")] == [1, 2, 3]


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(world: World) -> None:
    stopped = asyncio.Event()

    async def write(folder: Path) -> None:
        await asyncio.wait_for(stopped.wait(), 30)

    def update(step: int) -> None:
        if step == 2:
            world.stop()
            asyncio.get_running_loop().call_later(0.05, stopped.set)

    world.during = {"write": write, "update": update}
    with pytest.raises(Interrupted):
        world.run()
    assert [e["step"] for e in world.events("checkpoint_saved")] == [1, 2]


class Written(FakeLearner):
    """Ranks that write for as long as they live, or until `free`."""

    free = asyncio.Event()
    dead = asyncio.Event()

    async def write(self, folder: Path) -> Sums:
        waits = [asyncio.create_task(event.wait()) for event in (self.free, self.dead)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.dead.is_set():
            raise PolicyLost("policy-0: died during write")
        return await super().write(folder)

    def kill(self) -> None:
        super().kill()
        self.dead.set()


@pytest.fixture
def writing(world: World, monkeypatch: pytest.MonkeyPatch) -> type[Written]:
    for name in ("free", "dead"):
        monkeypatch.setattr(Written, name, asyncio.Event())
    world.learner = Written
    return Written


def test_a_run_that_fails_lets_the_checkpoint_that_is_being_written_come_to_disk(
    world: World, writing: type[Written]
) -> None:
    def update(step: int) -> None:
        if step == 2:
            asyncio.get_running_loop().call_later(0.05, writing.free.set)
            raise ArithmeticError("the user's own")

    world.during["update"] = update
    with pytest.raises(ArithmeticError):
        world.run()
    assert [e["step"] for e in world.events("checkpoint_saved")] == [1]
    assert world.events("checkpoint_failed") == []
    assert writing.dead.is_set(), "the ranks are stopped then"


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_is_cancelled_waits_for_no_write(
    world: World, writing: type[Written], fails: bool
) -> None:
    """At once, or amid the wait of a run that has failed."""

    async def update(step: int) -> None:
        if step == 2:
            run = asyncio.current_task()
            assert run is not None
            asyncio.get_running_loop().call_later(0.05, run.cancel)
            if fails:
                raise ArithmeticError("the user's own")
            await asyncio.Event().wait()

    world.during["update"] = update
    with pytest.raises(asyncio.CancelledError):
        world.run()
    assert writing.dead.is_set()
    assert world.events("checkpoint_saved") == []


def test_a_write_that_ends_after_its_deadline_makes_no_checkpoint(world: World) -> None:
    """The run may have gone back before its step meanwhile."""
    late = asyncio.Event()

    async def write(folder: Path) -> None:
        if folder.name == "step-000001.partial":
            await late.wait()

    async def update(step: int) -> None:
        if step == 2:
            assert world.controller is not None
            await until(lambda: bool(world.events("checkpoint_failed")))
            assert not world.controller._keeper.timed, "a disk that hangs is no movement for ever"
            late.set()

    world.configure(policy={"update_timeout_s": 0.2})
    world.during = {"write": write, "update": update}
    world.run()
    assert world.events("checkpoint_failed")[0]["step"] == 1
    assert 1 not in [e["step"] for e in world.events("checkpoint_saved")]
    kept = {path.name for path in (world.folder / "checkpoints").iterdir()}
    assert "step-000001" not in kept
    assert "step-000003" in kept
    assert not [name for name in kept if name.endswith(".partial")]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_a_checkpoint_whose_files_come_to_disk_after_its_deadline_is_none(
    world: World, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Also where the policy is lost meanwhile: the run goes back when it cannot come any more."""
    late = threading.Event()
    real = checkpoint_module.sync_below
    starts: list[bool] = []

    def sync_below(folder: Path) -> None:
        if folder.name == "step-000001.partial":
            assert late.wait(30)
        real(folder)

    def begun() -> bool:
        """Whether anything may still come of step 1."""
        assert world.controller is not None
        task = world.controller._keeper._writing
        return task is not None and not task.done()

    async def update(step: int) -> None:
        if step == 2 and not late.is_set():
            await until(lambda: bool(world.events("checkpoint_failed")))
            asyncio.get_running_loop().call_later(0.05, late.set)
            if lost:
                raise PolicyLost("policy-0: died")
            await until(lambda: not begun())
            assert not (world.folder / "checkpoints" / "step-000001").exists()

    monkeypatch.setattr(checkpoint_module, "sync_below", sync_below)
    world.configure(policy={"update_timeout_s": 0.2})
    world.during = {"update": update, "start": lambda: starts.append(begun())}
    world.run()
    assert starts == [False] * (1 + lost)
    assert world.events("checkpoint_failed")[0]["step"] == 1
    assert [e["to_version"] for e in world.events("policy_rebuilt")] == [0] * lost
    assert len(world.trained()) == 3


def test_checkpoints_are_made_by_time_where_they_are_not_by_steps(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def update(step: int) -> None:
        now[0] += 31.0

    world.configure(checkpoint={"every_steps": None, "every_minutes": 1.0, "at_end": False})
    world.during = {"update": update}
    world.run()
    assert [e["step"] for e in world.events("checkpoint_saved")] == [2]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root mounts a file system")
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    made = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(place: Path) -> None:
    """Take all the room that is left."""
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 1024)


@pytest.mark.parametrize("freed", [True, False])
def test_a_run_survives_a_disk_without_a_byte_of_room(
    world: World, full_disk: Path, no_pause: None, monkeypatch: pytest.MonkeyPatch, freed: bool
) -> None:
    """Full from the second step on. Room is made in the third, or after the process has ended."""
    world.run()
    expected = (world.rows(), world.trained(), world.evaluated())
    world.folder = full_disk / "run"
    world.folder.mkdir()
    world.configure()
    monkeypatch.setattr(writer, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(writer, "SECONDS", 30.0 if freed else 1.0)

    async def update(step: int) -> None:
        if step == 2:
            await until((world.folder / "checkpoints" / "step-000001").exists)
            fill(full_disk)
        if step == 3 and freed:
            controller = world.controller
            await until(lambda: controller is not None and controller._keeper.owes)
            (full_disk / "filler").unlink()

    world.during = {"update": update}
    if freed:
        world.run()
        (failed,) = world.events("checkpoint_failed")
        assert failed["step"] == 2
        assert "No space left" in failed["reason"]
        assert [e["step"] for e in world.events("checkpoint_saved")] == [1, 3]
    else:
        with pytest.raises((RunFailed, OSError), match="No space left") as error:
            world.run()
        assert "\n" not in str(error.value)
        (full_disk / "filler").unlink()
        world.during = {}
        world.run()
    assert (world.rows(), world.trained(), world.evaluated()) == expected
    assert audit(world.folder / "ledger.jsonl").balanced
    assert not list(world.folder.rglob("*.partial"))


@pytest.mark.parametrize(
    ("number", "seen", "ends"),
    [(errno.ENOSPC, True, False), (errno.ENOSPC, False, True), (errno.EACCES, True, True)],
)
def test_ranks_that_come_again_while_the_disk_has_no_room_go_on(
    world: World, number: int, seen: bool, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as they have seen the run directory; all else is one line."""
    asked: list[Path] = []

    async def blind(_: FakeLearner, folder: Path) -> list[str]:
        asked.append(folder)
        if len(asked) > seen:
            raise OSError(number, os.strerror(number))
        return []

    def update(step: int) -> None:
        if step == 2 and len(asked) == 1:
            raise PolicyLost("policy-0: died")

    monkeypatch.setattr(FakeLearner, "blind", blind)
    world.during = {"update": update}
    if ends:
        with pytest.raises(RunFailed, match="no file could be written to") as error:
            world.run()
        assert "\n" not in str(error.value)
    else:
        world.run()
        assert len(world.trained()) == 3
    assert len(asked) == 1 + seen


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "PAUSES", (0.0, 0.0, 0.0))


def test_a_checkpoint_that_does_not_come_to_disk_ends_the_run_with_the_reason(
    world: World, no_pause: None
) -> None:
    class Full(Checkpoints):
        def commit(self, *_: Any) -> Checkpoint:
            raise OSError("No space left on device")

    world.checkpoints = Full
    with pytest.raises(RunFailed, match="No space left") as error:
        world.run()
    assert "\n" not in str(error.value)
    assert [e["step"] for e in world.events("checkpoint_failed")] == [1, 2, 3, 3, 3, 3]
    assert list((world.folder / "checkpoints").iterdir()) == [], "the room was given back"


@pytest.mark.parametrize("where", ["begin", "save", "write", "commit", "the name of the newest"])
def test_a_disk_that_is_full_for_a_while_costs_a_try_and_the_last_good_one_stays(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of steps 1 and 3 are due; that of step 1 fails, so step 2 tries again."""
    world.configure(checkpoint={"every_steps": 2})
    broken = {2}

    class Full(Checkpoints):
        def begin(self, step: int) -> Path:
            if where == "begin" and step in broken:
                raise OSError(28, "No space left on device")
            return super().begin(step)

        def commit(self, step: int, *rest: Any) -> Checkpoint:
            if where == "commit" and step in broken:
                raise OSError(5, "Input/output error")
            return super().commit(step, *rest)

    def save() -> None:
        assert world.controller is not None
        if where == "save" and world.controller.state.version in broken:
            raise OSError(30, "Read-only file system")

    def write_of_ranks(folder: Path) -> None:
        if where == "write" and folder.name == "step-000002.partial":
            raise OSError(28, "No space left on device")

    def write(path: Path, text: str) -> None:
        if where == "the name of the newest" and text == "step-000002\n":
            raise OSError(28, "No space left on device")
        real(path, text)

    real = checkpoint_module.write_atomically
    monkeypatch.setattr(checkpoint_module, "write_atomically", write)
    world.during |= {"save": save, "write": write_of_ranks}
    world.checkpoints = Full
    world.run()
    (failed,) = world.events("checkpoint_failed")
    assert failed["step"] == 2
    assert failed["reason"]
    assert [e["step"] for e in world.events("checkpoint_saved")] == [3]
    assert Checkpoints(world.folder / "checkpoints", 2).latest() is not None
    assert not list((world.folder / "checkpoints").glob("*.partial"))


def test_a_disk_that_stays_full_ends_the_run_after_some_tries(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "MOST_TRIES", 2)

    def save() -> None:
        raise OSError(28, "No space left on device")

    world.during["save"] = save
    with pytest.raises(RunFailed, match=r"of step 2 could not be written .* in 2 tries"):
        world.run()


@pytest.mark.slow
def test_a_disk_that_is_slow_costs_tries_and_not_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 1 ends when the run is at its end; step 2 does not write beside it."""
    free = threading.Event()
    begun: list[int] = []

    class Slow(Checkpoints):
        def begin(self, step: int) -> Path:
            begun.append(step)
            return super().begin(step)

        def commit(self, step: int, *rest: Any) -> Checkpoint:
            if step == 1:
                assert free.wait(30)
            return super().commit(step, *rest)

    def update(step: int) -> None:
        if step == 3:
            free.set()

    world.configure(policy={"update_timeout_s": 1.0})
    world.checkpoints = Slow
    world.during["update"] = update
    world.run()
    assert world.events("checkpoint_failed")[0]["step"] == 1
    assert begun[0] == 1
    assert 2 not in begun
    assert Checkpoints(world.folder / "checkpoints", 2).latest().step == 3  # type: ignore[union-attr]


def test_figures_and_moves_of_a_step_are_on_disk_before_its_checkpoint_is(world: World) -> None:
    seen: list[tuple[int, list[int], list[int]]] = []

    class Looking(Checkpoints):
        def commit(self, step: int, *rest: Any) -> Checkpoint:
            metrics = [row["step"] for row in read_lines(world.folder / "metrics.jsonl")]
            ledger = read_lines(world.folder / "ledger.jsonl")
            marks = [record["step"] for record in ledger if record["event"] == "checkpoint"]
            seen.append((step, metrics, marks))
            return super().commit(step, *rest)

    world.checkpoints = Looking
    world.run()
    assert [step for step, _, _ in seen] == [1, 2, 3]
    for step, metrics, marks in seen:
        assert metrics[:step] == marks[:step] == list(range(1, step + 1))


def test_a_storage_that_hangs_and_a_tracker_that_dies_are_events_and_the_run_is_as_without_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run()
    expected = world.rows()

    hanging = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    monkeypatch.setitem(SERVICES, "wandb", lambda *_: DyingTracker())
    world.folder = tmp_path / "alone"
    world.folder.mkdir()
    world.mirror = SimpleNamespace(
        push=lambda _: hanging.wait(60), push_model=lambda _: None, uri="s3://bucket/run"
    )
    world.configure(
        checkpoint={"every_steps": 1, "copy_timeout_s": 0.05, "storage": "s3://bucket/run"},
        tracking={"trackers": ["wandb"]},
    )
    world.run()
    hanging.set()
    assert world.rows() == expected
    assert world.evaluated() == EVALUATED
    assert "no end within" in world.events("not_copied")[0]["reason"]
    assert {event["path"] for event in world.events("not_copied")} >= {"step-000001", "model"}
    failed, left = world.events("tracker_failed")
    assert (failed["tracker"], failed["reason"]) == ("wandb", "ConnectionError: gone")
    assert "never taken" in left["reason"]


def test_a_second_signal_amid_the_end_waits_for_no_copy(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook it cancels the run, which waits for the evaluation of a version before."""
    hanging, saved, waited = threading.Event(), asyncio.Event(), list[str]()

    async def settled(_: Copies) -> None:
        waited.append("copies")
        await asyncio.Event().wait()

    async def evaluate(version: int) -> None:
        if version == 1:
            await saved.wait()
            assert world.task is not None
            world.task.cancel()
            await asyncio.Event().wait()

    def update(step: int) -> None:
        if step == 2:
            world.stop()

    def save() -> None:
        if world.controller and world.controller.state.version == 2:
            saved.set()

    monkeypatch.setattr(Copies, "settled", settled)
    monkeypatch.setattr("aligntune.online.watch.CLOSE_SECONDS", 1.0)
    world.mirror = SimpleNamespace(push=lambda _: hanging.wait(60))
    world.configure(checkpoint={"every_steps": 1000})
    world.during = {"evaluate": evaluate, "update": update, "save": save}
    with pytest.raises(asyncio.CancelledError):
        world.run()
    hanging.set()
    assert waited == []


def test_a_start_that_fails_reports_what_earlier_ones_have_trained(world: World) -> None:
    def stop(step: int) -> None:
        if step == 2:
            world.stop()

    def fail() -> None:
        raise RunFailed("policy-0: no CUDA device")

    RunDir(world.folder).describe(world.config)
    world.during = {"update": stop}
    with pytest.raises(Interrupted):
        world.run()
    report = world.folder / "report.html"
    report.unlink()
    world.during = {"start": fail}
    with pytest.raises(RunFailed, match="no CUDA device"):
        world.run()
    trained = audit(world.folder / "ledger.jsonl").trained
    assert trained == 4
    assert f"Groups: {trained} trained on" in report.read_text(encoding="utf-8")


class DyingTracker:
    """A client whose service goes away after its first figures."""

    def __init__(self) -> None:
        self._taken = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._taken += 1
        if self._taken > 1:
            raise ConnectionError("gone")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def truncate_after(self, step: int) -> None: ...

    def close(self) -> None: ...
