"""The user's tools, environments or agent: found and checked here, and as the actors get them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actors.children.code import in_file, load, search_path, searching
from actors.environments.specs import (
    AgentCommand,
    Code,
    EpisodeCode,
    EpisodeReward,
    EpisodesSpec,
)
from actors.reward import Criterion
from actors.scoring.calling import named_parameters
from actors.scoring.criteria import EpisodeCriterion, RewardCriterion
from actors.specs import ModelSpec
from aligntune.config.episodes import ENVIRONMENT, AgentSpec
from aligntune.config.online import RunConfig
from aligntune.data.messages import TOOLS
from aligntune.data.prompts import PromptSource
from aligntune.errors import UserError, nearest

ANY_ROW = ""  # the name of the one environment of all rows


@dataclass(frozen=True)
class UserCode:
    """What the config names, found."""

    code: EpisodeCode
    found: Mapping[str, Any] = field(default_factory=dict)  # the objects, by path in the config

    @classmethod
    def of(cls, config: RunConfig, objects: Mapping[str, Callable[..., Any]]) -> UserCode:
        """The tools, environments or agent of a config; `objects` those that were given as such, by
        path in the config. Raises UserError where one cannot be found or sent."""
        path, found = search_path(), {}

        def code_of(key: str, text: str) -> Code:
            nonlocal path
            code, path, found[key] = _found(key, text, objects.get(key), path)
            return code

        tools = tuple(code_of(f"tools.{i}", tool) for i, tool in enumerate(config.tools))
        environments: dict[str, Code] = {}
        if isinstance(config.environment, str):
            environments = {ANY_ROW: code_of("environment", config.environment)}
        elif config.environment is not None:
            environments = {
                name: code_of(f"environment.{name}", text)
                for name, text in config.environment.items()
            }
        agent: Code | AgentCommand | None = None
        if isinstance(config.agent, AgentSpec):
            agent = AgentCommand(tuple(config.agent.command))
        elif config.agent is not None:
            agent = code_of("agent", config.agent)
        prompt = config.data.system_prompt
        code = EpisodeCode(tools, environments, agent, search_path=path, system_prompt=prompt)
        return cls(code, found)

    def says_rewards(self, config: RunConfig) -> str | None:
        """Why the run is rewarded by what its environment or agent says, though no reward names it;
        None where it is not. As TRL, which takes every environment's `get_reward`."""
        if self.code.agent is not None:
            return None if config.rewards else "no reward is named: what the agent returns is it"
        environments = [found for key, found in self.found.items() if key.startswith(ENVIRONMENT)]
        if any(hasattr(environment, "get_reward") for environment in environments):
            return "the environment has get_reward, which is added to the rewards with weight 1"
        return None

    def placed(self, criterion: Criterion) -> Criterion:
        """The criterion, as one of the episodes where it wants the living environments."""
        return (
            EpisodeCriterion(criterion.name, criterion.name)
            if self._wants(criterion)
            else criterion
        )

    def checked(
        self, model: ModelSpec, criteria: Sequence[Criterion], episodes: EpisodesSpec
    ) -> tuple[EpisodeCode, list[str]]:
        """What the environment actors get, `criteria` that want the environments with it, and what
        the user should know.

        Raises UserError: the model cannot be told of the tools, the agent cannot be imported, or
        its sessions cannot be served.
        """
        wanting = [c for c in criteria if isinstance(c, RewardCriterion) and self._wants(c)]
        path = tuple(
            dict.fromkeys((*self.code.search_path, *(p for c in wanting for p in c.search_path)))
        )
        code = replace(
            self.code,
            rewards={c.name: EpisodeReward(_with_options(c), c.timeout_s) for c in wanting},
            search_path=path,
        )
        from actors.environments.agents import check_agent
        from actors.environments.tool_episodes import check_tools

        try:
            if code.agent is not None:
                notes = check_agent(code, model, episodes.host, episodes.port)
                return code, [*notes, *_not_counted(criteria)]
            return code, check_tools(code, model)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _wants(self, criterion: Criterion) -> bool:
        if not isinstance(criterion, RewardCriterion) or not self.code.environments:
            return False
        with searching(criterion.search_path):
            return "environments" in named_parameters(load(criterion.target))[0]


def _not_counted(criteria: Sequence[Criterion]) -> list[str]:
    """That what an agent returns is not among the rewards, where it is not."""
    if any(isinstance(c, EpisodeCriterion) and c.key == ENVIRONMENT for c in criteria):
        return []
    return [
        f"other rewards are named, so what the agent returns is none; name {ENVIRONMENT!r} too "
        "where it should count"
    ]


def check_rows(config: RunConfig, rows: PromptSource) -> None:
    """Refuse a row whose `environment` is none of those that are named, and one that has tools
    beside those of the run (UserError)."""
    if config.plays and config.agent is None and TOOLS in rows.prompt_at(0).columns:
        for row, tools in rows.column(TOOLS):
            if tools:
                raise UserError(
                    f"row {row} of the data has tools of its own, which nothing here can call; "
                    "remove column 'tools', or rename it where the environment reads it"
                )
    if not isinstance(config.environment, Mapping):
        return
    for row, name in rows.column(ENVIRONMENT):
        if name not in config.environment:
            known = nearest(str(name), config.environment)
            raise UserError(f"row {row} of the data has environment {name!r}; {known}")


def _found(
    key: str, text: str, given: Any, path: tuple[str, ...]
) -> tuple[Code, tuple[str, ...], Any]:
    """How `text` is sent, with what search path, and the object. Raises UserError."""
    if given is not None:
        from ray import cloudpickle  # Ray: seconds, and only needed here

        try:
            pickled: bytes = cloudpickle.dumps(given)
        except Exception as error:
            raise UserError(f"{key}: {text} cannot be sent to its process: {error}") from error
        return pickled, path, given
    try:
        file, _, name = text.rpartition(":")
        if file.endswith(".py"):
            text, path = in_file(os.path.abspath(file), name, path)
        with searching(path):
            return text, path, load(text)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


def _with_options(criterion: RewardCriterion) -> Code:
    """The function of a criterion; with its options bound, where it has some."""
    if not criterion.options:
        return criterion.target
    from ray import cloudpickle

    with searching(criterion.search_path):
        bound = functools.partial(load(criterion.target), **criterion.options)
        pickled: bytes = cloudpickle.dumps(bound)
    return pickled
