"""A run without processes, for the tests of the loop and of what it drives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.aligntune.online.episodes import Play
from tests.aligntune.online.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run in an empty folder."""
    (tmp_path / "run").mkdir()
    world = World(tmp_path / "run")
    world.configure()
    return world


@pytest.fixture
def play(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Play]:
    """A run of episodes in a folder of its own each time."""
    count = [0]

    def make(**changes: Any) -> Play:
        count[0] += 1
        world.folder = world.folder.parent / f"run-{count[0]}"
        world.folder.mkdir()
        world.during = {}
        world.updates.clear()
        return Play(world, monkeypatch, **changes)

    return make
