"""Tools and environments under bubblewrap: what they see, can write, and whom they reach."""

from __future__ import annotations

import ast
import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import sandbox, wrapping
from actors.environments.base import EpisodeFailed
from actors.environments.specs import EpisodeCode
from actors.environments.tool_episodes import ToolEpisodes
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, Script, call_text, prompt_of

CODE = '''
import os, socket, tempfile
from pathlib import Path


def look(home: str, port: int) -> str:
    """Look around.

    Args:
        home: the home folder.
        port: somebody listens there.
    """
    def tried(do):
        try:
            return do()
        except OSError as error:
            return type(error).__name__

    def write(path):
        return Path(path).write_text("x")

    return str({
        "secret": os.environ.get("A_SECRET"),
        "home": tried(lambda: Path(home, "secret").read_text()),
        "own": tried(lambda: write(Path(__file__).with_name("changed"))),
        "root": os.access("/usr", os.W_OK),
        "scratch": tried(lambda: write(Path(tempfile.gettempdir(), "changed"))),
        "network": tried(lambda: socket.create_connection(("127.0.0.1", port), 5).close()),
        "processes": len([name for name in os.listdir("/proc") if name.isdigit()]) < 20,
        "kernel": os.access("/proc/sys/vm/swappiness", os.W_OK),
    })
'''
SHELL = '''
import subprocess


def run(command: str) -> str:
    """Run a command.

    Args:
        command: of the shell.
    """
    return subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True).stdout


class Shell:
    def reset(self, **row):
        pass

    def run_here(self, command: str) -> str:
        """Run a command.

        Args:
            command: of the shell.
        """
        return run(command)
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a secret."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("found")
    monkeypatch.setattr(wrapping, "HOME", str(tmp_path / "home"))
    monkeypatch.setenv("A_SECRET", "found")
    return tmp_path / "home"


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def looked(
    mode: sandbox.Mode, folder: Path, home: Path, port: int, model: ModelSpec, tokenizer: Any
) -> dict[str, Any]:
    """What a tool that lies in `folder` finds."""
    folder.mkdir(parents=True)
    (folder / "looking.py").write_text(CODE)
    (folder / "user.log").touch()
    code = EpisodeCode(("looking:look",), search_path=(str(folder),))

    async def play() -> dict[str, Any]:
        episodes = ToolEpisodes(code, LIMITS, model, str(folder / "user.log"), mode)
        try:
            turns = (call_text("look", home=str(home), port=port), "done")
            episode = await episodes.run(prompt_of("hi"), 0, 1, Script(tokenizer, turns))
            assert episodes._server is not None
            assert episodes._server._scratch is not None
            scratches.append(episodes._server._scratch.path)
        finally:
            await episodes.close()
        (said,) = [m["content"] for m in episode.messages if m["role"] == "tool"]
        return dict(ast.literal_eval(said))

    scratches: list[str] = []
    before = psutil.Process().children(recursive=True)
    found = asyncio.run(play())
    assert psutil.Process().children(recursive=True) == before, "nothing is left of it"
    assert not Path(scratches[0]).exists(), "it goes with its server"
    return found


@pytest.mark.slow
def test_under_bubblewrap_a_tool_sees_its_module_and_no_secret_and_reaches_nobody(
    tmp_path: Path, home: Path, listening: int, chat_model: ModelSpec, tokenizer: Any
) -> None:
    if sandbox.bubblewrap()[0] is None:
        pytest.skip(sandbox.bubblewrap()[1])
    project = home / "project"  # as most are, where the rest is hidden
    assert looked("required", project, home, listening, chat_model, tokenizer) == {
        "secret": None,
        "home": "FileNotFoundError",
        "own": "OSError",
        "root": False,
        "scratch": 1,
        "network": "ConnectionRefusedError",
        "processes": True,
        "kernel": False,
    }


class Gated:
    """A policy that waits before some of its turns, and says when some are asked for."""

    def __init__(
        self, policy: Script, waits: dict[int, asyncio.Event], says: dict[int, asyncio.Event]
    ) -> None:
        self._policy, self._waits, self._says = policy, waits, says

    async def __call__(self, token_ids: Any, max_tokens: int, turn: int) -> Any:
        if turn in self._says:
            self._says[turn].set()
        if turn in self._waits:
            await self._waits[turn].wait()
        return await self._policy(token_ids, max_tokens, turn)


def told(
    mode: sandbox.Mode, folder: Path, tool: str, model: ModelSpec, tokenizer: Any, *commands: str
) -> tuple[str, list[str], list[str]]:
    """What sandbox is in force, and what the tools of two episodes say: the first one runs the
    first command (twice side by side) and the third, the second one the second, after each."""
    folder.mkdir()
    (folder / "shell.py").write_text(SHELL)
    (folder / "user.log").touch()
    code = EpisodeCode(("shell:run",), {"": "shell:Shell"}, search_path=(str(folder),))
    first, second, third = (call_text(tool, command=command) for command in commands)

    async def play() -> tuple[str, list[str], list[str]]:
        wrote, looked, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        one = Gated(
            Script(tokenizer, (first + first, third, "done")),
            waits={1: looked},
            says={1: wrote, 2: ended},
        )
        other = Gated(
            Script(tokenizer, (second, second, "done")),
            waits={0: wrote, 1: ended},
            says={1: looked},
        )
        episodes = ToolEpisodes(code, LIMITS, model, str(folder / "user.log"), mode)
        try:
            around = await episodes.start()
            both = [
                asyncio.create_task(episodes.run(prompt_of("hi"), place, 1, policy))
                for place, policy in enumerate((one, other))
            ]
            played = await asyncio.gather(*both)
            server = episodes._server
            assert server is not None
            assert server._scratch is not None
            while server._ending:
                await asyncio.wait(list(server._ending))
            assert os.listdir(server._scratch.path) == [], "a folder ends with its episode"
        finally:
            await episodes.close()
        answers = [[m["content"] for m in e.messages if m["role"] == "tool"] for e in played]
        return around, *answers

    return asyncio.run(play())


LOOK = "ls . ~ $TMPDIR /tmp /var/tmp /dev/shm; cat /proc/[0-9]*/cmdline; cat {log}"


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["run", "run_here"])
def test_episodes_of_a_sandbox_see_nothing_of_each_other_and_end_nothing_of_each_other(
    tool: str, tmp_path: Path, chat_model: ModelSpec, tokenizer: Any
) -> None:
    if sandbox.bubblewrap()[0] is None:
        pytest.skip(sandbox.bubblewrap()[1])
    folder = tmp_path / "project"
    around, one, other = told(
        *("required", folder, tool, chat_model, tokenizer),
        "for place in . /tmp /var/tmp /dev/shm; do echo x > $place/solution; done;"
        " echo solution >&2; sleep 9876 > /dev/null 2>&1 &",
        LOOK.format(log=folder / "user.log"),
        "cat solution; kill -9 -1; echo still there",
    )
    if "share" in around:
        pytest.skip(around)
    assert one[2] == "x\nstill there\n", "calls of an episode share its folder"
    for seen in other:
        assert "/var/tmp:" in seen
        assert "python" in seen, "its own process"
        assert "solution" not in seen
        assert "9876" not in seen


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["bubblewrap", "capabilities"])
def test_where_there_are_no_namespaces_an_episode_has_a_folder_of_its_own(
    lacking: str,
    tmp_path: Path,
    chat_model: ModelSpec,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if lacking == "bubblewrap":
        monkeypatch.setattr(sandbox, "bubblewrap", lambda: (None, "not here"))
    elif sandbox.bubblewrap()[0] is None:
        pytest.skip(sandbox.bubblewrap()[1])
    else:
        monkeypatch.setattr(sandbox, "_grants", lambda program: ())
    around, one, other = told(
        *("auto", tmp_path / "project", "run", chat_model, tokenizer),
        "echo x > solution",
        "ls . ~ $TMPDIR; echo",
        "cat solution",
    )
    assert one[2] == "x\n"
    assert all("solution" not in seen for seen in other)
    shared = "episodes share processes, ports and /tmp"
    assert (shared in around) == (lacking == "capabilities")


@pytest.mark.slow
def test_without_bubblewrap_auto_leaves_the_environments_variables_out(
    tmp_path: Path,
    home: Path,
    listening: int,
    chat_model: ModelSpec,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: (None, "not here"))
    found = looked("auto", tmp_path / "project", home, listening, chat_model, tokenizer)
    assert (found["secret"], found["home"]) == (None, "found")
    episodes = ToolEpisodes(EpisodeCode(("looking:look",)), LIMITS, chat_model, None, "required")
    with pytest.raises(EpisodeFailed, match=r"episodes\.sandbox is required, and not here"):
        asyncio.run(episodes.start())


def test_a_home_folder_that_would_be_seen_whole_is_refused(home: Path, tmp_path: Path) -> None:
    if sandbox.bubblewrap()[0] is None:
        pytest.skip(sandbox.bubblewrap()[1])
    for imports in (home, tmp_path):
        with pytest.raises(sandbox.SandboxMissing, match="holds the home folder"):
            sandbox.held("auto", "episodes.sandbox", str(tmp_path), [str(imports)], None)
