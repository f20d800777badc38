"""What an import path that leads nowhere says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from actors.children.code import FunctionNotFound, import_function


def test_a_long_search_path_hides_no_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = [tmp_path / f"folder-{number:02}" for number in range(40)]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder) for folder in folders])
    with pytest.raises(FunctionNotFound) as failure:
        import_function("no_such_module:reward")
    said = str(failure.value)
    assert "there is no module 'no_such_module'" in said
    assert str(folders[0]) in said
    assert str(folders[5]) in said
    assert said.endswith(" and 34 more")
