"""A standard output that takes nothing ends no run, whatever it raises."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from aligntune.tracking import output
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


class HeldUp(io.StringIO):
    """A terminal that Ctrl-S stopped, or a pipe that nobody reads, until it is `free`."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal
        self.free = threading.Event()

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        assert self.free.wait(60)
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_output_that_is_held_up_holds_up_no_run_and_has_the_last_line_at_its_end(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output, "MOST", 50)
    told: list[str] = []
    stream = HeldUp(terminal)
    progress = Progress(5, stream, lost=lambda reason: told.append(reason))
    for number in range(150):
        progress.note(f"line {number}.")
    stream.free.set()
    progress.close()
    shown = [int(number) for number in re.findall(r"line (\d+)\.", stream.getvalue())]
    assert shown[-49:] == list(range(101, 150))
    assert len(shown) <= 50 + 1
    assert told == []
    progress.note("a tracker did not end")
    assert "a tracker did not end" in stream.getvalue()


def test_a_terminal_without_a_character_gets_a_mark_for_it() -> None:
    told: list[str] = []
    raw = io.BytesIO()
    stream = Shown(io.TextIOWrapper(raw, encoding="latin-1"), lambda reason: told.append(reason))
    print("größer → 3", file=stream, flush=True)
    stream.end()
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


@pytest.mark.slow
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


HELD_UP = """
import signal, sys
from aligntune import cli
from aligntune.tracking.output import Shown
signal.signal(signal.SIGINT, signal.default_int_handler)
def main():
    shown = Shown(sys.stdout, print)
    print("x" * 1_000_000, file=shown, flush=True)
    print("ending", file=sys.stderr, flush=True)
    shown.end()
cli.main = main
cli.console()
"""


@pytest.mark.slow
def test_a_process_whose_output_is_held_up_ends_at_ctrl_c() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HELD_UP],
        stdout=subprocess.PIPE,  # that nobody reads
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            assert process.stderr.readline() == "ending\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 1
        finally:
            process.kill()
