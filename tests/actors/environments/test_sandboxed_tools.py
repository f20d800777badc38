"""Tools and environments under bubblewrap: what they see, can write, and whom they reach."""

from __future__ import annotations

import ast
import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import sandbox
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
    })
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a secret."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "secret").write_text("found")
    monkeypatch.setattr(sandbox, "_OUTSIDE", str(tmp_path / "home"))
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
    }


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
