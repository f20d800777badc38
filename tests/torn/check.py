"""Looks at states of disks, one after the other: what was done, and what was wrong with it."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.torn.disk import Tree
from tests.torn.run import (
    ENDS,
    RUN,
    STORAGE,
    Whole,
    as_it_is,
    go_on,
    make_world,
    process,
)
from tests.torn.states import BadDisk, Story, crashes, flips, tell
from tests.torn.tape import Tape, recording

Seen = Iterator[tuple[str, list[str]]]


def whole(story: Story, base: Path) -> Whole:
    """What the run of a story comes to where nothing happens."""
    return tell(Story("whole", every_steps=story.every_steps), base / "whole").whole


def disks(story: Story, base: Path, seed: int, many: int, every: int) -> Seen:
    """After each operation of a run: the process killed, the machine crashed, the node lost."""
    due, told = whole(story, base), tell(story, base / "told")
    for number, case in enumerate(crashes(told, random.Random(seed), many)):
        if number % every:
            continue
        problems = go_on(case.tree, base / "state", due, story.storage, story.every_steps)
        shutil.rmtree(base / "state")
        yield case.told, problems


def bad_disks(story: Story, base: Path, every: int) -> Seen:
    """A disk that fails at each operation in turn, once, for a while or for good; then it is
    mended, and the same command is given again."""
    due, told = whole(story, base), tell(story, base / "told")
    ways = [(errno.ENOSPC, 1), (errno.ENOSPC, 6), (errno.EIO, 1), (errno.EIO, 10**6)]
    cases = [(at, *way) for at in range(3, len(told.ops)) for way in ways]
    for at, code, times in cases[::every]:
        state = base / "state"
        (state / RUN).mkdir(parents=True)
        (state / STORAGE).mkdir()
        problems = []
        world = make_world(state, story.storage, story.every_steps)
        with recording(Tape(state, BadDisk(at, code, times))):
            try:
                story.happens(world)
                process(world)
            except ENDS as end:
                if "\n" in str(end):
                    problems.append(f"more than a line: {end}")
            except OSError:
                pass  # the command line says it in one line
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
                problems.append(f"{type(error).__name__}: {error}")
        left = as_it_is(state)
        problems += go_on(left, base / "again", due, story.storage, story.every_steps)
        for folder in ("state", "again"):
            shutil.rmtree(base / folder)
        name = errno.errorcode[code]
        yield f"{name} at {at}, {times} times", problems


def bits(story: Story, base: Path, seed: int, each: int, every: int) -> Seen:
    """A run that was stopped after two steps, with a bit of a file flipped: it goes on, with other
    figures than these in no step that comes again, or it is refused in one line."""
    due = whole(story, base)
    (base / "half" / RUN).mkdir(parents=True)
    (base / "half" / STORAGE).mkdir()
    world = make_world(base / "half", story.storage, story.every_steps)
    world.during = {"update": lambda step: world.stop() if step == 2 else None}
    with suppress(*ENDS):
        process(world)
    tree = as_it_is(base / "half")
    for number, case in enumerate(flips(tree, random.Random(seed), each)):
        if number % every:
            continue
        ends = _line_ends(tree, case.file) - _line_ends(case.tree, case.file)
        lost = 2 if ends > 0 else 1  # a line end that is another joins two records
        problems = go_on(
            case.tree, base / "state", due, story.storage, story.every_steps, case.file, lost
        )
        shutil.rmtree(base / "state")
        yield case.told, problems


def _line_ends(tree: Tree, path: str) -> int:
    return (tree[path] or b"").count(b"\n")
