"""States of a disk: runs that are written down, and what a crash, a bad disk or time makes of
them."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligntune.errors import Interrupted
from aligntune.online.learner import PolicyLost
from tests.aligntune.online.world import World
from tests.torn.disk import Disk, Tree
from tests.torn.run import RUN, STORAGE, Whole, make_world, process, what_it_came_to
from tests.torn.tape import Fault, Op, Tape, recording


def _nothing(world: World) -> None: ...


def _stopped(world: World) -> None:
    """SIGTERM amid the second step, and the same command again."""

    def update(step: int) -> None:
        if step == 2:
            world.stop()

    world.during = {"update": update}
    with suppress(Interrupted):
        process(world)
    world.during = {}


def _lost(world: World) -> None:
    """The policy is lost in the third step, and the run goes back a step that has figures."""
    left = [1]

    def load_weights(*_: Any) -> None:
        assert world.controller is not None
        if world.controller.state.version == 3 and left.pop():
            left.append(0)
            raise PolicyLost("policy-0: died")

    world.during = {"load_weights": load_weights}


@dataclass(frozen=True)
class Story:
    """A run that is written down."""

    name: str
    happens: Callable[[World], None] = _nothing
    storage: bool = False
    every_steps: int = 1


STORIES = (
    Story("plain"),
    Story("stopped", _stopped),
    Story("policy lost", _lost, every_steps=2),
    Story("storage", storage=True),
    Story("storage, stopped", _stopped, storage=True, every_steps=2),
)


@dataclass(frozen=True)
class Told:
    """A run as it was written down, and what it came to."""

    story: Story
    ops: list[Op]
    whole: Whole


def tell(story: Story, base: Path, fault: Fault = lambda number, op: None) -> Told:
    """Make a run and write down what it does to its files."""
    base.mkdir(parents=True)
    with recording(Tape(base, fault)) as tape:
        for name in (RUN, STORAGE):
            (base / name).mkdir()
        world = make_world(base, story.storage, story.every_steps)
        story.happens(world)
        process(world)
    return Told(story, tape.ops, what_it_came_to(world))


@dataclass(frozen=True)
class Case:
    """One state, and how it came about."""

    told: str
    tree: Tree
    file: str | None = None  # of which a bit is another


def crashes(run: Told, dice: random.Random, many: int) -> Iterator[Case]:
    """After each operation: the process killed, and up to `many` states of a machine that died.

    No state comes twice. The storage is another machine's: it keeps what it was given.
    """
    seen: set[bytes] = set()
    disk = Disk()
    for number, op in enumerate(run.ops):
        if number > 1 and op.kind == "write":
            yield from _new(seen, f"killed amid {number} {op.kind} {op.path}", _amid(disk, op))
        disk.do(op)
        if number < 2:  # the two folders themselves
            continue
        where = f"{number} {op.kind} {op.path}"
        now = disk.after_a_kill()
        yield from _new(seen, f"killed after {where}", now)
        kept = _below(now, STORAGE)
        for tree in disk.after_a_crash(dice, many):
            state = {RUN: None, **_below(tree, RUN), **kept}
            yield from _new(seen, f"crashed after {where}", state)
        if run.story.storage:
            yield from _new(seen, f"node lost after {where}", {RUN: None, **kept})


def _amid(disk: Disk, op: Op) -> Tree:
    """As a kill amid a write leaves it: half of it."""
    tree = disk.after_a_kill()
    content = tree.get(op.path) or b""
    half = op.data[: len(op.data) // 2]
    return {**tree, op.path: content[: op.at] + half + content[op.at + len(half) :]}


def _below(tree: Tree, folder: str) -> Tree:
    return {path: content for path, content in tree.items() if path.split("/")[0] == folder}


def _new(seen: set[bytes], told: str, tree: Tree) -> Iterator[Case]:
    found = hashlib.sha256()
    for path, content in sorted(tree.items()):
        size = None if content is None else len(content)
        found.update(f"{path!r} {size} ".encode())
        found.update(content or b"")
    if (mark := found.digest()) not in seen:
        seen.add(mark)
        yield Case(told, tree)


def flips(tree: Tree, dice: random.Random, each: int) -> Iterator[Case]:
    """A tree with one bit of one file flipped: up to `each` of every file."""
    for path, content in tree.items():
        if not content:
            continue
        for place in dice.sample(range(len(content)), min(each, len(content))):
            bit = dice.randrange(8)
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            told = f"bit {bit} of byte {place} of {path} flipped"
            yield Case(told, {**tree, path: bytes(changed)}, path)


class BadDisk:
    """Fails at operation `at` of those that change something, and at `times` of them in all."""

    def __init__(self, at: int, code: int, times: int) -> None:
        self.at, self.code, self.times = at, code, times

    def __call__(self, number: int, op: Op) -> int | None:
        if number < self.at or self.times <= 0 or op.path.startswith(STORAGE):
            return None
        frees = op.kind in ("unlink", "rmdir", "truncate", "fsync", "rename")
        if self.code == errno.ENOSPC and frees:
            return None
        self.times -= 1
        if op.kind == "write" and len(op.data) > 1 and self.times % 2:
            return len(op.data) // 2
        raise OSError(self.code, os.strerror(self.code))
