"""A temporary folder is gone soon after its owner, however that ended, and not before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import scratch
from actors.scratch import OwnedFolder

REPOSITORY = Path(__file__).parents[2]
OWNER = """
from actors.scratch import OwnedFolder
folder = OwnedFolder("aligntune-code-")
open(folder.path + "/left", "w").close()
print(folder.path, flush=True)
input()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, in which this process has made none yet."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    scratch._remove_left.cache_clear()
    yield tmp_path
    scratch._remove_left.cache_clear()


def owner() -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder, and lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_owner_has_left_goes_and_that_of_a_living_one_stays(temporary: Path) -> None:
    dead, left = owner()
    living, kept = owner()
    (temporary / "aligntune-code-notes.txt").write_text("a user's")
    (temporary / "mine").mkdir()
    (temporary / "aligntune-code-link").symlink_to(temporary / "mine")
    with dead, living:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert (left / "left").exists()
        here = OwnedFolder("aligntune-code-")
        assert not left.exists()
        assert (kept / "left").exists()
        assert (temporary / "mine").is_dir()
        assert (temporary / "aligntune-code-notes.txt").exists()
        here.remove()
        assert not Path(here.path).exists()
        living.communicate("\n")  # it ends by itself, and cleans up
    assert not kept.exists()


def test_a_folder_that_another_took_for_left_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def taken_once(**options: str) -> str:
        path = make(**options)
        made.append(path)
        if len(made) == 1:
            os.rmdir(path)
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", taken_once)
    folder = OwnedFolder("aligntune-code-")
    assert folder.path == made[1]
    folder.remove()


def test_a_fork_that_ends_leaves_its_parents_folder_alone() -> None:
    folder = OwnedFolder("aligntune-code-")
    child = os.fork()
    if child == 0:
        try:
            folder.remove()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert Path(folder.path).is_dir()
    folder.remove()
    assert not Path(folder.path).exists()
