"""Agents of the user's: functions and programs that call the policy."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.environments.agent_child import ProgramLost, player_of
from actors.environments.agents import AgentEpisodes, check_agent
from actors.environments.base import Episode, EpisodeFailed
from actors.environments.record import rows_of
from actors.environments.specs import AgentCommand, EpisodeCode
from actors.messages import FinishReason
from actors.models.loading import load_tokenizer
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, call_text, prompt_of
from tests.actors.environments.scripted import Script
from tests.actors.environments.user_agents import OPENAI, PLAIN, PROGRAM

Episodes = Callable[[str], AgentEpisodes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    (folder / "user_agents.py").write_text(PLAIN)
    (folder / "openai_agents.py").write_text(OPENAI)
    (folder / "program.py").write_text(PROGRAM)
    return folder


def code_of(folder: Path, agent: str) -> EpisodeCode:
    if agent == "program":
        return EpisodeCode(agent=AgentCommand((sys.executable, str(folder / "program.py"))))
    module = "openai_agents" if agent in ("solves", "goes_on") else "user_agents"
    return EpisodeCode(agent=f"{folder}/{module}.py:{agent}")


@pytest.fixture(scope="module")
def episodes(chat_model: ModelSpec, folder: Path, loop: Any) -> Iterator[Episodes]:
    kept: dict[str, AgentEpisodes] = {}

    def of(agent: str) -> AgentEpisodes:
        if agent not in kept:
            log = str(folder / "log")
            kept[agent] = AgentEpisodes(code_of(folder, agent), LIMITS, chat_model, log)
        return kept[agent]

    yield of
    for made in kept.values():
        loop(made.close())


@pytest.fixture
def play(episodes: Episodes, tokenizer: Any, loop: Any) -> Callable[..., Episode]:
    def played(agent: str, *said: Any, prompt: str = "1+1?", **more: Any) -> Episode:
        limits = {name: more.pop(name) for name in list(more) if hasattr(LIMITS, name)}
        which = episodes(agent)
        which._limits = replace(LIMITS, **limits)
        row = prompt_of(prompt, **more)
        return loop(which.run(row, 0, 7, Script(tokenizer, said)))

    return played


@pytest.mark.slow
def test_an_async_agent_calls_tools_and_says_its_reward(play: Callable[..., Episode]) -> None:
    episode = play("solves", call_text("add", a=1, b=1), "2", answer="2")
    assert episode.rewards == {"environment": 1.0}
    assert episode.finish_reason == FinishReason.STOP
    assert [m["role"] for m in episode.messages] == ["user", "assistant", "tool", "assistant"]
    assert episode.messages[2]["content"] == "2"
    assert (episode.prompt_messages, episode.figures.tool_calls) == (1, 1)
    assert episode.figures.extended == 1
    assert len(rows_of(episode.calls, episode.finish_reason)) == 1
    assert play("solves", "3", answer="2").rewards == {"environment": 0.0}


def test_each_episode_begins_with_the_module_as_it_was_imported(
    play: Callable[..., Episode],
) -> None:
    assert [play("asks_once", "2").rewards["environment"] for _ in range(2)] == [1.0, 1.0]


@pytest.mark.slow
def test_a_program_is_given_the_row_and_says_its_reward_in_its_last_line(
    play: Callable[..., Episode], folder: Path
) -> None:
    assert play("program", "2", answer="2").rewards == {"environment": 1.0}
    assert play("program", "3", answer="2").rewards == {"environment": 0.0}
    for prompt in ("quiet", "deep"):  # its last line is no JSON, or what no parser reads
        assert play("program", "2", prompt=prompt).rewards == {"environment": None}
    assert "it said 3" in (folder / "log").read_text()
    with pytest.raises(EpisodeFailed, match=r"python.* ended with exit status 4; .*log"):
        play("program", "2", prompt="fail")


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EAGAIN, ProgramLost), (errno.ENOENT, ValueError)]
)
def test_a_program_that_finds_no_room_is_no_fault_of_the_row(
    monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception]
) -> None:
    def no_start(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "Popen", no_start)
    with pytest.raises(expected, match="does not start"):
        player_of(("program",))({"data": {}}, lambda awaitable: awaitable)


@pytest.mark.slow
def test_a_program_that_leaves_something_running_has_ended_and_so_has_what_it_left(
    play: Callable[..., Episode], tmp_path: Path, loop: Any
) -> None:
    pids = tmp_path / "pids"
    episode = play("program", "2", prompt="leaves", answer="2", pids=str(pids))
    assert (episode.finish_reason, episode.rewards) == (FinishReason.STOP, {"environment": 1.0})
    loop(until(lambda: gone(pids)))


def test_no_proxy_stands_between_an_agent_and_a_session_served_everywhere(
    chat_model: ModelSpec, folder: Path, tokenizer: Any, loop: Any
) -> None:
    code = code_of(folder, "passes_proxies_by")
    made = AgentEpisodes(code, LIMITS, chat_model, None, host="0.0.0.0")
    episode = loop(made.run(prompt_of("hi"), 0, 7, Script(tokenizer, ["2"])))
    loop(made.close())
    assert episode.rewards == {"environment": 1.0}


def test_rewards_of_answers_are_those_of_its_turns(play: Callable[..., Episode]) -> None:
    episode = play("rates_each_answer", "x", "y")
    assert (episode.rewards, episode.turn_rewards) == ({}, (0.5, 0.0))
    with pytest.raises(EpisodeFailed, match="'other', which is the id of none"):
        play("rates_each_answer", "x", "y", id="other")


@pytest.mark.slow
def test_an_agent_that_a_limit_ends_has_no_reward_and_says_which(
    play: Callable[..., Episode],
) -> None:
    episode = play("goes_on", "a", "b", max_turns=2)
    assert (episode.finish_reason, episode.rewards) == (FinishReason.TURNS, {"environment": None})
    assert len(episode.calls) == 2
    episode = play("goes_on", "abcdefgh", max_sampled_tokens=4)
    assert (episode.finish_reason, len(episode.calls)) == (FinishReason.LENGTH, 1)


@pytest.mark.parametrize(
    ("agent", "said", "message", "infrastructure"),
    [
        ("raises", (), r"the agent failed: .*KeyError: 'lost'", False),
        ("returns_text", ("2",), "what it returned is a str; an agent returns a number", False),
        ("ends_its_process", (), "ended with exit status 3", True),
        ("says_nothing", (), "without an answer of the model", False),
    ],
)
def test_a_failure_is_no_score(
    play: Callable[..., Episode], agent: str, said: Any, message: str, infrastructure: bool
) -> None:
    with pytest.raises(EpisodeFailed, match=f"(?s){message}") as failed:
        play(agent, *said)
    assert failed.value.infrastructure == infrastructure


@pytest.mark.slow
def test_an_agent_that_hangs_is_ended_with_all_it_started(
    play: Callable[..., Episode], tmp_path: Path, loop: Any
) -> None:
    """What it has sampled until then is an episode that time has cut."""
    pids = tmp_path / "pids"
    for seconds in (0.7, 3.0, 12.0, 48.0):  # on a busy machine it takes longer to be there
        with contextlib.suppress(EpisodeFailed):  # it had no answer yet
            episode = play("hangs", "2", pids=str(pids), episode_timeout_s=seconds)
        if Path(f"{pids}.ready").exists():
            break
    assert (episode.finish_reason, episode.rewards) == (FinishReason.TIME, {"environment": None})
    assert len(episode.calls) == 1
    loop(until(lambda: gone(Path(f"{pids}.ready"))))


def test_cancelling_an_episode_ends_its_agent(
    episodes: Episodes, tokenizer: Any, tmp_path: Path, loop: Any
) -> None:
    ready = tmp_path / "pids.ready"

    async def cancel() -> None:
        which = episodes("hangs")
        which._limits = LIMITS
        row = prompt_of("hi", pids=str(tmp_path / "pids"))
        task = asyncio.ensure_future(which.run(row, 0, 7, Script(tokenizer, ["2"])))
        await until(ready.exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: gone(ready))

    loop(cancel())


def gone(pids: Path) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids.read_text().split())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of other processes, which set no event
            await asyncio.sleep(0.02)


def test_a_policy_that_cannot_be_asked_ends_the_episode(episodes: Episodes, loop: Any) -> None:
    async def lost(token_ids: Any, max_tokens: int, turn: int) -> Any:
        raise RuntimeError("the replica is gone")

    with pytest.raises(RuntimeError, match="the replica is gone"):
        loop(episodes("asks_once").run(prompt_of("hi"), 0, 7, lost))


@pytest.mark.slow
def test_agents_play_side_by_side(episodes: Episodes, tokenizer: Any, loop: Any) -> None:
    async def together() -> list[Episode]:
        which = episodes("solves")
        which._limits = LIMITS

        async def one(i: int) -> Episode:
            policy = Script(tokenizer, [call_text("add", a=i, b=1), str(i + 1)])
            return await which.run(prompt_of(f"{i}+1?", answer=str(i + 1)), i, i, policy)

        return await asyncio.gather(*(one(i) for i in range(4)))

    found = loop(together())
    assert [episode.rewards["environment"] for episode in found] == [1.0] * 4
    assert [episode.messages[0]["content"] for episode in found] == [f"{i}+1?" for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("ask_once", r"agent .*has no 'ask_once' \(did you mean 'asks_once'\?\)"),
        ("NO_FUNCTION", "agent .*is a int, not a function"),
    ],
)
def test_an_agent_that_cannot_be_had_is_one_line(
    chat_model: ModelSpec, folder: Path, agent: str, message: str, loop: Any
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        check_agent(code_of(folder, agent), chat_model, "127.0.0.1", None)
    assert "\n" not in str(refused.value)
    made = AgentEpisodes(code_of(folder, agent), LIMITS, chat_model, None)
    with pytest.raises(EpisodeFailed, match=message):
        loop(made.start())


@pytest.mark.slow  # a process that imports OpenAI's client
def test_an_agent_that_is_there_passes_the_check(chat_model: ModelSpec, folder: Path) -> None:
    notes = check_agent(code_of(folder, "solves"), chat_model, "127.0.0.1", None)
    assert len(notes) == 1  # the training template of TRL


@pytest.mark.slow  # two processes that import OpenAI's client
def test_a_model_that_carries_no_tools_serves_agents_that_offer_none(
    tiny_model: Path, folder: Path, loop: Any
) -> None:
    model = ModelSpec(name=str(tiny_model))
    assert (
        "an agent that offers tools will be refused"
        in check_agent(code_of(folder, "asks_once"), model, "127.0.0.1", None)[0]
    )
    policy = Script(load_tokenizer(model), ["2"])
    for agent in ("asks_once", "solves"):
        made = AgentEpisodes(code_of(folder, agent), LIMITS, model, None)
        row = prompt_of("1+1", answer="2")
        if agent == "asks_once":
            assert loop(made.run(row, 0, 7, policy)).messages[-1]["content"] == "2"
        else:
            with pytest.raises(EpisodeFailed, match="does not render tool calls"):
                loop(made.run(row, 0, 7, policy))
        loop(made.close())
