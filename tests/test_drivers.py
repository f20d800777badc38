"""A program that is forked for a test ends, prints and is told of as one that Python starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.forks import owner, wire
from tests import drivers
from tests.cluster.forks.test_server import until

ENDS = "import os, sys; print(os.getcwd(), input()); print('aside', file=sys.stderr); sys.exit(3)"


@pytest.fixture(params=["forked", "started"], scope="module")
def environment(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(wire.SOCKET, raising=False)
        if request.param == "started":
            yield dict(os.environ)
            return
        if not drivers._tells_exit_codes():
            pytest.skip("Linux tells exit codes to parents alone here")
        with owner.server(["statistics"]):
            until(lambda: os.path.exists(os.environ[wire.SOCKET]), "a socket")
            yield dict(os.environ)


@pytest.mark.slow
def test_a_program_ends_with_its_code_and_what_it_printed(
    environment: dict[str, str], tmp_path: Path
) -> None:
    done = drivers.run(["-c", ENDS], env=environment, timeout=60, cwd=tmp_path, given="hello\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path} hello\n", "aside\n")


@pytest.mark.slow
def test_a_program_that_is_killed_says_so_and_one_that_runs_is_waited_for(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with (tmp_path / "output").open("wb") as output:
        process = drivers.start(
            ["-c", "import time; time.sleep(600)"], env=environment, output=output
        )
        forked = wire.SOCKET in environment
        assert isinstance(process, drivers.Forked if forked else subprocess.Popen)
    try:
        if forked:  # or the server reads what is to wake the branch, which hears seconds later
            branch, server = psutil.Process(process.pid).parents()[:2]
            assert not _pipes(branch) & _pipes(server)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == process.poll() == -signal.SIGTERM
    finally:
        process.kill()


def _pipes(process: psutil.Process) -> set[str]:
    """Those that it has but as standard input and output."""
    files = Path(f"/proc/{process.pid}/fd")
    own = [str(file.readlink()) for file in files.iterdir() if int(file.name) > 2]
    return {pipe for pipe in own if pipe.startswith("pipe:")}


LATE = """
import atexit, threading, time
atexit.register(print, "last")
threading.Thread(target=lambda: (time.sleep(0.1), print("its thread"))).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "code", "printed", "said"),
    [
        ("import sys; sys.exit('it is over')", 1, "", "it is over\n"),
        ("1 / 0", 1, "", "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 2)", -signal.SIGINT, "", "KeyboardInterrupt\n"),
        (LATE, 0, "its thread\nlast\n", ""),
    ],
)
def test_each_end_is_that_of_python(
    environment: dict[str, str], program: str, code: int, printed: str, said: str
) -> None:
    done = drivers.run(["-c", program], env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (code, printed)
    assert done.stderr.endswith(said)
