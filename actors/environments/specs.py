"""How episodes are run: settings of the environment role, and what the user's code is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from actors.sandbox import Mode
from actors.settings import Positive, Seconds, Spec
from actors.specs import RoleResources

Code = str | bytes
"""`module:name`, `path/to/file.py:name`, or the thing itself pickled by cloudpickle."""


class EpisodesSpec(Spec):
    """How episodes are run."""

    replicas: Positive = Field(1, description="actors that hold episodes, on CPU nodes")
    resources: RoleResources = RoleResources(cpus=0.5)
    max_concurrent_groups: Positive = Field(32, description="in flight per replica")
    max_turns: Positive = Field(16, description="of the policy, in one episode")
    max_tool_calls: Positive = Field(32, description="in one episode")
    max_tokens: Positive | None = Field(
        None,
        description="of prompt, turns and tool answers; default: prompt and completion budgets "
        "and as much again for what tools say, within the model's positions",
    )
    call_timeout_s: Seconds = Field(30.0, description="of one tool call or environment step")
    episode_timeout_s: Seconds = Field(
        600.0, description="of one episode, the time for sampling left out"
    )
    max_output_characters: Positive = Field(
        16384, description="of one tool's answer; the rest is cut, and the model is told"
    )
    memory_gib: float | None = Field(
        None, gt=0, description="of one environment's process; default: not limited"
    )
    sandbox: Mode = Field(
        "off",
        description="around tools and environments: auto, bubblewrap where it works, else limits "
        "and an empty environment; required: the run ends where it does not work",
    )
    discount: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of a turn's reward a turn later, in group algorithms with an agent",
    )
    host: str = Field("127.0.0.1", description="where an agent's sessions are served")
    port: int | None = Field(None, ge=1, le=65535, description="of the sessions; default: any")
    max_attempts: Positive = Field(3, description="tries of an episode before its group fails")
    start_timeout_s: Seconds = Field(300.0, description="longest wait for a replica to start")
    max_restarts: int = Field(
        10,
        ge=0,
        description="replacements of dead replicas an hour; used ones come back",
    )


@dataclass(frozen=True)
class AgentCommand:
    """A program that plays an episode against an OpenAI-compatible address."""

    command: tuple[str, ...]


@dataclass(frozen=True)
class EpisodeReward:
    """A reward function that wants `environments`."""

    target: Code
    timeout_s: float  # of its call, one episode a call


@dataclass(frozen=True)
class EpisodeCode:
    """The user's code, as the environment actors get it. One door: tools and environments, or an
    agent."""

    tools: tuple[Code, ...] = ()
    environments: Mapping[str, Code] = field(default_factory=dict)
    """By the row's `environment`; one that is named "" is every row's."""

    agent: Code | AgentCommand | None = None
    rewards: Mapping[str, EpisodeReward] = field(default_factory=dict)  # by their names
    search_path: tuple[str | Path, ...] = ()  # the driver's sys.path
    system_prompt: str | None = None  # data.system_prompt: the first message, before the row's own

    @property
    def reward_seconds(self) -> float:
        """Those that `rewards` may take of one episode: they are called one after the other."""
        return sum(reward.timeout_s for reward in self.rewards.values())
