"""A run of the real controller, keeper and recorder over roles without processes, on files whose
every operation is known; and what must hold of a run that goes on from what is on a disk.

The weights are a hash of the groups that they were trained on, step by step, and a figure of each
step is made of them: a run that goes on from a wrong state has other figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO
from unittest import mock

import numpy as np

from actors.disk import Sums
from actors.messages import GroupWork, Prompt, UpdateResult
from actors.storage import WRITING, Store
from aligntune.algorithms.base import Algorithm
from aligntune.errors import Interrupted, RunFailed, UserError
from aligntune.online import keeper
from aligntune.online.assemble import assemble
from aligntune.online.ledger import LedgerError, audit
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.starting import begin_from, starting_point
from aligntune.runs import mirror as mirrors
from aligntune.runs import rundir as rundirs
from aligntune.runs import writer
from aligntune.runs.checkpoint import Checkpoints
from aligntune.runs.jsonl import readable
from aligntune.runs.lifecycle import recorded
from aligntune.runs.mirror import Mirror
from aligntune.runs.rundir import RunDir
from tests.aligntune.online.world import STEPS, FakeLearner, World, ahead
from tests.torn.disk import Tree

RUN, STORAGE = "run", "storage"
ENDS = (Interrupted, RunFailed, UserError)
"""How a process of a run may end, in one line."""


class FolderStore(Store):
    """As `Store` on a folder, in Python, so that its operations are seen."""

    def _in(self, name: str) -> Path:
        return Path(self.uri) / name

    def read(self, name: str) -> bytes | None:
        return self._in(name).read_bytes() if self._in(name).is_file() else None

    def write(self, name: str, content: bytes) -> None:
        self._in(WRITING).write_bytes(content)
        os.replace(self._in(WRITING), self._in(name))

    def make_folder(self, name: str) -> None:
        self._in(name).mkdir(parents=True, exist_ok=True)

    def has_folder(self, name: str = "") -> bool:
        return self._in(name).is_dir()

    def names(self, name: str = "") -> list[str]:
        return sorted(path.name for path in self._in(name).iterdir())

    def put(self, folder: Path, name: str = "") -> None:
        target = self._in(name)
        if target.exists():
            shutil.rmtree(target)
        self.make_folder(name)
        shutil.copytree(folder, target, dirs_exist_ok=True)

    def get(self, name: str, target: Path) -> None:
        shutil.copytree(self._in(name), target)

    def remove_file(self, name: str) -> None:
        self._in(name).unlink()

    def remove(self, name: str) -> None:
        shutil.rmtree(self._in(name))


class Learner(FakeLearner):
    """Ranks whose weights say what they were trained on."""

    weights = "as they start"
    kept = ""

    async def start(self) -> list[tuple[str, dict[str, Any]]]:
        self.weights = Learner.weights
        return await super().start()

    async def update(
        self, step: int, algorithm: Algorithm, works: Sequence[GroupWork]
    ) -> UpdateResult:
        result = await super().update(step, algorithm, works)
        seen = f"{self.weights} {step} {[work.group_id for work in works]}"
        self.weights = hashlib.sha256(seen.encode()).hexdigest()
        return UpdateResult({"loss/policy": int(self.weights[:12], 16) / 2**48}, result.seconds)

    async def snapshot(self) -> None:
        await super().snapshot()
        self.kept = self.weights

    async def write(self, folder: Path) -> Sums:
        sums = await super().write(folder)
        (folder / "policy" / "rank-0.pt").write_text(self.kept)
        return sums

    async def load(self, folder: Path) -> None:
        await super().load(folder)
        self.weights = (folder / "policy" / "rank-0.pt").read_text()


def make_world(base: Path, storage: bool, every_steps: int = 1) -> World:
    """A run in `base`, every third of whose groups is filtered."""
    world = World(base / RUN)
    world.scores = lambda group: (1.0, 1.0) if group % 3 == 1 else (1.0, 0.0)
    checkpoint: dict[str, Any] = {"every_steps": every_steps, "keep_last": 2}
    if storage:
        checkpoint["storage"] = str(base / STORAGE)
        with mock.patch.object(mirrors, "Store", FolderStore):
            world.mirror = Mirror(str(base / STORAGE), world.folder, 2, 60.0)
    world.configure(
        algorithm={"name": "dapo", "overlong_shaping": False},
        train=ahead(0),
        checkpoint=checkpoint,
        policy={"max_restarts": 3},
    )
    return world


def process(world: World) -> int:
    """One process of the run, as the trainer's; the step it started from. Raises `ENDS`."""
    world.version = 0
    rundir, prompt = RunDir(world.folder), Prompt(0, "a", "a", np.array([1]))
    rundir.check(world.config, "auto")
    checkpoints = Checkpoints(world.folder / "checkpoints", 2)
    start = starting_point(
        world.config, rundir, checkpoints, world.mirror, "auto", STEPS, fingerprint="f"
    )
    rundir.describe(world.config)
    prompts: Any = SimpleNamespace(prompt_at=lambda position: prompt, fingerprint="f")
    after = start.checkpoint.step if start.checkpoint else 0
    records = OnlineRecorder(world.config, rundir, STEPS, after)
    with recorded(records, rundir, STEPS) as recorder:
        start = begin_from(start, rundir, checkpoints, world.mirror, "auto", recorder.stage)
        start.tell(recorder)
        learner: Any = Learner(world)
        world.controller = assemble(
            world.config,
            world.roles,
            STEPS,
            prompts,
            [prompt],
            rundir,
            checkpoints,
            recorder,
            world.mirror,
            learner=learner,
            replica_set=world.replica_set,
        )
        work = world.controller.run(start.checkpoint)
        asyncio.run(asyncio.wait_for(work, 60))
    return after


