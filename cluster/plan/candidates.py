"""Ways to put a run's roles on GPUs: who shares a device, how many, how sharded. Pure.

A candidate's seconds are the plan's, for a place as it usually comes out; whether it fits the
cluster is asked of `fit` afterwards. GPUs of several types count as the least of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cluster.bundles import BadRequest
from cluster.gpus import GpuType, gpu_type
from cluster.plan.durations import Rates, times, update_seconds
from cluster.plan.fit import memory_of
from cluster.plan.memory import Memory, row_bytes
from cluster.plan.variants import (
    Candidate,
    count_path,
    variants,
    with_count,
    with_dtype,
    with_request,
)
from cluster.plan.work import Work
from cluster.resources import Cluster

BUDGETS = (16384, 8192, 4096, 2048, 1024, 512)  # tokens of a micro-batch, where none are set
SHARDS = (1, 2, 4, 8)  # tensor-parallel GPUs of one rollout replica
ANY_ROOM = 1e6  # as if a GPU held everything
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Group = tuple[str, ...]  # roles whose replicas of one number share a GPU


@dataclass(frozen=True)
class Search:
    """The candidates for a cluster with GPUs.

    `room` is the share of a GPU's memory to fill; `offload` allows the optimiser on the host.
    """

    work: Work
    open: frozenset[str]
    cluster: Cluster
    room: float
    offload: bool

    @cached_property
    def gpu(self) -> GpuType:
        """The least of the cluster's types."""
        kinds = [gpu_type(node.gpu or "") for node in self.cluster.nodes if node.gpus >= 1]
        slowest = min(kinds, key=lambda kind: kind.flops)
        return replace(slowest, memory_bytes=min(kind.memory_bytes for kind in kinds))

    @cached_property
    def total(self) -> int:
        """Whole GPUs."""
        return sum(int(node.gpus) for node in self.cluster.nodes)

    @cached_property
    def per_node(self) -> int:
        """GPUs of the largest node."""
        return max(int(node.gpus) for node in self.cluster.nodes)

    @cached_property
    def capacity(self) -> int:
        """Bytes of one GPU that may be filled."""
        return int(self.room * self.gpu.memory_bytes)

    @cached_property
    def on_gpu(self) -> tuple[str, ...]:
        """Roles with a model that have a GPU or may have one."""
        roles = dict.fromkeys(one.role for one in self.work.models)
        gpus = {request.role: request.gpus for request in self.work.requests}
        return tuple(
            role for role in roles if f"{role}.resources.gpus" in self.open or gpus[role] > 0
        )

    @cached_property
    def base(self) -> Work:
        """The work with a GPU for every role that may have one, in the dtype of these GPUs."""
        work = self.work
        if "policy" in self.on_gpu or "rollout" in self.on_gpu:
            work = with_dtype(work, 2 if self.gpu.bfloat16 else 4, self.open)
        for role in self.on_gpu:
            if f"{role}.resources.gpus" in self.open:
                work = with_request(work, role, gpus=1.0)
        return work

    @cached_property
    def gpus(self) -> Mapping[str, GpuType]:
        """The type by role, for those on one."""
        return dict.fromkeys(self.on_gpu, self.gpu)

    @cached_property
    def rates(self) -> Mapping[str, Rates]:
        """By role."""
        cpus = {r.role: self.work.threads.get(r.role, r.cpus) for r in self.work.requests}
        return {
            one.role: Rates.of_gpu(self.gpu, one.dtype_bytes)
            if one.role in self.on_gpu
            else Rates.of_cpu(cpus[one.role])
            for one in self.base.models
        }

    def candidates(self) -> Iterator[Candidate]:
        """All of them, in no order of merit.

        Raises BadRequest where a rollout replica has GPUs that vLLM cannot share it out over.
        """
        for groups in self._layouts():
            yield from self._of_layout(groups)

    def _layouts(self) -> list[tuple[Group, ...]]:
        """All roles on each device; rollouts apart from the others; each role for itself."""
        roles = self.on_gpu
        if "cluster.colocate" not in self.open:
            given = [tuple(r for r in group if r in roles) for group in self.work.colocate]
            inside = {role for group in given for role in group}
            return [(*filter(None, given), *((role,) for role in roles if role not in inside))]
        apart = tuple((role,) for role in roles)
        rest = tuple(role for role in roles if role != "rollout")
        split = tuple(group for group in (rest, ("rollout",)) if group and group[0] in roles)
        together = (roles,) if self.work.rollout.most_replicas is None else split
        return list(dict.fromkeys((together, split, apart)))

    def _fixed(self, role: str) -> int | None:
        """The number of ranks or replicas that is set."""
        if count_path(role) in self.open:
            return None
        return next(one.replicas for one in self.base.requests if one.role == role)

    def _counts(self, group: Group, most: int) -> list[int]:
        """Numbers of replicas that a group may have: whole nodes where it is more than one."""
        fixed = {count for role in group if (count := self._fixed(role)) is not None}
        if fixed:
            return sorted(fixed) if len(fixed) == 1 and max(fixed) <= self.total else []
        most = min(most, self.total)
        inside = range(1, min(most, self.per_node) + 1)
        across = (step * self.per_node for step in STEPS if step * self.per_node <= most)
        return sorted({*inside, *across})

    def _of_layout(self, groups: tuple[Group, ...]) -> Iterator[Candidate]:
        shared = tuple(group for group in groups if len(group) > 1)
        work = self.base
        if "cluster.colocate" in self.open:
            work = replace(work, colocate=shared)
        main = next((group for group in groups if "policy" in group), ())
        step = work.step
        ranks_of_main = (
            self._counts(main, math.ceil(step.sequences / step.updates))
            if main
            else [self._fixed("policy") or 1]
        )
        several = work.policy.several or ("policy.strategy" in self.open and work.policy.others)
        if not several:
            ranks_of_main = [ranks for ranks in ranks_of_main if ranks == 1]
        for ranks in ranks_of_main:
            counted = with_count(work, "policy", ranks)
            for role in main or ("policy",):
                counted = with_count(counted, role, ranks)
            if work.critic and "critic" not in main:
                counted = with_count(counted, "critic", self._fixed("critic") or ranks)
            yield from self._of_ranks(counted, groups, main, ranks)

    def _of_ranks(
        self, work: Work, groups: tuple[Group, ...], main: Group, ranks: int
    ) -> Iterator[Candidate]:
        fits: list[tuple[float, int, Candidate]] = []
        for variant in variants(work, self.open, BUDGETS, self.offload):
            memory = memory_of(variant.work, self.gpus)
            without = [tuple(r for r in group if r != "rollout") for group in groups]
            if any(sum(memory[r].peak for r in group) > self.capacity for group in without):
                continue
            if "rollout" in main:
                yield from self._shared(variant, memory, main, ranks)
                continue
            nodes = math.ceil(ranks / self.per_node)
            seconds = max(
                update_seconds(one, work.step, self.rates[one.role], nodes)
                for one in variant.work.trained
            )
            fits.append((seconds, -variant.budget, variant))
        if fits:
            *_, variant = min(fits, key=lambda fit: fit[:2])
            yield from self._beside(variant, groups, main, ranks)

    def _share(
        self, work: Work, memory: Mapping[str, Memory], others: Sequence[str]
    ) -> tuple[Work, Memory] | None:
        """The rollouts within what `others` leave of a device; None where that is too little."""
        left = self.capacity - sum(memory[role].peak for role in others)
        rollout, total = work.rollout, self.gpu.memory_bytes
        if "rollout" not in self.on_gpu:
            return work, memory["rollout"]
        if rollout.engine == "vllm" and self._decides("gpu_memory_utilization"):
            if self.room == ANY_ROOM:  # as little as holds one sequence
                least = self._least(work) / total
                return self._shares(work, least)
            beyond = max(0, memory["rollout"].peak - int(rollout.memory_share * total))
            share = math.floor(100 * (left - beyond) / total) / 100
            if not others:
                share = max(rollout.memory_share, min(share, 0.92))
            else:
                share = min(rollout.memory_share, share)
            if share <= 0:
                return None
            work, _ = self._shares(work, share)
        if self.room == ANY_ROOM:
            return work, memory["rollout"]
        mine = memory_of(work, self.gpus)["rollout"]
        cache = mine.device.get("KV cache", 0)
        if mine.peak > left:
            return None
        if rollout.engine == "vllm" and cache < row_bytes(work.rollout, work.step.row):
            return None
        return work, mine

    def _decides(self, option: str) -> bool:
        """Whether an option of the rollouts' engine is open."""
        return not {"rollout.engine", f"rollout.engine.{option}"}.isdisjoint(self.open)

    def _shares(self, work: Work, share: float) -> tuple[Work, Memory]:
        """The rollouts with a share of a device, and what they keep there."""
        work = replace(work, rollout=replace(work.rollout, memory_share=share))
        return work, memory_of(work, self.gpus)["rollout"]

    def _least(self, work: Work) -> int:
        """Bytes with which a vLLM replica decodes one sequence."""
        one = row_bytes(work.rollout, work.step.row)
        return self._shares(work, 0.0)[1].peak + one

    def _shared(
        self, variant: Candidate, memory: Mapping[str, Memory], group: Group, ranks: int
    ) -> Iterator[Candidate]:
        """Rollouts on the devices of the policy."""
        if variant.work.rollout.tensor_parallel > 1:
            return
        others = [role for role in group if role != "rollout"]
        if fitted := self._share(variant.work, memory, others):
            work, rollout = fitted
            yield self._timed(
                work, {**memory, "rollout": rollout}, (group,), variant.budget, far=ranks
            )

    def _beside(
        self,
        variant: Candidate,
        groups: tuple[Group, ...],
        main: Group,
        ranks: int,
    ) -> Iterator[Candidate]:
        """Rollouts on devices of their own, and the models that are only run forward on theirs."""
        home = next((group for group in groups if "rollout" in group), ())
        helpers = [group for group in groups if group not in (main, home)]
        free = [group for group in helpers if "critic" not in group]
        critic = variant.work.critic
        apart = critic is not None and any("critic" in group for group in helpers)
        taken = (ranks if main else 0) + (critic.ranks if critic and apart else 0)
        counts = self._counts(free[0], max(1, self.total // 4)) if free else [0]
        for shards in self._shards(home):
            sized = self._with_shards(variant.work, shards)
            others = [role for role in home if role != "rollout"]
            before = memory_of(sized, self.gpus)
            fitted = self._share(sized, before, others)
            if fitted is None:
                continue
            for count in counts:
                work = fitted[0]
                for group in free:
                    for role in group:
                        work = with_count(work, role, self._fixed(role) or count)
                used = taken + sum(self._fixed(group[0]) or count for group in free)
                for replicas in self._replicas(home, used, shards):
                    for role in home or ("rollout",):
                        work = with_count(work, role, replicas)
                    timed = {**before, "rollout": fitted[1]}
                    yield self._timed(work, timed, groups, variant.budget, far=replicas * shards)

    def _shards(self, home: Group) -> list[int]:
        rollout = self.base.rollout
        asked = rollout.gpus_as_set
        if not self._decides("tensor_parallel_size"):
            return [rollout.tensor_parallel]
        if len(home) != 1 or rollout.engine != "vllm":
            return [1]
        if "rollout.resources.gpus" not in self.open and asked != 1:
            if (shards := max(1, int(asked))) not in rollout.shape.shards:
                raise BadRequest(rollout.shape.uneven(f"rollout.resources.gpus={asked:g}"))
            return [shards]
        return [n for n in SHARDS if n in rollout.shape.shards and n <= self.per_node]

    def _with_shards(self, work: Work, shards: int) -> Work:
        if "rollout" not in self.on_gpu:
            return work
        work = replace(work, rollout=replace(work.rollout, tensor_parallel=shards))
        return with_request(work, "rollout", gpus=float(shards)) if shards > 1 else work

    def _replicas(self, home: Group, used: int, shards: int) -> list[int]:
        """As many as the rest of the cluster holds, of parts of it that double, or of all."""
        fixed = {count for role in home or ("rollout",) if (count := self._fixed(role))}
        if fixed:
            return sorted(fixed) if len(fixed) == 1 else []
        if not home:
            return [1]
        step = self.base.step
        most = step.groups * (1 + step.max_staleness)
        parts = {self.total, *(n for n in STEPS if n & (n - 1) == 0 and n <= self.total)}
        counts = (min(most, (part - used) // shards) for part in parts)
        return sorted({count for count in counts if count > 0})

    def _timed(
        self,
        work: Work,
        memory: Mapping[str, Memory],
        groups: tuple[Group, ...],
        budget: int,
        far: int,
    ) -> Candidate:
        """`far` counts the GPUs of the rollouts."""
        counts = {request.role: request.replicas for request in work.requests}
        spans = {role: math.ceil(count / self.per_node) for role, count in counts.items()}
        shards = work.rollout.tensor_parallel
        gpus = sum(counts[group[0]] * (shards if group == ("rollout",) else 1) for group in groups)
        nodes = math.ceil(gpus / self.per_node)
        away = min(nodes - 1, math.ceil(far / self.per_node))
        sharing = [dict.fromkeys(group, 1) for group in groups]
        found = times(work, self.rates, memory, spans, away, sharing)
        return Candidate(found.step(work.step.max_staleness), gpus, work, budget)
