"""Whether a run fits: each role in its place, the bytes on every device, seconds of a step.

Pure, and the ground that the plan and what it advises stand on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cluster.bundles import bundle_sets
from cluster.gpus import GpuType, gpu_type
from cluster.placement import Placement, Shortage, place
from cluster.plan.durations import Rates, Times, times
from cluster.plan.memory import (
    GIB,
    KINDS,
    Memory,
    frozen_memory,
    rollout_memory,
    row_bytes,
    trained_memory,
)
from cluster.plan.work import Work
from cluster.resources import Cluster
from cluster.tables import UnknownName


@dataclass(frozen=True)
class Use:
    """One device, or the memory of one node, and who is on it."""

    node: int
    device: int | None  # None: the host's memory
    occupants: tuple[tuple[str, int], ...]  # (role, replica)
    bytes: int
    capacity: int | None  # None: not known, so not checked


@dataclass(frozen=True)
class Draft:
    """Placement and memory, before the question whether they fit."""

    placement: Placement
    memory: dict[str, Memory]
    uses: tuple[Use, ...]


def gpu_of(role: str, placement: Placement, cluster: Cluster) -> GpuType | None:
    """The slowest GPU that the role is on, with the least memory of all; None where it has none.

    Raises UnknownName where a GPU's type is not known.
    """
    names = {
        cluster.nodes[slot.node].gpu: cluster.nodes[slot.node].name
        for slot in placement.slots[role]
        if slot.devices
    }
    if None in names:
        raise UnknownName(
            f"the GPUs of {names[None]} are of no type that is known by Ray's name of them, and "
            "nvidia-smi there did not tell their memory; say what they are like with --gpu NAME"
        )
    kinds = [gpu_type(name) for name in names if name is not None]
    if not kinds:
        return None
    slowest = min(kinds, key=lambda kind: kind.flops)
    return replace(slowest, memory_bytes=min(kind.memory_bytes for kind in kinds))


def draft_of(work: Work, cluster: Cluster, placement: Placement) -> Draft:
    """What a placed run takes. Raises UnknownName where a GPU's type is not known."""
    gpus = {role: gpu_of(role, placement, cluster) for role in placement.slots}
    memory = memory_of(work, {role: gpu for role, gpu in gpus.items() if gpu is not None})
    return Draft(placement, memory, tuple(_uses(work, cluster, placement, memory)))


def memory_of(work: Work, gpus: Mapping[str, GpuType]) -> dict[str, Memory]:
    """What a replica of each role with a model keeps; `gpus` by role, for those on one."""
    memory = {one.role: trained_memory(one, one.role in gpus) for one in work.trained}
    memory["rollout"] = rollout_memory(work.rollout, work.step, gpus.get("rollout"))
    for frozen in work.frozen:
        more = frozen_memory(frozen, frozen.role in gpus)
        memory[frozen.role] = _both(memory.get(frozen.role), more)
    return memory


def _both(first: Memory | None, second: Memory) -> Memory:
    """Two models of one replica; it has one framework."""
    if first is None:
        return second
    device = {kind: first.device.get(kind, 0) + second.device.get(kind, 0) for kind in KINDS}
    return Memory({**device, "framework": second.device["framework"]}, on_gpu=second.on_gpu)


def _uses(
    work: Work, cluster: Cluster, placement: Placement, memory: Mapping[str, Memory]
) -> Iterator[Use]:
    """Every device and host with somebody on it, by node and device, the host last."""
    on: dict[tuple[int, int], list[tuple[str, int]]] = {}
    hosts: dict[int, list[tuple[str, int]]] = {}
    filled: dict[int, int] = {}
    bundle = work.policy.shape.parameters * work.policy.dtype_bytes
    versions = 2 if work.rollout.takes_changes else 1  # a whole one, and changes up to as much
    trained = {one.role for one in work.trained}
    peaks = {role: needs.peak for role, needs in memory.items()}
    for role in (request.role for request in work.requests):
        slots, needs = placement.slots[role], memory.get(role)
        beside = needs.host_bytes if needs else 0
        fewer = needs.of_rank_0 if needs and role in trained else 0
        for index, (node, devices) in enumerate(slots):
            for device in devices:
                on.setdefault((node, device), []).append((role, index))
            here = (beside if devices else peaks.get(role, 0)) - (fewer if index else 0)
            if here or not devices:
                hosts.setdefault(node, []).append((role, index))
            filled[node] = filled.get(node, 0) + here
    for node in _stores(placement):
        filled[node] = filled.get(node, 0) + versions * bundle
        hosts.setdefault(node, [])
    for (node, device), occupants in sorted(on.items()):
        kind = cluster.nodes[node].gpu
        capacity = gpu_type(kind).memory_bytes if kind else None
        yield Use(
            node,
            device,
            tuple(occupants),
            sum(peaks.get(role, 0) for role, _ in occupants),
            capacity,
        )
    for node, occupants in sorted(hosts.items()):
        capacity = cluster.nodes[node].memory_bytes
        yield Use(node, None, tuple(occupants), filled[node], capacity)


