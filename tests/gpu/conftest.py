"""Tests of this folder compute on a GPU, and are skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from aligntune.selftest.run import no_gpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    why = no_gpu() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if why is not None:
            item.add_marker(pytest.mark.skip(reason=why))
