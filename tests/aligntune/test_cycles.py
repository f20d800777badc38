"""Python looks for cycles seldom amid imports, as usual in a run, and not as a process ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import types
from pathlib import Path

import pytest

from aligntune import cycles
from aligntune.runs.lifecycle import recorded
from aligntune.runs.rundir import RunDir


class Events(list[object]):
    """Records of a run."""

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *exc: object) -> None:
        """Nothing is open."""

    def event(self, kind: object, **fields: object) -> None:
        """Keep it."""
        self.append(kind)


def test_a_run_looks_for_cycles_as_usual(tmp_path: Path) -> None:
    before = gc.get_threshold()
    cycles.seldom()
    try:
        assert gc.get_threshold()[0] > before[0]
        with recorded(Events(), RunDir(tmp_path), 1):
            assert gc.get_threshold() == before
        with recorded(Events(), RunDir(tmp_path), 1):  # another run of the same process
            assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*before)


def test_nothing_that_was_imported_is_looked_at_as_a_command_ends() -> None:
    program = (
        "import atexit, gc, sys; from aligntune.cli import console; "
        "atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count())); "
        "sys.argv = ['aligntune', '--version']; console()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    looked_at, kept = map(int, done.stdout.split()[-2:])
    assert looked_at < kept / 100


def test_where_tritons_library_would_list_leaks_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton._C.libtriton", types.ModuleType("libtriton"))
    before = gc.get_freeze_count()
    cycles.no_more()
    assert gc.get_freeze_count() == before
