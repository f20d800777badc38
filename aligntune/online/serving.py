"""The replicas that serve a run: a set for each role of the table that has replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray.actor import ActorHandle

from actors.answers import answer
from actors.liveness import Patience, sign_of_life
from actors.supervise import ReplicaSet
from actors.waiting import all_of
from aligntune.config.online import RunConfig
from aligntune.online.role_table import ROLES, Role, roles_of
from aligntune.online.roles import Roles

CatchUp = Callable[[ActorHandle, str], Awaitable[None]]


class Serving:
    """The replica sets of one run.

    `event(kind, **fields)` hears of losses and restarts, `said(name, info)` what a replica says of
    itself as it starts; `catch_up(handle, name)` brings a rollout replica to the current weights.
    `replica_set` makes a set of replicas.
    """

    def __init__(
        self,
        config: RunConfig,
        roles: Roles,
        event: Callable[..., None],
        said: Callable[[str, Mapping[str, Any]], None],
        catch_up: CatchUp | None = None,
        replica_set: Callable[..., ReplicaSet] = ReplicaSet,
    ) -> None:
        self._config = config
        self._event = event
        self._said = said
        self._replica_set = replica_set
        self._room_for_rollout = roles.room(ROLES["rollout"])
        self.sets: dict[str, ReplicaSet] = {}  # by role
        self._leaving: dict[str, float] = {}  # seconds, of roles whose replicas close themselves
        for role in roles_of(config):
            if not role.ranks:
                own = catch_up if role.name == "rollout" else None
                self.sets[role.name] = self._set(role, roles.maker(role), own)
                if role.leave_s:
                    self._leaving[role.name] = role.leave_s

    def _set(
        self, role: Role, make: Callable[[int, str], ActorHandle], catch_up: CatchUp | None
    ) -> ReplicaSet:
        section = role.section(self._config)

        async def start(handle: ActorHandle, name: str) -> int | None:
            """Start a replica; how many calls it takes at a time, where it says so."""
            limit, seconds = f"{role.key}.start_timeout_s", section.start_timeout_s
            info = await answer(handle.start.remote(), name, "start", seconds, limit)
            self._said(name, info)
            if catch_up is not None:
                await catch_up(handle, name)
            return info.get("max_concurrent_groups")

        return self._replica_set(
            role.name,
            role.size(self._config),
            make,
            start,
            slots=role.max_concurrent_groups(self._config),
            max_restarts=section.max_restarts,
            ping=sign_of_life(role.concurrent),
            patience=Patience(self._config.train.silence_timeout_s),
            event=self._event,
            section=role.key,
        )

    @property
    def rollouts(self) -> ReplicaSet:
        """What generates."""
        return self.sets["rollout"]

    @property
    def rewards(self) -> ReplicaSet:
        """What scores."""
        return self.sets["reward"]

    @property
    def references(self) -> ReplicaSet | None:
        """What gives reference log-probs, where the algorithm wants them."""
        return self.sets.get("reference")

    @property
    def environments(self) -> ReplicaSet | None:
        """What holds episodes, where rollouts are episodes."""
        return self.sets.get("environment")

    @property
    def handles(self) -> dict[str, ActorHandle]:
        """Every replica that is not dead, by its name."""
        return {name: each for one in self.sets.values() for name, each in one.handles.items()}

    @property
    def progress(self) -> int:
        """Goes up with whatever a replica says that it has done."""
        return sum(one.progress for one in self.sets.values())

    async def start(self) -> None:
        """Start every replica. Raises what kept one from starting."""
        await all_of(*(replicas.start() for replicas in self.sets.values()))

    def refill(self) -> None:
        """Bring up what was lost while no restart was left, where there is one now."""
        for replicas in self.sets.values():
            replicas.refill()

    def grow(self) -> None:
        """Bring more rollout replicas up where the cluster has room and the run may have them."""
        if most := self._config.rollout.max_replicas:
            self.rollouts.grow(most, self._room_for_rollout)

    async def close(self) -> None:
        """Stop every replica; those that hold what they free at their end have their time for it.
        One that fails at that is stopped as well."""

        async def leave(name: str, handle: ActorHandle, seconds: float) -> None:
            await answer(handle.close.remote(), name, "close", seconds)

        leaving = [
            leave(replica.name, self.sets[role].handles[replica.name], seconds)
            for role, seconds in self._leaving.items()
            for replica in self.sets[role].replicas.serving
        ]
        await asyncio.gather(*leaving, return_exceptions=True)
        for replicas in self.sets.values():
            await replicas.close()
