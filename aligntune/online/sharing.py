"""How a training step is cut: optimiser steps over epochs, each shared out over the ranks. Pure.

One way for values, targets and update: whole groups by cost, and single rollouts only where a
mini-batch has too few groups a rank (`share_out`). Values and targets always take whole groups.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from actors.messages import GroupWork, LossTerms, Row, UpdateJob
from actors.packing import GROUPS_A_RANK, cost, only_its_own, share_out, split
from aligntune.algorithms.base import Algorithm
from aligntune.config.online import RunConfig
from aligntune.runs.checkpoint import CRITIC, POLICY


def minibatches(config: RunConfig, step: int, epochs: int | None = None) -> list[list[int]]:
    """Indices of the groups of every optimiser step of training step `step`, over all epochs or
    the first `epochs`. Pure.

    The first epoch takes the groups as they come, each later one in an order drawn from the seed,
    the step and the epoch.
    """
    train = config.train
    size = train.groups_per_minibatch or train.groups_per_step
    plan = []
    for epoch in range(epochs or train.epochs_per_batch or 1):
        order = list(range(train.groups_per_step))
        if epoch > 0:
            random.Random(f"{train.seed} {step} {epoch}").shuffle(order)
        plan += [order[start : start + size] for start in range(0, len(order), size)]
    return plan


def whole_groups(
    config: RunConfig, step: int, groups: Sequence[GroupWork], ranks: int
) -> list[list[int]]:
    """Indices of the groups whose values or targets each rank makes, balanced by cost. Pure.

    Those that it trains on in the first epoch, where mini-batches are shared out by whole groups.
    """
    first = minibatches(config, step, epochs=1)
    if min(map(len, first)) < GROUPS_A_RANK * ranks:
        first = [list(range(len(groups)))]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for indices in first:
        costs = [
            sum(cost(groups[index].prompt_tokens + length) for length in groups[index].lengths)
            for index in indices
        ]
        for share, part in zip(shares, split(costs, ranks), strict=True):
            share += [indices[place] for place in part]
    return shares


def rollouts_of(groups: Sequence[GroupWork], index: int) -> list[list[Row]]:
    """The rows of each rollout of a group."""
    work = groups[index]
    rows: dict[int, list[Row]] = {}
    for place, (owner, length) in enumerate(zip(work.rollouts, work.lengths, strict=True)):
        rows.setdefault(owner, []).append(Row(index, place, work.prompt_tokens + length))
    return list(rows.values())


def plan_updates(
    config: RunConfig,
    step: int,
    groups: Sequence[GroupWork],
    ranks: int,
    loss: Callable[[Any], LossTerms],
    *,
    recompute_old: bool = False,
    early_stop: tuple[str, float] | None = None,
    whole_rollouts: bool = False,
) -> list[UpdateJob]:
    """One job a rank: mini-batches of whole groups, each shared out over the ranks by cost. Pure.

    A job holds the groups that its rank's rows come from and no others, so all jobs together grow
    with the groups and not with the groups times the ranks.
    """
    shares: list[list[tuple[Row, ...]]] = [[] for _ in range(ranks)]
    for indices in minibatches(config, step):
        rollouts = [rows for index in indices for rows in rollouts_of(groups, index)]
        for share, part in zip(shares, share_out(rollouts, ranks), strict=True):
            share.append(part)
    own = [only_its_own(groups, share) for share in shares]
    return [
        UpdateJob(
            step=step,
            groups=needed,
            minibatches=rows,
            loss=loss,
            recompute_old=recompute_old,
            temperature=config.rollout.temperature,
            budget=config.rollout.max_completion_length,
            early_stop=early_stop,
            whole_rollouts=whole_rollouts,
        )
        for needed, rows in own
    ]


def plan_step(
    config: RunConfig, step: int, algorithm: Algorithm, groups: Sequence[GroupWork]
) -> dict[str, list[UpdateJob]]:
    """The jobs of policy and, where there is one, critic, one a rank. Pure.

    Old log-probs are those of the policy at the start of the step: they are computed before the
    first of several updates, unless `prepare` has brought them. With one update they are its own,
    unless dropout is in that and the rollout engine, which has none, is corrected for.
    """
    several, lora = len(minibatches(config, step)) > 1, config.model.lora
    noisy = lora is not None and lora.dropout > 0 and algorithm.correction != "none"
    plans = {
        POLICY: plan_updates(
            config,
            step,
            groups,
            config.policy.ranks,
            algorithm.loss,
            recompute_old=algorithm.old == "policy"
            and (several or noisy)
            and not algorithm.prepares,
            early_stop=algorithm.early_stop,
            whole_rollouts=algorithm.whole_rollouts,
        )
    }
    if algorithm.needs.critic:
        loss = algorithm.value_loss
        plans[CRITIC] = plan_updates(config, step, groups, config.critic.ranks, loss)
    return plans
