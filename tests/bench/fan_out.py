"""What the driver costs a group with real Ray calls, and with 1 to 64 replicas.

calls      the real loop over Ray actors that do nothing, beside bare calls of one: driver
           CPU, with that of Ray's own threads, least of 5 rounds; a group is two calls, each of
           two returns
replicas   the real loop over stand-ins (`control`): driver CPU a group with 1 to 64 replicas
efficiency seconds in which every slot makes one group, with 1 to 64 replicas, on a virtual clock
           (`virtual`): what stands still for the loop's sake

    python -m tests.bench fan_out           also as: make bench NAME=fan_out
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.messages import GroupRecord, GroupSampling, Prompt, Scores
from tests.bench import control, virtual
from tests.bench.control import Run
from tests.bench.report import Measured, Target

GROUPS, IN_FLIGHT, ROUNDS = 512, 32, 5
REPLICAS = (1, 4, 16, 64)
SLOTS = 4  # of a simulated replica
PROMPT = Prompt(0, "a", "a", np.array([1]))
SAMPLING = GroupSampling(max_tokens=64, temperature=1.0, completions=4, seed=0, group_id=0)


class Nothing:
    """A rollout or reward actor that answers at once, in a process of its own."""

    def __init__(self) -> None:
        self._actor = control.Actor()

    async def start(self) -> dict[str, Any]:
        """As a role's."""
        return {}

    async def ping(self) -> int:
        """As a role's."""
        return 0

    async def nothing(self) -> None:
        """A bare call."""

    async def generate(self, prompt: Prompt, sampling: GroupSampling) -> tuple[GroupRecord, int]:
        """As a rollout's."""
        return self._actor._generate(prompt, sampling)

    async def score(self, prompt: Prompt, group_id: int) -> tuple[Scores, tuple[str, ...]]:
        """As a reward's."""
        return self._actor._score(prompt, group_id)

    async def load_weights(self, _: Any) -> float:
        """As a rollout's."""
        control.Actor.version += 1
        return 0.1


def microseconds(work: Callable[[], Any], count: int) -> float:
    """Driver CPU of one of `count`."""
    gc.collect()
    began = time.process_time()
    work()
    return (time.process_time() - began) / count * 1e6


def bare(call: Callable[[], Any], count: int) -> None:
    """So many calls, `IN_FLIGHT` at a time."""

    async def worker() -> None:
        for _ in range(count // IN_FLIGHT):
            await call()

    async def workers() -> None:
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))

    asyncio.run(workers())


def on_ray() -> dict[str, list[float]]:
    """Driver CPU of a group in the loop, and of bare calls, in microseconds, by turns."""
    remote = ray.remote(max_concurrency=1000, num_cpus=0)(Nothing)
    seen: dict[str, list[float]] = {}
    actor = remote.remote()
    ray.get(actor.nothing.remote())

    def maker(role: Any) -> Callable[[int, str], Any]:
        if role.name == "policy":  # no call of a group
            return lambda index, name: control.Actor()
        return lambda index, name: remote.remote()

    def like_a_rollout() -> Any:
        return actor.generate.options(num_returns=2).remote(PROMPT, SAMPLING)[0]

    for _ in range(ROUNDS):
        found = {
            "bare": microseconds(lambda: bare(actor.nothing.remote, GROUPS), GROUPS),
            "bare_of_two_returns": microseconds(lambda: bare(like_a_rollout, GROUPS), GROUPS),
        }
        with tempfile.TemporaryDirectory(prefix="bench-fan-out-") as folder:
            run = Run(Path(folder), GROUPS, 2, 0, maker)
            found["group"] = microseconds(run.go, 2 * GROUPS)
        for name, value in found.items():
            seen.setdefault(name, []).append(value)
    return seen


def with_replicas(replicas: int) -> float:
    """Driver CPU of a group with so many simulated replicas, in microseconds."""
    settings = {"replicas": replicas, "max_concurrent_groups": SLOTS}
    with tempfile.TemporaryDirectory(prefix="bench-fan-out-") as folder:
        run = Run(Path(folder), 256, 4, 1, rollout=settings)
        return microseconds(run.go, run.groups)


def seconds_a_wave(replicas: int) -> float:
    """Virtual seconds in which every slot of the replicas makes one group of 1 second."""
    per_step, steps = 2 * SLOTS * replicas, max(4, 32 // replicas)
    seen = virtual.run(
        virtual.Times(lambda group: 1.0, lambda step: 0.1),
        per_step,
        steps,
        1,
        {"replicas": replicas, "max_concurrent_groups": SLOTS},
    )
    return seen.starts[-1] * SLOTS * replicas / (per_step * steps)


def measure() -> Measured:
    """All three."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        rounds = on_ray()
    finally:
        ray.shutdown()
    figures = {f"us/{name}": min(each) for name, each in rounds.items()}  # the least disturbed
    figures["over_bare/a_call"] = figures["us/group"] / (2 * figures["us/bare"])
    figures["over_bare/a_call_of_two_returns"] = figures["us/group"] / (
        2 * figures["us/bare_of_two_returns"]
    )
    simulated: dict[int, list[float]] = {}
    for _ in range(ROUNDS):
        for replicas in REPLICAS:
            simulated.setdefault(replicas, []).append(with_replicas(replicas))
    medians = {replicas: statistics.median(each) for replicas, each in simulated.items()}
    figures |= {f"us_a_group/{replicas}_replicas": each for replicas, each in medians.items()}
    figures["us_a_group/64_over_1"] = medians[64] / medians[1]
    waves = {replicas: seconds_a_wave(replicas) for replicas in REPLICAS}
    figures |= {f"seconds_a_wave/{replicas}_replicas": each for replicas, each in waves.items()}
    figures["lost_at_64_replicas"] = 1 - waves[1] / waves[64]
    targets = (
        Target("over_bare/a_call_of_two_returns", 2.0),
        Target("us_a_group/64_over_1", 1.3),
        Target("lost_at_64_replicas", 0.05),
    )
    return Measured(figures, targets, {"rounds_us": rounds, "replicas_us": simulated})
