"""Environments that take steps, played as agents against a session."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from actors.environments.conversations import Conversation
from actors.environments.sessions import SessionServer
from actors.environments.specs import EpisodeCode, EpisodesSpec
from actors.environments.tokens import ChatTokens
from actors.scoring.criteria import EpisodeCriterion
from actors.specs import ModelSpec
from aligntune.agents import step_agent
from aligntune.errors import UserError
from aligntune.online.episodes import UserCode
from tests.actors.environments.chat import LIMITS, make_tokenizer
from tests.actors.environments.scripted import Script


@dataclass
class Result:
    observation: str
    reward: float | None
    done: bool


class Line:
    """Walks from 0 to 2, in OpenEnv's way, and is async."""

    closed = 0

    async def reset(self) -> Result:
        self.place = 0
        return Result("at 0", None, False)

    async def step(self, action: int) -> Result:
        self.place += action
        return Result(f"at {self.place}", -0.5, self.place == 2)

    async def close(self) -> None:
        Line.closed += 1


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def played(
    tokenizer: Any, agent: Callable[..., Any], said: list[str], prompt: Any = "Go.", **limits: Any
) -> tuple[list[float], list[str]]:
    """The rewards of the answers, and the conversation."""

    async def play() -> tuple[list[float], list[str]]:
        tokens = ChatTokens(tokenizer)
        server = SessionServer(tokens, "policy", "127.0.0.1", None)
        await server.start()
        bounds = LIMITS.__class__(**{**vars(LIMITS), **limits})
        conversation = Conversation(tokens, Script(tokenizer, said), bounds)
        with server.session(conversation) as session:
            async with httpx.AsyncClient(timeout=30) as client:
                rewards = await agent(
                    {"prompt": prompt},
                    base_url=session.url,
                    api_key=session.key,
                    http_client=client,
                    seed=3,
                )
        await server.close()
        assert list(rewards) == [answer.id for answer in conversation.answers]
        assert conversation.figures().extended == len(rewards) - 1
        return list(rewards.values()), [m["content"] for m in conversation.messages()[0]]

    return asyncio.run(asyncio.wait_for(play(), 60))


def test_each_answer_is_a_step_with_its_own_reward(tokenizer: Any) -> None:
    closed = Line.closed
    rewards, said = played(tokenizer, step_agent(lambda row: Line()), ["1", "up", "1"])
    assert rewards == [-0.5, 0.0, -0.5]
    assert said[:3] == ["Go.\nat 0", "1", "at 1"]
    assert "'up'" in said[4]  # what cannot be read is told, and takes no step
    assert Line.closed == closed + 1


def test_a_limit_ends_the_episode_with_the_rewards_until_then(tokenizer: Any) -> None:
    prompt = [{"role": "system", "content": "Go."}]
    agent = step_agent(lambda row: Line())
    rewards, said = played(tokenizer, agent, ["0", "0"], prompt, max_turns=2)
    assert (rewards, said[:2]) == ([-0.5, -0.5], ["Go.", "at 0"])


@pytest.mark.slow
def test_an_environment_of_gymnasium_is_played(tokenizer: Any) -> None:
    gymnasium = pytest.importorskip("gymnasium")

    def make(row: dict[str, Any]) -> Any:
        return gymnasium.make("CartPole-v1", max_episode_steps=3)

    agent = step_agent(make, show=lambda seen: f"{len(seen)} numbers")
    rewards, said = played(tokenizer, agent, ["1", "0", "1"])
    assert (rewards, said[0]) == ([1.0, 1.0, 1.0], "Go.\n4 numbers")


def test_an_action_of_floats_is_asked_for_by_its_values(tokenizer: Any) -> None:
    """The space is of float32; that its `step` would cut what lies outside is not known."""
    gymnasium = pytest.importorskip("gymnasium")
    agent = step_agent(
        lambda row: gymnasium.make("Pendulum-v1", max_episode_steps=1),
        read=lambda text: np.array([float(text)]),
    )
    rewards, said = played(tokenizer, agent, ["2.5", "0.3"])
    assert rewards[0] == 0.0
    assert rewards[1] < 0.0
    assert said[2].startswith("[2.5] is no action of Box(-2.0, 2.0")


def test_a_step_that_raises_fails_the_episode(tokenizer: Any) -> None:
    class Broken(Line):
        async def step(self, action: int) -> Result:
            raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        played(tokenizer, step_agent(lambda row: Broken()), ["1"])


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("", "at 0"),
        ("Now.", "Now.\nat 0"),
        ([{"type": "text", "text": "Now."}], "Now.\nat 0"),
    ],
)
def test_the_observation_goes_on_from_what_the_user_says_last(
    tokenizer: Any, last: Any, told: str
) -> None:
    """With `data.system_prompt` a row's prompt is messages, and none is an empty one."""
    prompt = [{"role": "system", "content": "Go."}, {"role": "user", "content": last}]
    _, said = played(tokenizer, step_agent(lambda row: Line()), ["2"], prompt)
    assert said == ["Go.", told, "2"]


@pytest.mark.slow
@pytest.mark.parametrize("counted", [True, False])
def test_an_agent_whose_own_reward_is_not_counted_is_told_of(
    tiny_model: Path, counted: bool
) -> None:
    own = EpisodeCriterion("own", "environment")
    criteria = (own,) if counted else (EpisodeCriterion("other", "other"),)
    code = UserCode(EpisodeCode(agent="json:loads"))
    _, notes = code.checked(ModelSpec(name=str(tiny_model)), criteria, EpisodesSpec())
    assert any("what the agent returns is none" in note for note in notes) is not counted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "taken", "message"),
    [
        ("nowhere:run", False, "agent 'nowhere:run': there is no module 'nowhere'"),
        ("json:loads", True, r"episodes\.port: .* in use"),
    ],
)
def test_an_agent_and_its_port_are_checked_before_the_run(
    tiny_model: Path, agent: str, taken: bool, message: str
) -> None:
    code = UserCode(EpisodeCode(agent=agent))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if taken else None
        with pytest.raises(UserError, match=message) as refused:
            code.checked(ModelSpec(name=str(tiny_model)), (), EpisodesSpec(port=port))
    assert "\n" not in str(refused.value)
