"""A standard output that takes nothing ends no run, whatever it raises."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aligntune.tracking.output import Shown
from aligntune.tracking.progress import Progress

REPOSITORY = Path(__file__).parents[3]


class Full(io.StringIO):
    """A file on a disk without room."""

    tries = 0

    def write(self, text: str) -> int:
        self.tries += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullTerminal(Full):
    """A terminal that is gone."""

    def isatty(self) -> bool:
        return True


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [Full, FullTerminal, closed])
def test_what_is_not_shown_raises_nothing_and_is_told_once(
    make: Callable[[], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    told: list[str] = []
    stream = make()
    progress = Progress(5, stream, lost=lambda reason: told.append(reason))
    progress.stage("Ray runs on this machine")
    progress.starting({"rollout": "vLLM is loading"})
    progress.ready("rollout")
    for step in (1, 2):
        progress.step(step, {"reward/mean": 0.5})
    progress.tick()
    progress.note("a replica is lost")
    progress.close()
    assert len(told) == 1
    if isinstance(stream, Full):
        assert stream.tries == 1, "nothing piles up"
        assert "No space left on device" in told[0]


def test_a_terminal_without_a_character_gets_a_mark_for_it() -> None:
    told: list[str] = []
    raw = io.BytesIO()
    stream = Shown(io.TextIOWrapper(raw, encoding="latin-1"), lambda reason: told.append(reason))
    print("größer → 3", file=stream, flush=True)
    assert raw.getvalue().decode("latin-1") == "größer ? 3\n"
    assert not told


def test_without_a_standard_output_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    progress = Progress(5)
    progress.note("unheard")
    progress.close()


ENDED = """
import sys
from types import SimpleNamespace
from aligntune import cli
from aligntune.commands import train_cli
result = SimpleNamespace(describe=lambda: "done", output_dir=cli_path, model=cli_path / "model")
train_cli.trainer_of = lambda *_, **__: SimpleNamespace(train=lambda resume: result)
sys.argv = ["aligntune", "train", "config.yaml"]
cli.console()
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux's")
def test_a_finished_run_exits_well_where_nobody_can_be_told(tmp_path: Path) -> None:
    where = f"from pathlib import Path\ncli_path = Path({str(tmp_path)!r})\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", where + ENDED],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