@contextmanager
def quick() -> Iterator[TextIO]:
    """Nothing waits for a disk, nothing is shown, and no package is asked for its version.

    Gives what is shown to.
    """
    shown = sys.stdout
    with ExitStack() as stack:
        for quiet in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(quiet(io.StringIO()))
        for module, name, value in (
            (rundirs, "installed_versions", dict),
            (keeper, "PAUSES", (0.0, 0.0, 0.0)),
            (writer, "PAUSE_SECONDS", 0.0),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield shown


@dataclass
class Whole:
    """What a run comes to that nothing happens to."""

    rows: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    trained: list[list[int]]
    samples: list[dict[str, Any]]
    eval_samples: list[dict[str, Any]]


def what_it_came_to(world: World) -> Whole:
    """What is in the run's folder."""
    names = ("evals", "samples", "eval_samples")
    evals, *files = [list(readable(world.folder / f"{name}.jsonl")) for name in names]
    return Whole(world.rows(), evals, world.trained(), *files)


def write(tree: Tree, base: Path) -> None:
    """Make a folder what a tree says."""
    for path, content in tree.items():
        if content is None:
            (base / path).mkdir(parents=True, exist_ok=True)
        else:
            (base / path).write_bytes(content)


def go_on(
    tree: Tree,
    base: Path,
    whole: Whole,
    storage: bool,
    every_steps: int = 1,
    flipped: str | None = None,
    may_be_lost: int = 1,
) -> list[str]:
    """What is wrong with a run that goes on from `tree`: it must end, as if nothing had been.

    Where a bit of the file `flipped` is another, that file may have lost `may_be_lost`
    records, with an event, or say something else; and a config, a name that cannot be
    read, or the only checkpoint that there is, may be refused in one line.
    """
    (base / RUN).mkdir(parents=True)
    write(tree, base)
    events = list(readable(base / RUN / "events.jsonl"))
    problems: list[str] = []
    world = make_world(base, storage, every_steps)
    try:
        started = process(world)
    except UserError as refused:
        mine = flipped is not None and (
            Path(flipped).name in ("config.yaml", "latest")
            or ("/checkpoints/" in flipped and len(_checkpoints(tree)) == 1)
        )
        return [] if mine and "\n" not in str(refused) else [f"refused: {refused}"]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
        return [f"{type(error).__name__}: {error}"]
    now = list(readable(base / RUN / "events.jsonl"))
    saved = [event["step"] for event in events if event.get("kind") == "checkpoint_saved"]
    told = {Path(e["path"]).name for e in now if e["kind"] == "checkpoint_damaged"}
    if flipped is None and started < max(saved, default=0):
        problems.append(f"started from step {started}, and {max(saved)} was said to be saved")
    if flipped is None and now[: len(events)] != events:
        problems.append("events that were there are gone or differ")
    problems += [f"nothing says that {n} was passed over" for n in _newer(tree, started) - told]
    problems += _records(world, whole, flipped, may_be_lost)
    if flipped is not None and "ledger" in flipped:
        problems = [each for each in problems if not each.startswith("trained")]
    problems += _books(world.folder)
    if left := [str(path) for path in base.rglob("*.partial")]:
        problems.append(f"left behind: {left}")
    return problems


def _records(world: World, whole: Whole, flipped: str | None, may_be_lost: int) -> list[str]:
    """How the run's records differ from those of the whole run."""
    problems = []
    found = what_it_came_to(world)
    events = list(readable(world.folder / "events.jsonl"))
    damaged = {event["file"] for event in events if event["kind"] == "lines_damaged"}
    for name in ("rows", "evaluated", "trained", "samples", "eval_samples"):
        has, due = getattr(found, name), getattr(whole, name)
        if has == due:
            continue
        file = {"rows": "metrics", "evaluated": "evals"}.get(name, name) + ".jsonl"
        if flipped is None or Path(flipped).name != file:
            steps = [[each.get("step") for each in of] for of in (has, due) if name != "trained"]
            problems.append(f"{name} differ: {steps}: {has} for {due}"[:400])
            continue
        same = sum(record in due for record in has)
        if same < len(due) - may_be_lost or len(has) > len(due):
            problems.append(f"{name} differ in more than {may_be_lost}: {has}"[:400])
        if len(has) < len(due) and file not in damaged:
            problems.append(f"a record of {name} is gone, and nothing says so")
    return problems


def _newer(tree: Tree, started: int) -> set[str]:
    """The checkpoints in a tree that are of later steps than that."""
    return {name for name in _checkpoints(tree) if int(name[5:]) > started}


def _checkpoints(tree: Tree) -> set[str]:
    """The names of the checkpoints in a tree."""
    parts = (path.split("/") for path in tree)
    names = {p[2] for p in parts if p[:2] == [RUN, "checkpoints"] and len(p) > 2}
    return {name for name in names if name.startswith("step-") and name[5:].isdigit()}


def _books(folder: Path) -> list[str]:
    try:
        books = audit(folder / "ledger.jsonl")
    except LedgerError as error:
        return [f"the books: {error}"]
    right = (books.trained, books.open, books.balanced) == (2 * STEPS, 0, True)
    return [] if right else [f"{books}"]


def as_it_is(folder: Path) -> Tree:
    """The tree of a real folder."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in found}


def dumped(tree: Tree, place: Path) -> Path:
    """A tree that something is wrong with, for people."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    write(tree, place)
    return place
