"""What docs/agents.md shows is played, not only imported: each of its files, as printed."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.children.code import import_function
from actors.environments.base import Episode
from actors.environments.conversations import Conversation
from actors.environments.sessions import SessionServer
from actors.environments.specs import EpisodeCode
from actors.environments.tokens import ChatTokens
from actors.environments.tool_episodes import ToolEpisodes
from actors.specs import ModelSpec
from tests.actors.environments.chat import (
    LIMITS,
    Script,
    call_text,
    make_model,
    make_tokenizer,
    prompt_of,
)
from tests.aligntune.test_agents import played
from tests.aligntune.test_examples import run_script
from tests.e2e.test_documents import BLOCKS
from tests.stand_ins import write_stand_ins

pytestmark = pytest.mark.slow

FILES = {b.file: b.body for b in BLOCKS if b.document.name == "agents.md" and b.file}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Things of the page's files, as `module:name`."""
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield import_function
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_has_a_file_for_each_beginning() -> None:
    assert set(FILES) == {"calculator.py", "hidden_number.py", "lake.py", "my_agent.py"}


def test_the_script_comes_to_its_training(
    tmp_path: Path, tiny_model: Path, shown: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "workplace"
    root.mkdir()
    write_stand_ins(root, tiny_model)
    monkeypatch.chdir(root)
    config = run_script(tmp_path / "calculator.py", ["checked"], monkeypatch)
    assert [tool.rpartition(":")[2] for tool in config.tools] == ["add"]


def of_tools(
    code: EpisodeCode, folder: Path, tokenizer: Any, turns: list[str], **row: Any
) -> Episode:
    """An episode in which the policy says `turns`."""
    make_model(folder / "model", tokenizer)

    async def play() -> Episode:
        episodes = ToolEpisodes(code, LIMITS, ModelSpec(name=str(folder / "model")), None)
        try:
            return await episodes.run(prompt_of("", **row), 0, 1, Script(tokenizer, turns))
        finally:
            await episodes.close()

    return asyncio.run(asyncio.wait_for(play(), 120))


def test_the_environment_and_the_tool_are_played(
    shown: Any, tmp_path: Path, tokenizer: Any
) -> None:
    code = EpisodeCode(
        ("calculator:add",), {"": "hidden_number:Guess"}, search_path=(str(tmp_path),)
    )
    guesses = [call_text("guess", number=n) for n in (50, 20)]
    turns = [*guesses, call_text("add", a=20, b=1) + call_text("guess", number=21), "It is 21."]
    episode = of_tools(code, tmp_path, tokenizer, turns, secret=21)
    said = [m["content"] for m in episode.messages if m["role"] in ("user", "tool")]
    assert said == [
        "I think of a number from 1 to 100. Guess it.",
        "lower",
        "higher",
        "21",
        "found",
    ]
    assert episode.rewards == {"environment": 1.0}
    assert not of_tools(code, tmp_path, tokenizer, ["9"], secret=21).rewards["environment"]


def test_the_gymnasium_environment_is_walked(shown: Any, tokenizer: Any) -> None:
    pytest.importorskip("gymnasium")
    way = ["1", "1", "2", "2", "left", "7", "1", "2"]  # no number, and a number that is no action
    rewards, said = played(tokenizer, shown("lake:walk"), way)
    assert said[0].endswith("You are at 0 of 15. 0 is left, 1 down, 2 right, 3 up. Say one number.")
    assert rewards == [0.0] * 7 + [1.0]
    assert said[12] == "7 is no action of Discrete(4)"


@pytest.mark.parametrize(("answer", "reward"), [("2", 1.0), ("3", 0.0)])
def test_the_openai_agent_plays_its_episode(
    shown: Any, tokenizer: Any, answer: str, reward: float
) -> None:
    agent = shown("my_agent:run")
    assert list(inspect.signature(agent).parameters)[1:] == ["base_url", "api_key", "http_client"]

    async def play() -> None:
        tokens = ChatTokens(tokenizer)
        server = SessionServer(tokens, "policy", "127.0.0.1", None)
        await server.start()
        conversation = Conversation(tokens, Script(tokenizer, [f" {answer}\n"]), LIMITS)
        row = {"prompt": "1+1?", "answer": "2"}
        with server.session(conversation) as session:
            given = {"base_url": session.url, "api_key": session.key, "http_client": None}
            assert await agent(row, **given) == reward
        await server.close()

    asyncio.run(asyncio.wait_for(play(), 60))
