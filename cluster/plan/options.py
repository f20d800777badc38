"""What could be set otherwise: each option makes another `Work`, which is then planned as any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.plan.work import Frozen, Other, Rollout, Trained, Work

LORA_RANK = 16
CHUNK = 256  # rows of the logits matrix at once
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
        for frozen in work.frozen:
            if frozen.role == role:
                yield from _smaller_frozen(work, frozen)


def _smaller_frozen(work: Work, frozen: Frozen) -> Iterator[Option]:
    """The reference goes by the policy's settings, a reward model by its own."""
    if frozen.role == "reference":
        if frozen.dtype_bytes == 4:
            yield from _bfloat16(work)
        for tokens in _halves(frozen.tokens, work.step.row):
            yield _microbatch(work, tokens)
        if frozen.head_rows > CHUNK:
            yield _chunk(work)
        return
    if frozen.dtype_bytes == 4:
        settings = {f"{frozen.section}.dtype": "bfloat16"}
        yield Option(settings, _other_frozen(work, frozen, dtype_bytes=2))
    text = frozen.longest or work.step.row
    for tokens in _halves(frozen.tokens, text):
        changed = _other_frozen(work, frozen, tokens=tokens)
        yield Option({f"{frozen.section}.batch_size": str(tokens // text)}, changed)


def _other_frozen(work: Work, frozen: Frozen, **changes: Any) -> Work:
    others = (replace(one, **changes) if one is frozen else one for one in work.frozen)
    return replace(work, frozen=tuple(others))


def _smaller_rank(work: Work, trained: Trained) -> Iterator[Option]:
    role = trained.role
    if trained.sends_changes or trained.send_buffer or trained.shares_weights:
        yield _by_the_host(work)
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
    if trained.head_rows > CHUNK:
        yield _chunk(work)
    if trained.dtype_bytes == 4:
        yield from _bfloat16(work)
    yield from _sharded(work, trained)
    if role != "policy":
        return
    settings, adapted = {}, trained
    if trained.lora_rank is None:
        settings = {"model.lora": f"{{r: {LORA_RANK}}}"}
        adapted = replace(trained, lora_rank=LORA_RANK)
        yield Option(settings, replace(work, policy=adapted))
    gpus = next(request.gpus for request in work.requests if request.role == role)
    if gpus and trained.has_four_bit and not trained.four_bit:
        adapted = replace(adapted, four_bit=True)
        yield Option({**settings, "model.load_in_4bit": "true"}, replace(work, policy=adapted))


def _sharded(work: Work, trained: Trained) -> Iterator[Option]:
    """Share out more, offload, more ranks."""
    now = trained.kept
    ways = [(other, other.kept) for other in trained.others]
    if trained.ranks > 1 and now.level:
        for other, then in ways:
            if then.level > now.level and then.offload == now.offload:
                yield _instead(work, trained, other)
    for other, then in ways:
        if then == replace(now, offload=not now.offload):  # true spares the GPU, false the host
            yield _instead(work, trained, other)
    for other, then in ways:
        if then.weights and then.offload and not (now.weights and now.offload):
            yield _instead(work, trained, other)
    if work.colocate:
        return  # replicas of roles that share places change together
    wide = _sharing_weights(trained)
    more = 2 * trained.ranks
    while wide is not None and more <= MOST_RANKS:
        option = _instead(work, trained, wide, ranks=more)
        changed = _with_request(option.work, trained.role, replicas=more)
        yield Option({**option.settings, f"{trained.role}.ranks": str(more)}, changed)
        more *= 2


def _sharing_weights(trained: Trained) -> Other | None:
    """What the ranks have, where that shares out weights, else what they could have that does."""
    now = trained.kept
    if now.weights:
        return Other({}, now)
    for other in trained.others:
        if other.kept.weights and other.kept.offload == now.offload:
            return other
    return None


def _instead(work: Work, trained: Trained, other: Other, **changes: Any) -> Option:
    """`other` in place of what the ranks run with."""
    settings = {f"{trained.role}.{key}": value for key, value in other.settings.items()}
    return Option(settings, _one(work, trained, kept=other.kept, **changes))


def _by_the_host(work: Work) -> Option:
    """Whole versions through the object store: rank 0 keeps none for changes, no GPU has buffers or
    copies of one."""
    policy = replace(work.policy, sends_changes=False, send_buffer=0, shares_weights=False)
    rollout = replace(work.rollout, takes_changes=False, takes_whole=True, send_buffer=0)
    settings = {"rollout.weight_sync": "full"}
    return Option(settings, replace(work, policy=policy, rollout=rollout))


def _smaller_rollout(work: Work, rollout: Rollout) -> Iterator[Option]:
    if rollout.takes_changes or rollout.send_buffer:
        yield _by_the_host(work)
    if rollout.dtype_bytes == 4:
        yield from _bfloat16(work)
    if rollout.keeps_version:
        yield from _fewer_versions(work, rollout)
    if rollout.engine != "vllm":
        return
    gpus = next(request.gpus for request in work.requests if request.role == "rollout")
    named = {} if rollout.named else {"rollout.engine": "vllm"}
    shards = 2 * rollout.tensor_parallel
    while gpus and not work.colocate and shards <= MOST_SHARDS and shards in rollout.shape.shards:
        settings = {**named, "rollout.engine.tensor_parallel_size": str(shards)}
        as_set = rollout.gpus_as_set
        if as_set != 1:  # the replica's, so it goes with the shards
            settings["rollout.resources.gpus"] = str(shards)
            as_set = float(shards)
        sharded = replace(rollout, tensor_parallel=shards, gpus_as_set=as_set)
        changed = _with_request(replace(work, rollout=sharded), "rollout", gpus=float(shards))
        yield Option(settings, changed)
        fewer = max(1, rollout.replicas * rollout.tensor_parallel // shards)
        if fewer != rollout.replicas:
            changed = replace(changed, rollout=replace(sharded, replicas=fewer))
            yield Option(
                {**settings, "rollout.replicas": str(fewer)},
                _with_request(changed, "rollout", replicas=fewer),
            )
        shards *= 2
    if rollout.kv_cache_bytes is not None:  # a share is of no account beside it
        rollout = replace(rollout, kv_cache_bytes=None)
        named = {**named, "rollout.engine.kv_cache_gib": "auto"}
        yield Option(named, replace(work, rollout=rollout))
    if not gpus:
        return
    for share in (0.92, 0.45, 0.3):  # more for the cache, or less for who is there too
        if share != rollout.memory_share:
            changed = replace(work, rollout=replace(rollout, memory_share=share))
            yield Option({**named, "rollout.engine.gpu_memory_utilization": str(share)}, changed)


def _fewer_versions(work: Work, rollout: Rollout) -> Iterator[Option]:
    """Less of the hosts' memory: adapters in place of versions, or fewer replicas to keep one."""
    if work.policy.lora_rank is not None and not work.policy.four_bit:
        policy = replace(work.policy, sends_changes=False)
        adapted = replace(rollout, takes_changes=False, takes_whole=False)
        settings = {"rollout.weight_sync": "adapter"}
        yield Option(settings, replace(work, policy=policy, rollout=adapted))
    fewer = rollout.replicas // 2
    if fewer and not work.colocate:
        changed = replace(work, rollout=replace(rollout, replicas=fewer))
        changed = _with_request(changed, "rollout", replicas=fewer)
        yield Option({"rollout.replicas": str(fewer)}, changed)


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
    now = policy.kept
    for other in policy.others:
        on_device = now.offload and other.kept == replace(now, offload=False)
        whole = now.weights and other.kept == replace(now, weights=False)
        if on_device or whole:
            yield _instead(work, policy, other)
    if rollout.engine == "vllm":
        changed = replace(
            work, rollout=replace(rollout, max_concurrent_groups=2 * rollout.max_concurrent_groups)
        )
        yield Option(
            {"rollout.max_concurrent_groups": str(2 * rollout.max_concurrent_groups)}, changed
        )
    if work.colocate:
        return  # replicas of roles that share places change together
    roles = dict.fromkeys(one.role for one in work.models)
    for request in work.requests if any(request.gpus for request in work.requests) else ():
        if request.role in roles and not request.gpus and request.role != "rollout":
            changed = _with_request(work, request.role, gpus=1.0)
            yield Option({f"{request.role}.resources.gpus": "1"}, changed)
    for role in roles:
        if role in ("policy", "critic") and _ranks_are_fixed(work, role):
            continue
        grown = _grown(work, role)
        yield grown
        if role != "rollout" and (paid := _from_rollouts(grown, work)):
            yield paid


def _ranks_are_fixed(work: Work, role: str) -> bool:
    return any(one.role == role and not one.several for one in work.trained)


def _grown(work: Work, role: str) -> Option:
    """Twice the replicas or ranks of a role."""
    request = next(request for request in work.requests if request.role == role)
    count = 2 * request.replicas
    changed = _with_request(work, role, replicas=count)
    if trained := next((one for one in work.trained if one.role == role), None):
        return Option({f"{role}.ranks": str(count)}, _one(changed, trained, ranks=count))
    settings = {f"{role}.replicas": str(count)}
    if role == "rollout":
        most = work.rollout.most_replicas
        if most is not None and most < count:
            settings["rollout.max_replicas"] = str(count)
            most = count
        grown = replace(work.rollout, replicas=count, most_replicas=most)
        changed = replace(changed, rollout=grown)
    frozen = tuple(replace(one, replicas=count) if one.role == role else one for one in work.frozen)
    return Option(settings, replace(changed, frozen=frozen))


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


def _halves(tokens: int, longest: int) -> Iterator[int]:
    """Halves of a budget in whole rows, down to one."""
    rows = math.ceil(tokens / longest)
    while rows := rows // 2:
        yield rows * longest


def _one(work: Work, trained: Trained, **changes: Any) -> Work:
    """`trained` changed; a micro-batch has no more rows than a rank."""
    changed = replace(trained, **changes)
    rows = math.ceil(work.step.sequences / work.step.updates / changed.ranks)
    changed = replace(changed, tokens=min(changed.tokens, rows * changed.longest))
    if trained.role == "critic":
        return replace(work, critic=changed)
    return replace(work, policy=changed)


def _all_trained(work: Work, **changes: Any) -> Work:
    for trained in work.trained:
        work = _one(work, trained, **changes)
    return work


def _microbatch(work: Work, tokens: int) -> Option:
    """The policy's budget, which is the reference's too."""
    changed = _one(work, work.policy, tokens=min(tokens, work.policy.tokens))
    frozen = tuple(
        replace(one, tokens=min(one.tokens, tokens)) if one.role == "reference" else one
        for one in work.frozen
    )
    return Option({"policy.tokens_per_microbatch": str(tokens)}, replace(changed, frozen=frozen))


def _chunk(work: Work) -> Option:
    """A smaller piece of the logits matrix, of the policy and of the reference."""
    changed = _one(work, work.policy, head_rows=min(CHUNK, work.policy.head_rows))
    frozen = tuple(
        replace(one, head_rows=min(one.head_rows, CHUNK)) if one.role == "reference" else one
        for one in work.frozen
    )
    return Option({"policy.tokens_per_chunk": str(CHUNK)}, replace(changed, frozen=frozen))


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