def _stores(placement: Placement) -> set[int]:
    """Nodes whose object store holds a version's weights: of rank 0 and of every rollout."""
    return {placement.slots["policy"][0].node, *(s.node for s in placement.slots["rollout"])}


@dataclass(frozen=True)
class Short:
    """The device that is short by the most, and the roles on it, that which takes most first."""

    use: Use
    roles: tuple[str, ...]
    by: int
    cache: bool = False  # the KV cache does not hold one sequence


def shortest(draft: Draft, work: Work) -> Short | None:
    """What is short the most; None where everything fits."""
    worst: Short | None = None
    for use in draft.uses:
        if use.capacity is None or use.bytes <= use.capacity:
            continue
        by = use.bytes - use.capacity
        if worst is None or by > worst.by:
            there = dict.fromkeys(role for role, _ in use.occupants if role in draft.memory)
            roles = sorted(there, key=lambda role: -draft.memory[role].peak)
            worst = Short(use, tuple(roles) or ("policy",), by)
    if worst is None:
        return _short_cache(draft, work)
    return worst


def _short_cache(draft: Draft, work: Work) -> Short | None:
    """vLLM takes no more than its share, so what is short shows in its cache."""
    if work.rollout.engine != "vllm":
        return None
    needed = row_bytes(work.rollout, work.step.row)
    have = draft.memory["rollout"].device["KV cache"]
    if have >= needed:
        return None
    use = next(u for u in draft.uses if any(role == "rollout" for role, _ in u.occupants))
    return Short(use, ("rollout",), needed - have, cache=True)


def excess(work: Work, cluster: Cluster) -> int | None:
    """Bytes short on the worst device; 0 where it fits, None where it surely has no place."""
    if alone := _excess_alone(work, cluster):
        return alone  # whatever the place, and much quicker to find
    draft = try_draft(work, cluster)
    if draft is None:
        return None
    short = shortest(draft, work)
    return short.by if short else 0


def _excess_alone(work: Work, cluster: Cluster) -> int:
    """By how much the largest role on a GPU exceeds the largest GPU of the cluster, by itself."""
    kinds = [gpu_type(name) for name in {node.gpu for node in cluster.nodes} if name is not None]
    largest = max(kinds, key=lambda kind: kind.memory_bytes, default=None)
    on_gpu = {request.role for request in work.requests if request.gpus}
    if largest is None or not on_gpu:
        return 0
    memory = memory_of(work, dict.fromkeys(on_gpu, largest))
    peaks = (memory[role].peak for role in on_gpu if role in memory)  # a function has no model
    return max(0, max(peaks, default=0) - largest.memory_bytes)


def try_draft(work: Work, cluster: Cluster) -> Draft | None:
    """A draft of an option; None where it has no place."""
    found = place(bundle_sets(work.requests, work.colocate), cluster, advice=False)
    return None if isinstance(found, Shortage) else draft_of(work, cluster, found)


def rates_of(placement: Placement, work: Work, cluster: Cluster) -> dict[str, Rates]:
    """What the device of each role with a model does in a second, in that place."""
    rates = {}
    cpus = {request.role: work.threads.get(request.role, request.cpus) for request in work.requests}
    for role, dtype_bytes in {one.role: one.dtype_bytes for one in work.models}.items():
        gpu = gpu_of(role, placement, cluster)
        rates[role] = Rates.of_gpu(gpu, dtype_bytes) if gpu else Rates.of_cpu(cpus[role])
    return rates


def times_of(draft: Draft, work: Work, cluster: Cluster) -> Times:
    """Seconds of the parts of a step, in that place."""
    slots = draft.placement.slots
    rates = rates_of(draft.placement, work, cluster)
    spans = {role: len({slot.node for slot in slots[role]}) for role in rates}
    far = len({slot.node for slot in slots["rollout"]} - {slots["policy"][0].node})
    shared = {
        tuple(role for role, _ in use.occupants) for use in draft.uses if use.device is not None
    }
    return times(work, rates, draft.memory, spans, far, map(Counter, shared))


def gib(amount: float) -> str:
    """Bytes for people."""
    if abs(amount) >= 0.1 * GIB:
        return f"{amount / GIB:.1f} GiB"
    return f"{amount / 2**20:.1f} MiB"
