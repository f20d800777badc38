"""What a config says of episodes: the user's tools, environment or agent, and what fits them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from actors.environments.specs import EpisodesSpec
from actors.settings import Spec
from actors.specs import RewardFunctionSpec
from aligntune.errors import UserError

if TYPE_CHECKING:
    from aligntune.config.online import RunConfig

ENVIRONMENT = "environment"
"""The reward that is what the environment or agent itself says."""


class AgentSpec(Spec):
    """A program that plays an episode against an OpenAI-compatible address."""

    command: list[str] = Field(
        min_length=1,
        description="program and arguments; it finds OPENAI_BASE_URL and OPENAI_API_KEY set",
    )


def _parse_agent(value: Any) -> Any:
    """Text names a function; a mapping is a command."""
    return AgentSpec.model_validate(dict(value)) if isinstance(value, Mapping) else value


AgentField = Annotated[str | AgentSpec | None, BeforeValidator(_parse_agent)]


def scores_itself(reward: object) -> bool:
    """Whether an entry of `rewards` is what the environment or agent says."""
    return isinstance(reward, RewardFunctionSpec) and reward.function == ENVIRONMENT


def check_episodes(config: RunConfig) -> None:
    """Refuse what does not fit together, before anything starts (UserError)."""
    if config.agent is not None:
        for key in ("tools", ENVIRONMENT):
            if getattr(config, key):
                raise UserError(
                    f"agent plays the whole episode and calls its own tools, so {key} would be "
                    f"ignored; remove agent or {key}"
                )
    if isinstance(config.environment, dict) and not config.environment:
        raise UserError("environment names none; give NAME: package.module:Class, or remove it")
    if not config.plays and config.episodes != EpisodesSpec():
        raise UserError(
            "the episodes section is set and there are no tools, environment or agent, so it would "
            "be ignored; name one of them, or remove it"
        )
    for index, reward in enumerate(config.rewards):
        if not scores_itself(reward):
            continue
        assert isinstance(reward, RewardFunctionSpec)
        if config.agent is None and config.environment is None:
            raise UserError(
                f"rewards.{index} is what an environment or agent says, and the run has neither; "
                "set environment or agent, or name another reward"
            )
        if reward.options:
            raise UserError(
                f"rewards.{index}.options: {ENVIRONMENT} takes none; give the environment its own"
            )
    episodes = config.episodes
    if episodes.port is not None and episodes.replicas > 1:
        raise UserError(
            f"episodes.port={episodes.port} is one port and episodes.replicas="
            f"{episodes.replicas}; leave the port out, and each replica takes a free one"
        )
    of_agents, of_tools = ("host", "port"), ("call_timeout_s", "max_output_characters", "sandbox")
    ignored = of_agents if config.agent is None else of_tools
    for key in ignored:
        if getattr(episodes, key) != getattr(EpisodesSpec(), key):
            why = (
                "is where an agent's sessions are served, and there is no agent"
                if config.agent is None
                else "bounds tools and environments of ours, and an agent has its own"
            )
            raise UserError(f"episodes.{key} {why}, so it would be ignored; remove it")
