"""A run without processes, for the tests of the loop and of what it drives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.aligntune.online.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A run in an empty folder."""
    (tmp_path / "run").mkdir()
    world = World(tmp_path / "run")
    world.configure()
    return world
