"""What could be set otherwise: each option makes another `Work`, which is then planned as any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.plan_work import Rollout, Trained, Work

LORA_RANK = 16
MOST_SHARDS = 8
MOST_RANKS = 1024


@dataclass(frozen=True)
class Option:
    """One or more settings by their key, and the work with them."""

    settings: Mapping[str, str]
    work: Work

    def describe(self) -> str:
        """As in: a.b=1, c=2 and d=3."""
        *most, last = [f"{key}={value}" for key, value in self.settings.items()]
        return f"{', '.join(most)} and {last}" if most else last

    def after(self, other: Option) -> Option:
        """This option, made of the work of `other`, with the settings of both."""
        return Option({**other.settings, **self.settings}, self.work)


def to_fit(work: Work, role: str) -> Iterator[Option]:
    """Changes that make `role` smaller, each alone: cheap ones first."""
    if trained := next((one for one in work.trained if one.role == role), None):
        yield from _smaller_rank(work, trained)
    elif role == "rollout":
        yield from _smaller_rollout(work, work.rollout)
    else:
        kept = tuple(f for f in work.frozen if f.role == role)
        if kept and kept[0].dtype_bytes == 4:
            yield from _bfloat16(work)
        if role == "reference" and kept[0].tokens > work.step.longest:
            for tokens in _halves(kept[0].tokens, work.step.longest):
                yield _microbatch(work, tokens)


def _smaller_rank(work: Work, trained: Trained) -> Iterator[Option]:
    role = trained.role
    if not trained.checkpointing:
        yield Option(
            {"model.gradient_checkpointing": "true"}, _all_trained(work, checkpointing=True)
        )
    for tokens in _halves(trained.tokens, trained.longest):
        if role == "policy":
            yield _microbatch(work, tokens)
        else:
            changed = _one(work, trained, tokens=tokens)
            yield Option({"critic.tokens_per_microbatch": str(tokens)}, changed)
    if trained.dtype_bytes == 4:
        yield from _bfloat16(work)
    yield from _sharded(work, trained)
    if role == "policy" and trained.lora_rank is None:
        changed = _one(work, trained, lora_rank=LORA_RANK)
        yield Option({"model.lora": f"{{r: {LORA_RANK}}}"}, changed)


def _sharded(work: Work, trained: Trained) -> Iterator[Option]:
    """More of ZeRO: a higher stage, offload, more ranks."""
    strategy, stage = f"{trained.role}.strategy", f"{trained.role}.deepspeed.stage"
    offload, ranks = f"{trained.role}.deepspeed.offload", f"{trained.role}.ranks"
    chosen = {} if trained.strategy == "deepspeed" else {strategy: "deepspeed"}
    if trained.strategy == "deepspeed" and trained.ranks > 1:
        for higher in range(trained.zero_stage + 1, 4):
            yield Option({stage: str(higher)}, _one(work, trained, zero_stage=higher))
    if trained.strategy == "deepspeed" and not trained.offload:
        yield Option({offload: "true"}, _one(work, trained, offload=True))
    if trained.strategy != "fsdp" and not (trained.offload and trained.zero_stage == 3):
        changed = _one(work, trained, strategy="deepspeed", zero_stage=3, offload=True)
        yield Option({**chosen, stage: "3", offload: "true"}, changed)
    if work.colocate:
        return  # replicas of roles that share places change together
    more = 2 * trained.ranks
    while more <= MOST_RANKS:
        if trained.strategy == "fsdp":
            changed, settings = _one(work, trained, ranks=more), {}
        else:
            changed = _one(work, trained, strategy="deepspeed", zero_stage=3, ranks=more)
            settings = {**chosen, stage: "3"}
        changed = _with_request(changed, trained.role, replicas=more)
        yield Option({**settings, ranks: str(more)}, changed)
        more *= 2


def _smaller_rollout(work: Work, rollout: Rollout) -> Iterator[Option]:
    if rollout.dtype_bytes == 4:
        yield from _bfloat16(work)
    if rollout.engine != "vllm":
        return
    gpus = next(request.gpus for request in work.requests if request.role == "rollout")
    shards = 2 * rollout.tensor_parallel
    while (
        gpus and not work.colocate and shards <= MOST_SHARDS and rollout.shape.heads % shards == 0
    ):
        changed = replace(work, rollout=replace(rollout, tensor_parallel=shards))
        yield Option(
            {"rollout.tensor_parallel_size": str(shards)},
            _with_request(changed, "rollout", gpus=float(shards)),
        )
        fewer = max(1, rollout.replicas * rollout.tensor_parallel // shards)
        if fewer != rollout.replicas:
            changed = replace(
                work, rollout=replace(rollout, tensor_parallel=shards, replicas=fewer)
            )
            yield Option(
                {"rollout.tensor_parallel_size": str(shards), "rollout.replicas": str(fewer)},
                _with_request(changed, "rollout", gpus=float(shards), replicas=fewer),
            )
        shards *= 2
    for share in (0.45, 0.3):
        if share < rollout.memory_share:
            changed = replace(work, rollout=replace(rollout, memory_share=share))
            yield Option({"rollout.gpu_memory_utilization": str(share)}, changed)


def to_be_faster(work: Work) -> Iterator[Option]:
    """Changes that may shorten a step, each alone."""
    step, policy, rollout = work.step, work.policy, work.rollout
    if step.max_staleness == 0:
        yield Option(
            {"train.max_staleness": "1"}, replace(work, step=replace(step, max_staleness=1))
        )
    if policy.dtype_bytes == 4 and any(request.gpus for request in work.requests):
        yield from _bfloat16(work)
    if policy.checkpointing:
        yield Option(
            {"model.gradient_checkpointing": "false"}, _all_trained(work, checkpointing=False)
        )
    if policy.offload:
        yield Option({"policy.deepspeed.offload": "false"}, _one(work, policy, offload=False))
    if policy.strategy == "deepspeed" and policy.zero_stage == 3:
        yield Option({"policy.deepspeed.stage": "2"}, _one(work, policy, zero_stage=2))
    if rollout.engine == "vllm":
        changed = replace(work, rollout=replace(rollout, groups_at_once=2 * rollout.groups_at_once))
        yield Option({"rollout.max_concurrent_groups": str(2 * rollout.groups_at_once)}, changed)
    if work.colocate:
        return  # replicas of roles that share places change together
    roles = dict.fromkeys(one.role for one in work.models)
    for role in roles:
        if role in ("policy", "critic") and _ranks_are_fixed(work, role):
            continue
        grown = _grown(work, role)
        yield grown
        if role != "rollout" and (paid := _from_rollouts(grown, work)):
            yield paid


def _ranks_are_fixed(work: Work, role: str) -> bool:
    return any(one.role == role and one.strategy == "torch" for one in work.trained)


def _grown(work: Work, role: str) -> Option:
    """Twice the replicas or ranks of a role."""
    request = next(request for request in work.requests if request.role == role)
    count = 2 * request.replicas
    changed = _with_request(work, role, replicas=count)
    if trained := next((one for one in work.trained if one.role == role), None):
        return Option({f"{role}.ranks": str(count)}, _one(changed, trained, ranks=count))
    if role == "rollout":
        changed = replace(changed, rollout=replace(work.rollout, replicas=count))
    frozen = tuple(replace(one, replicas=count) if one.role == role else one for one in work.frozen)
    return Option({f"{role}.replicas": str(count)}, replace(changed, frozen=frozen))


def _from_rollouts(grown: Option, before: Work) -> Option | None:
    """`grown` with its new GPUs taken from the rollouts; None where they do not have them."""
    more = sum(r.gpus * r.replicas for r in grown.work.requests)
    more -= sum(r.gpus * r.replicas for r in before.requests)
    each = next(request.gpus for request in before.requests if request.role == "rollout")
    if more <= 0 or not each:
        return None
    left = before.rollout.replicas - math.ceil(more / each)
    if left < 1:
        return None
    fewer = replace(grown.work, rollout=replace(before.rollout, replicas=left))
    settings = {**grown.settings, "rollout.replicas": str(left)}
    return Option(settings, _with_request(fewer, "rollout", replicas=left))


def _halves(tokens: int, least: int) -> Iterator[int]:
    """Halves of a budget down to the longest row, four at most."""
    for _ in range(4):
        tokens //= 2
        if tokens < least:
            return
        yield tokens


def _one(work: Work, trained: Trained, **changes: Any) -> Work:
    changed = replace(trained, **changes)
    if trained.role == "critic":
        return replace(work, critic=changed)
    return replace(work, policy=changed)


def _all_trained(work: Work, **changes: Any) -> Work:
    for trained in work.trained:
        work = _one(work, trained, **changes)
    return work


def _microbatch(work: Work, tokens: int) -> Option:
    """The policy's budget, which is the reference's too."""
    changed = _one(work, work.policy, tokens=tokens)
    frozen = tuple(
        replace(one, tokens=min(one.tokens, tokens)) if one.role == "reference" else one
        for one in work.frozen
    )
    return Option({"policy.tokens_per_microbatch": str(tokens)}, replace(changed, frozen=frozen))


def _bfloat16(work: Work) -> Iterator[Option]:
    changed = _all_trained(work, dtype_bytes=2)
    frozen = tuple(
        replace(one, dtype_bytes=2) if one.role == "reference" else one for one in work.frozen
    )
    rollout = replace(work.rollout, dtype_bytes=2)
    yield Option({"model.dtype": "bfloat16"}, replace(changed, rollout=rollout, frozen=frozen))


def _with_request(work: Work, role: str, **changes: Any) -> Work:
    requests = tuple(
        replace(request, **changes) if request.role == role else request
        for request in work.requests
    )
    return replace(work, requests=requests)
