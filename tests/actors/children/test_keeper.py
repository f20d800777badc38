"""A keeper that is to end its child before that has begun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from actors.children import keeper

HERE = Path(__file__).parents[3]
# The child leads no group: so it is until it runs for the first time.
BEGUN = """
import os, signal, socket, threading
os.setsid = lambda: None
"""
KEPT = """
from actors.children.keeper import keep
actor, lifeline = socket.socketpair()
actor.close()
keep(lifeline.fileno(), None, threading.Event().wait)
"""
SANDBOXED = """
from actors.children.keeper import kill_all
child = os.fork()
if child == 0:
    threading.Event().wait()
kill_all(child)
"""


@pytest.mark.parametrize("program", [KEPT, SANDBOXED])
def test_a_child_that_leads_no_group_yet_is_ended_too(program: str) -> None:
    """Else its keeper would wait for it: this ends by the deadline then."""
    ran = subprocess.run(
        [sys.executable, "-c", BEGUN + program],
        cwd=HERE, capture_output=True, text=True, timeout=20, start_new_session=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")


def test_what_is_left_out_is_said_once_in_a_file_however_many_processes_write_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "LOG_BYTES", 1000)
    log = tmp_path / "reward.log"
    for _ in range(200):
        keeper.Output(str(log)).write(b"x" * 99 + b"\n")
    text = log.read_text()
    assert text.count("x") == 990
    assert text.count("too much output") == 1
    assert len(text) <= 1045
