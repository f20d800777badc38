"""A run's work, changed: other counts, another dtype, the ways in which ranks may hold a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from cluster.plan.work import Frozen, Trained, Work, microbatch

STRATEGY = "deepspeed"  # the one that is chosen where ranks share a model
LEAST_SHARED = 2  # of optimiser, gradients and weights: to share out less is no faster


class Candidate(NamedTuple):
    """A way to run, its predicted step in seconds, and the GPUs it takes."""

    seconds: float
    gpus: int
    work: Work
    budget: int  # tokens of a micro-batch as the config would say it; 0: as it does


def count_path(role: str) -> str:
    """The key of the number of ranks or replicas of a role."""
    return f"{role}.{'ranks' if role in ('policy', 'critic') else 'replicas'}"


def with_request(work: Work, role: str, **changes: float) -> Work:
    """The work with another request of one role."""
    requests = (
        replace(one, **changes) if one.role == role else one  # type: ignore[arg-type]
        for one in work.requests
    )
    return replace(work, requests=tuple(requests))


def with_count(work: Work, role: str, count: int) -> Work:
    """The work with `count` ranks or replicas of a role."""
    work = with_request(work, role, replicas=count)
    if role == "rollout":
        return replace(work, rollout=replace(work.rollout, replicas=count))
    if role == "policy":
        return replace(work, policy=replace(work.policy, ranks=count))
    if role == "critic" and work.critic:
        return replace(work, critic=replace(work.critic, ranks=count))
    frozen = (replace(one, replicas=count) if one.role == role else one for one in work.frozen)
    return replace(work, frozen=tuple(frozen))


def with_dtype(work: Work, size: int, open_: frozenset[str]) -> Work:
    """The work in a dtype of `size` bytes, as far as that is open."""
    if "model.dtype" in open_:
        work = replace(
            work,
            policy=replace(work.policy, dtype_bytes=size),
            critic=work.critic and replace(work.critic, dtype_bytes=size),
            rollout=replace(work.rollout, dtype_bytes=size),
        )
    frozen = (
        replace(one, dtype_bytes=size)
        if ("model.dtype" if one.role == "reference" else f"{one.section}.dtype") in open_
        else one
        for one in work.frozen
    )
    return replace(work, frozen=tuple(frozen))


def variants(
    work: Work, open_: frozenset[str], budgets: Sequence[int], offload: bool
) -> Iterator[Candidate]:
    """Every sharding, checkpointing and micro-batch of the ranks that `work` has.

    `offload` adds those with the optimiser in the host's memory.
    """
    for sharded in _sharded(work, open_, offload):
        checkpointings = (
            (False, True)
            if "model.gradient_checkpointing" in open_
            else (work.policy.checkpointing,)
        )
        for checkpointing in checkpointings:
            seen: set[tuple[int, ...]] = set()
            for budget in budgets:
                changed = _budgeted(sharded, open_, budget)
                for one in changed.trained:
                    changed = _trained(changed, replace(one, checkpointing=checkpointing))
                counted: tuple[Trained | Frozen, ...] = (*changed.trained, *changed.frozen)
                if (tokens := tuple(one.tokens for one in counted)) in seen:
                    continue  # a row is as short as it gets
                seen.add(tokens)
                yield Candidate(0.0, 0, changed, budget)


def _trained(work: Work, one: Trained) -> Work:
    return replace(work, policy=one) if one.role == "policy" else replace(work, critic=one)


def _sharded(work: Work, open_: frozenset[str], offload: bool) -> Iterator[Work]:
    """Every way in which ranks may hold the model; none where one holds what several ask for."""
    opened = [one for one in work.trained if f"{one.role}.strategy" in open_]
    ways = [
        None,
        *(
            other
            for other in (opened[0].others if opened else ())
            if other.settings.get("strategy") == STRATEGY
            and other.kept.level >= LEAST_SHARED
            and (offload or not other.kept.offload)
        ),
    ]
    for way in ways:
        changed = work
        for one in opened if way else ():
            assert way is not None
            changed = _trained(changed, replace(one, kept=way.kept, several=True))
        if any(one.ranks > 1 and not one.several for one in changed.trained):
            continue
        alone = all(one.ranks == 1 for one in opened)
        if way is not None and alone and not way.kept.offload:
            continue  # one rank shares nothing out
        yield changed


def _budgeted(work: Work, open_: frozenset[str], budget: int) -> Work:
    """The work with micro-batches of at most `budget` tokens, where that is open."""
    step = work.step
    for one in work.trained:
        rows = math.ceil(step.sequences / step.updates / one.ranks)
        tokens = one.tokens
        if f"{one.role}.tokens_per_microbatch" in open_:
            tokens = budget
        work = _trained(work, replace(one, tokens=microbatch(tokens, rows, one.longest)))
    if "policy.tokens_per_microbatch" in open_:
        tokens = microbatch(budget, step.completions, step.row)
        frozen = (
            replace(one, tokens=tokens) if one.role == "reference" else one for one in work.frozen
        )
        work = replace(work, frozen=tuple(frozen))
    return work
