"""RolloutActor: one replica that generates groups, over the engine that its settings name.

The actor adds to its engine what a remote role needs: a call that is repeated while its first try
still runs joins it, a call that nobody waits for any more ends its generation, and an engine that
is dead takes the process with it, so that a live actor replaces it instead of a mute one staying.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass
from typing import Any, NoReturn

from actors.engines.base import EngineDead, Group, RolloutEngine, engine_seed, resolve_engine
from actors.messages import Prompt, Sampling
from actors.specs import ModelSpec, RolloutSpec
from actors.weights import WeightBundle
from actors.whereabouts import whereabouts

WATCH_SECONDS = 2.0

_Key = tuple[int, bytes, Sampling]  # policy version, prompt, and what is drawn for which group


@dataclass
class _Call:
    """One generation, and how many callers wait for it."""

    task: asyncio.Task[Group]
    waiters: int = 0


class RolloutActor:
    """One rollout replica; wrapped by `ray.remote` where it is placed.

    It needs as many concurrent calls as groups in flight, and some more for pings and updates.
    """

    def __init__(
        self,
        model: ModelSpec,
        spec: RolloutSpec,
        replica: str,
        version: int,
        completions: int,
        seed: int,
    ) -> None:
        """Nothing is loaded before `start`.

        Args:
            model: what to load; its adapters and checkpointing settings do not matter here.
            spec: generation settings.
            replica: the replica's name, for records and logs.
            version: the policy version of the weights in `model.name`; the caller sends newer ones.
            completions: of a group, at most.
            seed: the run's, for an engine whose draws are not seeded one by one.

        Raises:
            ValueError: an engine that is not installed, or options it does not take.
        """
        self._engine_name = resolve_engine(spec.engine)
        self._engine = _engine(self._engine_name, model, spec, replica, version, completions, seed)
        self._replica = replica
        self._calls: dict[_Key, _Call] = {}
        self._watching: asyncio.Task[None] | None = None
        self._busy_seconds = 0.0
        self._busy_since = 0.0

    async def start(self) -> dict[str, Any]:
        """Load the model; returns engine name and version, where it runs, policy version, and how
        many groups it may be given at a time."""
        started = time.monotonic()
        await self._engine.start()
        self._watching = asyncio.create_task(self._watch())
        return {
            "replica": self._replica,
            "engine": self._engine_name,
            "engine_version": _installed_version(self._engine_name),
            **whereabouts(),
            "version": self._engine.version,
            "groups_at_once": self._engine.groups_at_once,
            "seconds": time.monotonic() - started,
        }

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Group:
        """One group: its record and its tensors (call with `num_returns=2`).

        Idempotent per group and policy version: a call repeated while the first one runs gets the
        first one's group.
        """
        key = (self._engine.version, prompt.token_ids.tobytes(), sampling)
        call = self._calls.get(key)
        if call is None:
            if not self._calls:
                self._busy_since = time.monotonic()
            call = _Call(asyncio.ensure_future(self._engine.generate(prompt, sampling)))
            self._calls[key] = call
        call.waiters += 1
        try:
            return await asyncio.shield(call.task)
        except EngineDead as error:
            self._die(error)
        finally:
            call.waiters -= 1
            if call.waiters == 0:
                self._end(key, call)

    async def load_weights(self, bundle: WeightBundle) -> float:
        """Serve under `bundle` from now on; returns the seconds that took. May be repeated."""
        started = time.monotonic()
        try:
            await self._engine.load_weights(bundle)
        except EngineDead as error:
            self._die(error)
        return time.monotonic() - started

    async def ping(self) -> int:
        """The policy version served, from a replica that can serve."""
        try:
            await self._engine.check()
        except EngineDead as error:
            self._die(error)
        return self._engine.version

    async def stats(self) -> dict[str, float]:
        """The engine's counters, groups in flight, and the seconds with at least one in flight."""
        busy = self._busy_seconds
        if self._calls:
            busy += time.monotonic() - self._busy_since
        return {
            **self._engine.stats(),
            "groups_in_flight": float(len(self._calls)),
            "busy_seconds": busy,
        }

    async def close(self) -> None:
        """Free what the engine holds; the actor serves no more."""
        if self._watching is not None:
            self._watching.cancel()
        await self._engine.close()

    def _end(self, key: _Key, call: _Call) -> None:
        """Forget a call that nobody waits for; where it still runs, its waiters were cancelled."""
        call.task.cancel()
        del self._calls[key]
        if not self._calls:
            self._busy_seconds += time.monotonic() - self._busy_since

    async def _watch(self) -> None:
        """End with the engine, also where a call to it would wait for ever: vLLM does not answer
        the first one after its process is gone."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await self._engine.check()
            except EngineDead as error:
                self._die(error)

    def _die(self, error: EngineDead) -> NoReturn:
        """End the process at once: a retry must meet a new actor, not this one."""
        print(f"rollout replica {self._replica} ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _engine(
    name: str,
    model: ModelSpec,
    spec: RolloutSpec,
    replica: str,
    version: int,
    completions: int,
    seed: int,
) -> RolloutEngine:
    """Engine `name`; only its own framework is imported."""
    if name == "vllm":
        from actors.engines.vllm import VLLMEngine

        sequences = spec.max_concurrent_groups * completions
        return VLLMEngine(model, spec, replica, version, sequences, engine_seed(seed, replica))
    from actors.engines.transformers import TransformersEngine

    return TransformersEngine(model, spec, replica, version)


def _installed_version(package: str) -> str:
    import importlib

    return str(importlib.import_module(package).__version__)
