"""A role of one's own: one entry in the table, and it is asked for, planned, placed and served."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from actors.specs import RewardActorSpec, RoleResources
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.role_requests import role_requests
from aligntune.online.role_table import ROLES, Role, Start, roles_of
from aligntune.online.roles import Roles
from aligntune.online.serving import Serving
from cluster.bundles import bundle_sets, totals


class Judge:
    """An actor that says who it is."""

    def __init__(self, name: str, model: str) -> None:
        self.name, self.model = name, model

    def start(self) -> dict[str, Any]:
        """It is ready at once."""
        return {"name": self.name}

    def judge(self, text: str) -> str:
        """What it thinks of a text."""
        return f"{self.model} likes {text}"

    def gpus(self) -> str | None:
        """Those that CUDA shows it."""
        return os.environ.get("CUDA_VISIBLE_DEVICES")


SECTION = RewardActorSpec(replicas=2, resources=RoleResources(cpus=0.5))
JUDGE = Role(
    "judge",
    lambda config: f"{__name__}:Judge",
    lambda start: (start.name, start.config.model.name),
    needed=lambda config: config.algorithm_name == "grpo",
    max_concurrent_groups=lambda config: 3,
    concurrent=True,
)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setitem(ROLES, "judge", JUDGE)
    monkeypatch.setattr(RunConfig, "judge", SECTION, raising=False)  # as a field of the tree would
    made = load_config(
        {
            "algorithm": {"name": "grpo", "beta": 0.0},
            "model": {"name": "some/model"},
            "data": {"path": "x.jsonl"},
            "rewards": ["length"],
            "output_dir": "run",
            "rollout": {"max_prompt_length": 8},
        }
    )
    assert isinstance(made, RunConfig)
    return made


def test_a_new_role_is_asked_for_and_placed_beside_the_others(config: RunConfig) -> None:
    requests = {request.role: request for request in role_requests(config)}
    assert list(requests) == ["policy", "rollout", "reward", "judge"]
    assert (requests["judge"].replicas, requests["judge"].cpus) == (2, 0.5)
    without = [request for role, request in requests.items() if role != "judge"]
    assert totals(list(requests.values()))["CPU"] == totals(without)["CPU"] + 2 * 0.5
    assert any(part.name == "judge" for part in bundle_sets(list(requests.values()), []))


def test_a_role_that_the_run_does_not_need_is_not_there(config: RunConfig) -> None:
    gspo = load_config(config.model_dump(mode="json") | {"algorithm": "gspo"})
    assert isinstance(gspo, RunConfig)
    assert [role.name for role in roles_of(gspo)] == ["policy", "rollout", "reward"]


def test_its_set_of_replicas_is_made_with_its_own_slots(config: RunConfig) -> None:
    made: dict[str, tuple[Any, ...]] = {}

    def replica_set(role: str, size: int, make: Any, start: Any, **options: Any) -> Any:
        made[role] = (size, options["slots"], options["max_restarts"])
        return SimpleNamespace(role=role)

    roles = SimpleNamespace(maker=lambda role: None, room=lambda role: None)
    serving = Serving(config, roles, print, print, replica_set=replica_set)  # type: ignore[arg-type]
    assert made["judge"] == (2, 3, SECTION.max_restarts)
    assert set(serving.sets) == {"rollout", "reward", "judge"}


@pytest.mark.slow
def test_its_actor_is_made_in_its_place_without_a_gpu_and_answers(
    config: RunConfig, ray_session: None
) -> None:
    reservation = SimpleNamespace(options=lambda role, index: {"num_cpus": 0.1})
    roles = Roles(config, reservation, (), 1)  # type: ignore[arg-type]
    said: list[str] = []
    serving = Serving(config, roles, print, lambda name, info: said.append(name))

    async def asked() -> Any:
        judges = serving.sets["judge"]
        try:
            await judges.start()
            (gpus,) = await judges.call("gpus", deadline_s=30, queue_s=30)
            (answer,) = await judges.call("judge", "x", deadline_s=30, queue_s=30)
            return answer, gpus
        finally:
            await judges.close()

    assert asyncio.run(asked()) == ("some/model likes x", "")
    assert sorted(said) == ["judge-0.0", "judge-1.1"]


def test_a_slow_reward_may_have_as_many_processes_as_its_actor_has_groups(
    config: RunConfig,
) -> None:
    changed = load_config(config.model_dump(mode="json") | {"reward": {"max_concurrent_groups": 7}})
    assert isinstance(changed, RunConfig)
    *_, at_once, _ = ROLES["reward"].arguments(Start(changed, 0, "name", 1, ()))
    assert at_once == ROLES["reward"].max_concurrent_groups(changed) == 7


def test_every_role_names_a_class_that_is_there_and_takes_its_arguments(config: RunConfig) -> None:
    import importlib
    import inspect

    for role in ROLES.values():
        module, _, cls = role.actor(config).partition(":")
        made = getattr(importlib.import_module(module), cls)
        arguments = role.arguments(Start(config, 0, "name", 1, ()))
        inspect.signature(made).bind(*arguments)
