"""What roles take of a cluster where a config leaves it open, by the plan's numbers. Pure.

Invariant: what is not open is never changed; what is chosen has a place and fits the memory as a
plan counts it, or DoesNotFit says what is short. The same question has the same answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cluster.bundles import BadRequest, RoleRequest
from cluster.placement import DoesNotFit
from cluster.plan.candidates import ANY_ROOM, BUDGETS, Search
from cluster.plan.durations import Rates, group_seconds
from cluster.plan.fit import memory_of, shortest, times_of, try_draft
from cluster.plan.memory import GIB, row_bytes
from cluster.plan.plan import make_plan
from cluster.plan.variants import Candidate, count_path, variants, with_dtype, with_request
from cluster.plan.work import Trained, Work
from cluster.resources import Cluster
from cluster.tables import UnknownName

HEADROOM = 0.95  # of a GPU's memory is planned with; all of it where nothing fits otherwise
ENOUGH = 1.05  # a step that takes at most this of the best one's time
FEWER = 0.75  # is taken where it needs at most this of the best one's GPUs
CPU_BUDGET = 4096  # tokens of a micro-batch: the caches of a CPU hold no more
TRIES = 50
CACHE = "rollout.engine.kv_cache_gib"
WAIT = "rollout.generation_timeout_s"
SLOWER = 2  # than by the plan a replica may be before it is taken for one that hangs
FEW_CPUS = 0.25  # of a replica, where a cluster has too few for one each
NOWHERE = (
    "no arrangement of the roles was found on this cluster; where ranks, replicas, resources or "
    "cluster.colocate are set, leave them out"
)


@dataclass(frozen=True)
class Decided:
    """A setting by its key, and why it is what it is."""

    path: str
    value: Any
    why: str


@dataclass(frozen=True)
class Choice:
    """The work with nothing left open, and what was decided, in the order of the config."""

    work: Work
    decided: tuple[Decided, ...]


def choose(work: Work, open_: frozenset[str], cluster: Cluster, cores: int) -> Choice:
    """The fastest step that fits by the plan, on the fewest GPUs that give it.

    Args:
        open_: keys of the config that nobody has set.
        cores: processors of the node with the fewest, for threads where there is no GPU.

    Raises:
        DoesNotFit: one line: what is short, by how much, and what would fit.
        BadRequest: see `bundle_sets`.
        UnknownName: GPUs whose type is not known, and a role that may have some of them or none.
    """
    wanted = any(
        f"{one.role}.resources.gpus" in open_
        or any(r.gpus > 0 for r in work.requests if r.role == one.role)
        for one in work.models
    )
    if not wanted or not any(node.gpus >= 1 for node in cluster.nodes):
        return _on_cpus(work, open_, cluster, cores)
    if unknown := [node.name for node in cluster.nodes if node.gpus >= 1 and node.gpu is None]:
        return _as_it_is(work, open_, unknown[0])
    for room, offload in ((HEADROOM, False), (HEADROOM, True), (1.0, False), (1.0, True)):
        search = Search(work, open_, cluster, room, offload)
        found = sorted(search.candidates(), key=lambda one: (one.seconds, one.gpus, -one.budget))
        for cpus in (None, FEW_CPUS):
            if best := _first(_with_cpus(found, open_, cpus), cluster):
                within = [
                    one
                    for one in found
                    if one.seconds <= ENOUGH * best.seconds and one.gpus <= FEWER * best.gpus
                ]
                within.sort(key=lambda one: (one.gpus, one.seconds, -one.budget))
                chosen = _first(_with_cpus(within, open_, cpus), cluster) or best
                return Choice(chosen.work, tuple(_decided(chosen, open_, search)))
    return _last(work, open_, cluster)


def _as_it_is(work: Work, open_: frozenset[str], node: str) -> Choice:
    """Everything as where there is no GPU, if all roles are told how many they have. Raises
    UnknownName where one is not."""
    keys = dict.fromkeys(f"{one.role}.resources.gpus" for one in work.models)
    if left := [key for key in keys if key in open_]:
        raise UnknownName(
            f"the GPUs of {node} are of no type that is known by Ray's name of them, and no "
            "nvidia-smi there told their memory in time, so what the config leaves open cannot be "
            f"decided by it; set {', '.join(left)} (0 trains without a GPU, as in "
            "policy.resources.gpus=0)"
        )
    made = _decided(Candidate(0.0, 0, work, 0), open_, None)
    why = "as without a GPU, for the type of these is not known"
    return Choice(work, tuple(replace(one, why=why) for one in made))


def _with_cpus(
    found: Iterable[Candidate], open_: frozenset[str], cpus: float | None
) -> Iterator[Candidate]:
    """The candidates with that many CPUs a replica, where they are open."""
    for one in found:
        changed = one.work
        for request in one.work.requests if cpus is not None else ():
            if f"{request.role}.resources.cpus" in open_:
                changed = with_request(changed, request.role, cpus=min(request.cpus, cpus or 1.0))
        yield one._replace(work=changed)


def _first(found: Iterable[Candidate], cluster: Cluster) -> Candidate | None:
    """The first that has a place and fits, with the seconds of that place."""
    for one in found:
        try:
            draft = try_draft(one.work, cluster)
        except BadRequest:
            continue  # settings that are fixed do not go together in this layout
        if draft is not None and shortest(draft, one.work) is None:
            seconds = times_of(draft, one.work, cluster).step(one.work.step.max_staleness)
            return one._replace(seconds=seconds)
    return None


def _last(work: Work, open_: frozenset[str], cluster: Cluster) -> Choice:
    """A candidate that asks the least of a GPU, where one fits: its rollouts' share of a GPU is no
    whole hundredth. Else raises what the plan says of the first that has a place."""
    search = Search(work, open_, cluster, ANY_ROOM, offload=True)
    sparing = sorted(search.candidates(), key=lambda one: _need(one, search))[:TRIES]
    if fits := _first(sparing, cluster):
        return Choice(fits.work, tuple(_decided(fits, open_, search)))
    placed = (one.work for one in sparing if _has_place(one.work, cluster))
    closest = next(placed, sparing[0].work if sparing else search.base)
    make_plan(closest, cluster)
    raise DoesNotFit(NOWHERE)


def _has_place(work: Work, cluster: Cluster) -> bool:
    try:
        return try_draft(work, cluster) is not None
    except BadRequest:
        return False


def _need(one: Candidate, search: Search) -> int:
    """Bytes on the fullest device."""
    memory = memory_of(one.work, search.gpus)
    inside = {role for group in one.work.colocate for role in group}
    alone = [(role,) for role in search.on_gpu if role not in inside]
    return max(
        sum(memory[role].peak for role in group if role in memory)
        for group in (*one.work.colocate, *alone)
    )


def _on_cpus(work: Work, open_: frozenset[str], cluster: Cluster, cores: int) -> Choice:
    """One rank and one replica unless set; roles that take turns may each have all processors."""
    roles = [one.role for one in work.models]
    changed = with_dtype(work, 4, open_)
    for role in roles:
        if f"{role}.resources.gpus" in open_:
            changed = with_request(changed, role, gpus=0.0)
    threads = dict(work.threads)
    for role, count in _threads(work, cores).items():
        if f"{role}.resources.threads" in open_:
            threads[role] = count
    changed = replace(changed, threads=threads)
    budgets = [budget for budget in BUDGETS if budget <= CPU_BUDGET]
    opened = open_ - {f"{role}.strategy" for role in roles}
    found = list(variants(changed, opened, budgets, offload=False))
    chosen = _first(found, cluster)
    if chosen is None and any(request.gpus for request in changed.requests):
        chosen = found[0]  # as it is set: GPUs that are not there are asked for in vain later
    if chosen is None:
        make_plan(found[-1].work, cluster)
        raise DoesNotFit(NOWHERE)
    return Choice(chosen.work, tuple(_decided(chosen, open_, None)))


def _threads(work: Work, cores: int) -> dict[str, int]:
    """Processors of one replica by role: at staleness 0 rollouts and update take turns."""
    counts = {r.role: r.replicas for r in work.requests}
    update = [one.role for one in work.trained]
    rolling = list(dict.fromkeys(["rollout", *(one.role for one in work.frozen)]))
    phases = [update, rolling] if work.step.max_staleness == 0 else [[*update, *rolling]]
    return {
        role: max(1, cores // sum(counts[one] for one in phase))
        for phase in phases
        for role in phase
    }


def _decided(chosen: Candidate, open_: frozenset[str], search: Search | None) -> Iterator[Decided]:
    """Every open setting as `chosen` has it. The cache is one that stays open, so it is apart from
    what is decided of an open engine."""
    more = {CACHE} if "rollout.engine" in open_ else set()
    for one in _all(chosen, open_, search):
        if one.path in open_ | more:
            yield one


def _all(chosen: Candidate, open_: frozenset[str], search: Search | None) -> Iterator[Decided]:
    work = chosen.work
    requests = {request.role: request for request in work.requests}
    where = "no GPU"
    if search is not None:
        where = f"{chosen.gpus} of {search.total} GPU ({search.cluster.called(search.gpu.name)})"
        where += f", a step of {chosen.seconds:.3g} s by the plan"
    yield from _of_model(work, search)
    if search is not None:
        yield Decided("cluster.colocate", [list(g) for g in work.colocate], _why_shared(work))
    for role in dict.fromkeys(one.role for one in work.models):
        request = requests[role]
        shards = work.rollout.tensor_parallel if role == "rollout" else 1
        gpus = request.gpus / shards
        yield Decided(f"{role}.resources.gpus", gpus, where)
        yield Decided(count_path(role), request.replicas, where)
        if search is not None and request.cpus != 1.0:
            yield Decided(f"{role}.resources.cpus", request.cpus, "the cluster has few CPUs")
        if role in work.threads:
            turns = "roles take turns" if work.step.max_staleness == 0 else "all work at once"
            yield Decided(
                f"{role}.resources.threads", work.threads[role], f"processors here; {turns}"
            )
        if trained := next((one for one in work.trained if one.role == role), None):
            if f"{role}.strategy" in open_:
                yield Decided(f"{role}.strategy", _strategy(trained), _why_sharded(trained))
            if chosen.budget:
                yield Decided(
                    f"{role}.tokens_per_microbatch", chosen.budget, "memory of a micro-batch"
                )
    if search is not None and work.rollout.engine == "vllm" and "rollout" in search.on_gpu:
        yield from _of_engine(work, search)
    yield from _of_waiting(work, requests["rollout"], search)


def _of_waiting(work: Work, request: RoleRequest, search: Search | None) -> Iterator[Decided]:
    """More time for a group, where a replica that is full needs it; or it would be killed with all
    of its groups, and the next one too."""
    if search is None and request.gpus:
        return  # of a type that is not known
    cpus = Rates.of_cpu(work.threads.get("rollout", request.cpus))
    rates = cpus if search is None else search.rates["rollout"]
    memory = memory_of(work, {} if search is None else search.gpus)["rollout"]
    seconds = group_seconds(work.rollout, work.step, rates, memory)
    limit = 100.0 * math.ceil(SLOWER * seconds / 100)
    if limit > work.rollout.timeout_s:
        why = f"by the plan {seconds:.3g} s where a replica has all the groups that it may"
        yield Decided(WAIT, limit, why)


def _of_engine(work: Work, search: Search) -> Iterator[Decided]:
    """Where others allocate on the same GPU, its cache too: vLLM measures the whole GPU, and would
    take what they allocate meanwhile for its own."""
    shared = any("rollout" in group for group in work.colocate)
    why = "what the other roles leave of a GPU" if shared else "GPUs of its own"
    options: dict[str, float] = {
        "tensor_parallel_size": work.rollout.tensor_parallel,
        "gpu_memory_utilization": work.rollout.memory_share,
    }
    yield Decided("rollout.engine", {"name": "vllm", **options}, why)
    for name, value in options.items():
        yield Decided(f"rollout.engine.{name}", value, why)
    if _has_company(work, search) and (cache := _cache(work, search)):
        yield Decided(CACHE, cache, why)


def _has_company(work: Work, search: Search) -> bool:
    """Whether another replica may be on a GPU of a rollout replica."""
    gpus = next(request.gpus for request in work.requests if request.role == "rollout")
    groups = (set(group).intersection(search.on_gpu) for group in work.colocate)
    return gpus < 1 or any("rollout" in group and len(group) > 1 for group in groups)


def _cache(work: Work, search: Search) -> float:
    """GiB of keys and values that the plan counts, in hundredths where these hold a row too."""
    cache = memory_of(work, search.gpus)["rollout"].device["KV cache"]
    rounded = math.floor(100 * cache / GIB) / 100
    return rounded if rounded * GIB >= row_bytes(work.rollout, work.step.row) else cache / GIB


def _of_model(work: Work, search: Search | None) -> Iterator[Decided]:
    def dtype(size: int) -> str:
        return "bfloat16" if size == 2 else "float32"

    if search is None:
        why = "no GPU computes here"
    elif search.gpu.bfloat16:
        why = f"{search.gpu.name} has it"
    else:
        why = f"{search.gpu.name} has no bfloat16"
    yield Decided("model.dtype", dtype(work.policy.dtype_bytes), why)
    for frozen in work.frozen:
        if frozen.section != "reference":
            yield Decided(f"{frozen.section}.dtype", dtype(frozen.dtype_bytes), why)
    checkpointing = work.policy.checkpointing
    why = "activations do not fit otherwise" if checkpointing else "activations fit without"
    yield Decided("model.gradient_checkpointing", checkpointing, why)


def _strategy(trained: Trained) -> Any:
    """What the config says of an open strategy: another with its options, or torch."""
    other = next((one for one in trained.others if one.kept == trained.kept), None)
    if other is None:
        return "torch"
    options = {
        key.removeprefix("strategy."): json.loads(value)
        for key, value in other.settings.items()
        if key != "strategy"
    }
    return {"name": other.settings["strategy"], **options}


def _why_sharded(trained: Trained) -> str:
    if not trained.kept.level:
        return "one rank holds the model"
    if trained.kept.offload:
        return "the GPUs hold the model with its optimiser in the hosts' memory"
    return f"{trained.ranks} ranks share the model"


def _why_shared(work: Work) -> str:
    if not work.colocate:
        return "each role has GPUs of its own"
    if any("rollout" in group for group in work.colocate):
        return "rollouts and update take turns on the same GPUs"
    return "rollouts have GPUs of their own, so neither side waits for the other's memory"
