"""The replicas that serve a run: rollouts, rewards, reference log-probs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray.actor import ActorHandle

from actors.specs import ReferenceSpec, RewardActorSpec, RolloutSpec
from actors.supervise import ReplicaSet, answer
from actors.waiting import all_of
from aligntune.config.online import RunConfig
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
        self._event = event
        self._said = said
        self._replica_set = replica_set
        self._most_rollouts = config.rollout.max_replicas
        self._room_for_rollout = roles.room_for_rollout
        rollout, reward, reference = config.rollout, config.reward, config.reference
        slots = rollout.max_concurrent_groups
        self.rollouts = self._set("rollout", rollout, roles.rollout, slots, catch_up)
        self.rewards = self._set("reward", reward, roles.reward, reward.max_concurrent_groups)
        self.references: ReplicaSet | None = None
        if config.algorithm.needs.reference:
            self.references = self._set("reference", reference, roles.reference, slots=2)

    def _set(
        self,
        role: str,
        spec: RolloutSpec | RewardActorSpec | ReferenceSpec,
        make: Callable[[int, str], ActorHandle],
        slots: int,
        catch_up: CatchUp | None = None,
    ) -> ReplicaSet:
        async def start(handle: ActorHandle, name: str) -> int | None:
            """Start a replica; how many groups it takes at a time, where it says so."""
            limit = f"{role}.start_timeout_s"
            info = await answer(handle.start.remote(), name, "start", spec.start_timeout_s, limit)
            self._said(name, info)
            if catch_up is not None:
                await catch_up(handle, name)
            return info.get("groups_at_once")

        return self._replica_set(
            role,
            spec.replicas,
            make,
            start,
            slots=slots,
            max_restarts=spec.max_restarts,
            event=self._event,
        )

    async def start(self) -> None:
        """Start every replica. Raises what kept one from starting."""
        sets = (self.rollouts, self.rewards, self.references)
        await all_of(*(replicas.start() for replicas in sets if replicas is not None))

    def grow(self) -> None:
        """Bring more rollout replicas up where the cluster has room and the run may have them."""
        if self._most_rollouts:
            self.rollouts.grow(self._most_rollouts, self._room_for_rollout)

    async def close(self) -> None:
        """Stop every replica."""
        for replicas in (self.rollouts, self.rewards, self.references):
            if replicas is not None:
                await replicas.close()
