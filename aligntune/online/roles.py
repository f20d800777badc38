"""The actors of a run: how one of any role is made in its reserved place."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import ray
from ray.actor import ActorHandle

from actors.disk import DISK_GROUP
from actors.environments.specs import EpisodeCode
from actors.liveness import HEALTH_GROUP
from actors.reward import Criterion
from aligntune.config.online import RunConfig
from aligntune.imports import variables_of
from aligntune.online.role_table import ROLES, Role, Start
from aligntune.paths import located, located_model
from cluster.reservation import Reservation

SPARE_CALLS = 8  # pings, weight updates and statistics beside the groups in flight


class Roles:
    """Makes the run's actors in their reserved places. Ray restarts none of them by itself: a
    replacement must be brought up to date before it serves, which is the supervisor's work."""

    def __init__(
        self,
        config: RunConfig,
        reservation: Reservation,
        criteria: Sequence[Criterion],
        total_steps: int,
        code: EpisodeCode | None = None,
    ) -> None:
        self._config = _located(config)
        self._reservation = reservation
        self._criteria = tuple(criteria)
        self._total_steps = total_steps
        self._code = code

    def maker(self, role: Role) -> Callable[[int, str], ActorHandle]:
        """What makes replica or rank `index` of a role, called `name`."""

        def make(index: int, name: str) -> ActorHandle:
            config = self._config
            start = Start(config, index, name, self._total_steps, self._criteria, self._code)
            module, _, cls = role.actor(config).partition(":")
            options = self._reservation.options(role.name, index)
            threads = role.section(config).resources.threads
            gpus = options.get("num_gpus") or 0
            if variables := variables_of(threads, gpus, by_itself="unsloth" in module):
                options["runtime_env"] = {"env_vars": variables}
            if role.concurrent:
                options["max_concurrency"] = (
                    role.max_concurrent_groups(config) * role.calls(config) + SPARE_CALLS
                )
            groups = HEALTH_GROUP | DISK_GROUP
            remote = ray.remote(max_restarts=0, concurrency_groups=groups, **options)
            made = remote(getattr(importlib.import_module(module), cls))
            return made.remote(*role.arguments(start))

        return make

    def of_config(self, config: RunConfig) -> Roles:
        """Roles in the same places by another config, as of another model."""
        return Roles(config, self._reservation, self._criteria, self._total_steps, self._code)

    def room(self, role: Role) -> Callable[[int], bool]:
        """Whether the cluster has a place for replica `index` of a role, beyond those reserved."""
        return lambda index: self._reservation.room(role.name, index)


def _located(config: RunConfig) -> RunConfig:
    """The config with every model that is a local folder named by its absolute path."""
    changed = {"model": located_model(config.model)}
    for role in ROLES.values():
        section = role.section(config)
        named = {key: getattr(section, key) for key in role.models}
        moved = {key: located(name) for key, name in named.items() if name is not None}
        if moved:
            changed[role.key] = section.model_copy(update=moved)
    return config.model_copy(update=changed)
