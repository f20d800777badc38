"""RolloutActor: one replica that makes groups of what its engine samples.

The actor adds to its engine what a remote role needs: completions become a group, a call that is
repeated while its first try still runs joins it, a call that nobody waits for any more ends its
generation, and an engine that is dead takes the process with it, so that a live actor replaces it
instead of a mute one staying.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from actors.engines.base import (
    EngineDead,
    ReachedEngine,
    RolloutEngine,
    Turn,
    WeightMismatch,
    Work,
    engine_seed,
    resolve_engine,
)
from actors.groups import Group, pack_group
from actors.liveness import Alive
from actors.messages import Completion, GroupSampling, Prompt
from actors.specs import ModelSpec, RolloutSpec
from actors.transfer.base import Refused, Sent
from actors.transfer.bundle import WeightBundle
from actors.transfer.delta import WeightDelta
from actors.transfer.held import Held, OtherBase
from actors.whereabouts import whereabouts

WATCH_SECONDS = 2.0

_Key = tuple[int, bytes, GroupSampling]  # policy version, prompt, and what is drawn for which group


@dataclass
class _Call:
    """One generation, and how many callers wait for it."""

    task: asyncio.Task[Group]
    waiters: int = 0


class RolloutActor(Alive):
    """One rollout replica; wrapped by `ray.remote` where it is placed.

    It needs as many concurrent calls as groups in flight, and some more for updates.
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
        engine = resolve_engine(spec)
        if spec.weight_sync.engine not in (None, engine.name):
            raise ValueError(
                f"rollout.weight_sync={spec.weight_sync.name} needs rollout.engine="
                f"{spec.weight_sync.engine}, and here it is {engine.name}; install "
                f"{spec.weight_sync.engine}, or use rollout.weight_sync=full"
            )
        self._engine_name, self._package = engine.name, engine.package
        spec = spec.model_copy(update={"engine": engine})
        sequences = spec.max_concurrent_groups * completions
        self._engine = _engine(model, spec, version, sequences, engine_seed(seed, replica))
        self._replica = replica
        self._calls: dict[_Key, _Call] = {}
        self._watching: asyncio.Task[None] | None = None
        self._held = Held()
        self._loading = asyncio.Lock()

    async def start(self) -> dict[str, Any]:
        """Load the model; returns engine name and version, where it runs, policy version, and how
        many groups it may be given at a time."""
        started = time.monotonic()
        await self._engine.start()
        self._watching = asyncio.create_task(self._watch())
        return {
            "replica": self._replica,
            "engine": self._engine_name,
            "engine_version": _installed_version(self._package),
            **whereabouts(),
            "version": self._engine.version,
            "max_concurrent_groups": self._engine.max_concurrent_groups,
            "seconds": time.monotonic() - started,
        }

    async def generate(self, prompt: Prompt, sampling: GroupSampling) -> Group:
        """One group: its record and its tensors (call with `num_returns=2`).

        Idempotent per group and policy version: a call repeated while the first one runs gets the
        first one's group.
        """
        key = (self._engine.version, prompt.token_ids.tobytes(), sampling)
        call = self._calls.get(key)
        if call is None:
            call = _Call(asyncio.ensure_future(self._group(prompt, sampling)))
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

    async def _group(self, prompt: Prompt, sampling: GroupSampling) -> Group:
        """A group of one turn of text."""
        started, before = time.monotonic(), self._engine.work
        n = sampling.completions
        key = f"{sampling.seed}/{sampling.group_id}"
        completions = await self._engine.sample(prompt.token_ids, sampling, n, key)
        if len(completions) != n:
            raise RuntimeError(
                f"group {sampling.group_id}: the engine returned {len(completions)} completions "
                f"of {n}"
            )
        seconds = time.monotonic() - started
        return pack_group(
            sampling.group_id,
            prompt.token_ids,
            [[completion] for completion in completions],
            seconds,
            self._replica,
            self._engine.work.since(before, seconds),
        )

    async def sample(self, turns: Sequence[Turn]) -> list[Completion]:
        """An answer of the model for each of `turns`, which are sampled together.

        Not remembered: whoever asks again has it sampled again.
        """
        try:
            return await self._engine.sample_turns(turns)
        except EngineDead as error:
            self._die(error)

    async def work(self) -> Work:
        """What the engine has done since its start."""
        return self._engine.work

    async def load_weights(self, *weights: WeightBundle | WeightDelta) -> float | Refused:
        """Serve under what `weights` make, one on top of the other, from now on. May be repeated.

        Returns seconds in which generation stood still, or that it needs a whole version: then
        nothing has changed.
        """
        async with self._loading:
            try:
                bundle = await asyncio.to_thread(self._held.take, weights)
            except OtherBase as other:
                return Refused(self._replica, str(other))
            try:
                return await self._engine.load_weights(bundle)
            except EngineDead as error:
                self._die(error)

    async def receive_weights(self, sent: Sent) -> float | Refused:
        """Serve under the weights that the policy's ranks send, from now on; seconds in which
        generation stood still. One that is not sent them has changed nothing.

        An engine that did not get all of them is in pieces, so the actor ends with it.
        """
        async with self._loading:
            arrival = sent.arrival(self._replica)
            if arrival is None:
                return Refused(self._replica, f"version {sent.version} was not sent to it")
            try:
                return await cast(ReachedEngine, self._engine).load_weights(arrival)
            except (EngineDead, WeightMismatch) as error:
                self._die(error)

    async def ping(self) -> int:  # type: ignore[override]
        """As every actor's, once the engine's processes have answered too."""
        await self._engine.answers()
        return self._engine.work.steps

    async def close(self) -> None:
        """Free what the engine holds; the actor serves no more."""
        if self._watching is not None:
            self._watching.cancel()
        await self._engine.close()
        self._held.close()

    def _end(self, key: _Key, call: _Call) -> None:
        """Forget a call that nobody waits for; where it still runs, its waiters were cancelled."""
        call.task.cancel()
        del self._calls[key]

    async def _watch(self) -> None:
        """End with the engine, also where a call to it would wait for ever: vLLM does not answer
        the first one after its process is gone."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                await self._engine.check()
            except EngineDead as error:
                self._die(error)

    def _die(self, error: EngineDead | WeightMismatch) -> NoReturn:
        """End the process at once: a retry must meet a new actor, not this one."""
        print(f"rollout replica {self._replica} ends: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _engine(
    model: ModelSpec, spec: RolloutSpec, version: int, sequences: int, seed: int
) -> RolloutEngine:
    """The engine that `spec` names, given up to `sequences` at a time; only its own framework is
    imported."""
    module, _, name = spec.engine.implementation.partition(":")
    made = getattr(importlib.import_module(module), name)
    return cast(RolloutEngine, made(model, spec, version, sequences, seed))


def _installed_version(package: str) -> str:
    return str(importlib.import_module(package).__version__)
