"""Tools, environments and agents in a config: what fits together, and what is refused in a line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from aligntune.config.code import named_code, not_replaced
from aligntune.config.episodes import AgentSpec
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.online.episodes import check_rows
from aligntune.online.role_requests import role_requests
from aligntune.online.settle import settle_data


def config(**changes: Any) -> RunConfig:
    made = load_config(
        {
            "algorithm": {"name": "grpo", "beta": 0.0},
            "model": {"name": "m"},
            "data": {"path": "d"},
            "output_dir": "run",
            **changes,
        }
    )
    assert isinstance(made, RunConfig)
    return made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"agent": "a:b", "tools": ["c:d"]}, "remove agent or tools"),
        ({"agent": "a:b", "environment": "c:D"}, "remove agent or environment"),
        ({"episodes": {"max_turns": 3}}, "there are no tools, environment or agent"),
        ({"rewards": ["length", "environment"]}, r"rewards\.1 is what an environment or agent"),
        ({"rewards": ["environment"], "tools": ["a:b"]}, "the run has neither"),
        (
            {"rewards": [{"function": "environment", "options": {"x": 1}}], "agent": "a:b"},
            r"rewards\.0\.options",
        ),
        ({"environment": {}}, "environment names none"),
        ({"agent": "a:b", "episodes": {"port": 80, "replicas": 2}}, "leave the port out"),
        ({"tools": ["a:b"], "episodes": {"port": 80}}, "there is no agent"),
        ({"tools": ["a:b"], "episodes": {"host": "0.0.0.0"}}, "there is no agent"),
        ({"agent": "a:b", "episodes": {"call_timeout_s": 3}}, "an agent has its own"),
        ({"agent": "a:b", "episodes": {"max_output_characters": 9}}, "an agent has its own"),
        ({"agent": "a:b", "episodes": {"sandbox": "auto"}}, "an agent has its own"),
        (
            {"agent": "a:b", "episodes": {"episode_timeout_s": 7200}},
            r"raise train\.stall_timeout_s above it, or lower episodes\.episode_timeout_s",
        ),
        (
            {"tools": ["a:b"], "episodes": {"call_timeout_s": 1800}},
            r"or lower episodes\.call_timeout_s",
        ),
        (
            {"rewards": ["length", {"url": "http://x/score", "timeout_s": 3600}]},
            r"rewards\.1\.timeout_s=3600 lets one call take as long",
        ),
        ({"agent": {"comand": ["x"]}}, "did you mean 'agent.command'"),
        ({"agent": {"command": []}}, r"agent\.command"),
        ({"tools": "a:b"}, "tools"),
        ({"episodes": {"max_turn": 3}}, "did you mean 'episodes.max_turns'"),
    ],
)
def test_what_does_not_fit_together_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        config(**changes)
    assert "\n" not in str(refused.value)


def test_ppo_needs_no_reward_model_where_an_environment_rewards() -> None:
    assert config(algorithm="ppo", environment="a:B").plays
    with pytest.raises(UserError, match="needs a reward model"):
        config(algorithm="ppo", rewards=["length"])


def test_a_config_with_episodes_is_written_and_read_again() -> None:
    made = config(agent={"command": ["node", "agent.js"]}, episodes={"replicas": 2})
    assert isinstance(made.agent, AgentSpec)
    again = load_config(dump(made) and made.model_dump(mode="json"))
    assert again == made


def test_a_sandbox_where_it_works_is_not_none() -> None:
    made = config(tools=["a:b"], episodes={"sandbox": "auto"})
    assert made.episodes.sandbox == "auto"
    again = load_config(yaml.safe_load(dump(made)))
    assert isinstance(again, RunConfig)
    assert again.episodes.sandbox == "auto"


def test_the_environment_role_is_asked_for_only_where_rollouts_are_episodes() -> None:
    with_tools = {r.role: r for r in role_requests(config(tools=["a:b"], episodes={"replicas": 3}))}
    asked = with_tools["environment"]
    assert (asked.replicas, asked.cpus, asked.gpus) == (3, 0.5, 0)
    assert "environment" not in {r.role for r in role_requests(config())}


def test_a_row_s_tokens_are_settled_within_the_positions() -> None:
    made = config(
        tools=["a:b"],
        rewards=["length"],
        rollout={"max_prompt_length": 30, "max_completion_length": 20},
    )
    assert settle_data(made, (), False, None)[0].episodes.max_tokens == 100
    settled, decisions = settle_data(made, (), False, 80)
    assert (settled.episodes.max_tokens, settled.longest_row) == (80, 80)
    assert "positions" in decisions[-1].why
    kept, _ = settle_data(made, (), False, 80, {"episodes": {"max_tokens": 60}})
    assert kept.episodes.max_tokens == 60
    with pytest.raises(UserError, match=r"max_tokens=90 is more than the 80 .*lower it to 80"):
        settle_data(made, (), False, 80, {"episodes": {"max_tokens": 90}})
    for tokens, said in ((30, "leaves nothing"), (90, "more than the 80")):
        wrong = made.model_copy(
            update={"episodes": made.episodes.model_copy(update={"max_tokens": tokens})}
        )
        with pytest.raises(UserError, match=said):
            settle_data(wrong, (), False, 80)


def test_an_environment_that_rewards_itself_is_a_reward_by_itself() -> None:
    made = config(environment="a:B", rewards=["length"])
    settled, decisions = settle_data(made, (1,), False, None, itself="it has get_reward")
    assert [reward.function for reward in settled.rewards] == ["length", "environment"]
    assert decisions[0].why == "it has get_reward"
    named = config(environment="a:B", rewards=[{"function": "environment", "weight": 2.0}])
    assert settle_data(named, (1,), False, None, itself="why")[0].rewards == named.rewards


def test_a_row_that_names_an_unknown_environment_is_refused() -> None:
    made = config(environment={"chess": "a:B", "go": "a:C"})
    rows = SimpleNamespace(
        column=lambda name: iter([(0, "go"), (4, "ches")]),
        prompt_at=lambda position: SimpleNamespace(columns={}),
    )
    with pytest.raises(UserError, match=r"row 4 .*'ches'.*chess"):
        check_rows(made, rows)  # type: ignore[arg-type]


def test_callables_become_their_names_and_are_kept_by_path() -> None:
    def tool() -> None: ...

    class Game: ...

    named, code = named_code({"tools": ["a:b", tool], "environment": {"go": Game}, "seed": 1})
    own = f"{__name__}:test_callables_become_their_names_and_are_kept_by_path.<locals>"
    assert named == {
        "tools": ["a:b", f"{own}.tool"],
        "environment": {"go": f"{own}.Game"},
        "seed": 1,
    }
    assert code == {"tools.1": tool, "environment.go": Game}
    assert not_replaced(code, named) == code
    others: list[dict[str, Any]] = [
        {"tools": ["a:b", "c:d"]},
        {"tools": ["a:b"]},
        {"environment": "c:d"},
    ]
    for other in others:
        left = not_replaced(code, named | other)
        assert [*left] == [place for place in code if place.partition(".")[0] not in other], other
    for wrong in ({"tools": [3]}, {"tools": tool}, {"environment": 3}, {"agent": 3}):
        with pytest.raises(UserError):
            named_code(wrong)
