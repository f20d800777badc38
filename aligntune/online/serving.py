"""The replicas that serve a run: rollouts under the current weights, rewards, reference log-probs.

Invariant: a rollout replica takes no group before it has the weights of the current version, and is
never left with older ones than the last `sync` brought, whenever it started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ray.actor import ActorHandle

from actors.specs import ReferenceSpec, RewardActorSpec, RolloutSpec
from actors.supervise import ObjectsLost, ReplicaLost, ReplicaSet, answer
from aligntune.config.online import RunConfig
from aligntune.online.learner import PolicyLost, Weights
from aligntune.online.roles import Roles


class Serving:
    """The replica sets of one run.

    `event(kind, **fields)` hears of losses and restarts, `said(name, info)` what a replica says of
    itself as it starts, and `wake()` is called when the policy has to be rebuilt: see `lost`.
    """

    def __init__(
        self,
        config: RunConfig,
        roles: Roles,
        event: Callable[..., None],
        said: Callable[[str, Mapping[str, Any]], None],
        wake: Callable[[], None],
    ) -> None:
        self._config = config
        self._event = event
        self._said = said
        self._wake = wake
        self._room_for_rollout = roles.room_for_rollout
        self._weights: Weights | None = None  # None: the starting model, which is version 0
        self._renewed = asyncio.Event()
        self.lost: str | None = None  # why the current weights, and so the policy, are gone
        rollout, reward, reference = config.rollout, config.reward, config.reference
        self.rollouts = self._set(
            "rollout", rollout, roles.rollout, rollout.max_concurrent_groups, self._with_weights
        )
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
        prepare: Callable[[ActorHandle, str], Awaitable[int | None]] | None = None,
    ) -> ReplicaSet:
        async def start(handle: ActorHandle, name: str) -> None:
            info = await answer(handle.start.remote(), name, "start", spec.start_timeout_s)
            self._said(name, info)

        return ReplicaSet(
            role,
            spec.replicas,
            make,
            prepare or start,
            slots=slots,
            max_restarts=spec.max_restarts,
            event=self._event,
        )

    @property
    def synced(self) -> bool:
        """Whether rollouts serve under weights of the policy's, not of the starting model."""
        return self._weights is not None

    async def start(self) -> None:
        """Start every replica. Raises what kept one from starting."""
        sets = (self.rollouts, self.rewards, self.references)
        await asyncio.gather(*(replicas.start() for replicas in sets if replicas is not None))

    async def sync(self, weights: Weights) -> None:
        """Bring new weights to every rollout replica, and more replicas up where there is room.

        Raises PolicyLost where the weights are gone again.
        """
        rollout = self._config.rollout
        self._weights, self.lost = weights, None
        self._renewed.set()
        self._renewed = asyncio.Event()
        try:
            await self.rollouts.broadcast(
                "load_weights", weights.bundle, deadline_s=rollout.generation_timeout_s
            )
        except ObjectsLost as lost:  # with the node of the rank that exported them
            raise PolicyLost(f"the weights of version {weights.version}: {lost}") from lost
        if rollout.max_replicas:
            self.rollouts.grow(rollout.max_replicas, self._room_for_rollout)

    async def close(self) -> None:
        """Stop every replica."""
        for replicas in (self.rollouts, self.rewards, self.references):
            if replicas is not None:
                await replicas.close()

    async def _with_weights(self, handle: ActorHandle, name: str) -> int:
        """Start a rollout replica with the current weights; how many groups it takes at a time."""
        deadline = self._config.rollout.start_timeout_s
        info = await answer(handle.start.remote(), name, "start", deadline)
        self._said(name, info)
        loaded: Weights | None = None
        while self._weights is not loaded:  # newer ones may come while these are loaded
            weights = self._weights
            assert weights is not None, "weights were exported once and are never unset"
            bundle = weights.bundle
            try:
                await answer(handle.load_weights.remote(bundle), name, "load_weights", deadline)
            except ObjectsLost as lost:
                if self._weights is weights:
                    await self._after(weights, str(lost), name, deadline)
                continue
            loaded = weights
        return int(info["groups_at_once"])

    async def _after(self, gone: Weights, reason: str, name: str, deadline_s: float) -> None:
        """Weights are gone with the node they were exported on, and so is the policy: have it
        rebuilt, and wait for what it exports then."""
        self.lost = f"the weights of version {gone.version}: {reason}"
        self._wake()
        end = time.monotonic() + deadline_s
        while self._weights is gone:
            try:
                await asyncio.wait_for(self._renewed.wait(), end - time.monotonic())
            except TimeoutError as error:
                raise ReplicaLost(name, f"no weights within {deadline_s:g} s: {reason}") from error
