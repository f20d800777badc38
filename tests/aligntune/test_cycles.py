"""Python looks for cycles seldom amid imports, and as usual once a run has begun."""

from __future__ import annotations

import gc
from pathlib import Path

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
