"""The rights of the files that a run leaves."""

from __future__ import annotations

import os
from pathlib import Path

from aligntune.runs.modes import as_usual


def test_every_file_gets_the_rights_that_new_files_have(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    private = [tmp_path / "model.safetensors", tmp_path / "adapter" / "a.safetensors"]
    for path in private:
        path.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        as_usual(tmp_path)
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in private] == [0o640, 0o640]
    as_usual(tmp_path / "none")
