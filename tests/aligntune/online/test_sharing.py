"""How a training step is cut: optimiser steps over epochs, whole groups over ranks."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import GroupWork, UpdateJob
from actors.packing import cost
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.sharing import minibatches, plan_step, plan_updates, whole_groups
from aligntune.online.work import work_of
from cluster.plan.shapes import from_table


@cache
def config(**train: Any) -> RunConfig:
    return load_config(
        {
            "algorithm": "grpo",
            "model": {"name": "m"},
            "data": {"path": "d"},
            "rewards": ["length"],
            "output_dir": "out",
            "train": {"groups_per_step": 6, "groups_per_minibatch": 2, **train},
        }
    )


def group(index: int, lengths: tuple[int, ...]) -> GroupWork:
    count = len(lengths)
    return GroupWork(
        group_id=index,
        prompt_tokens=3,
        lengths=lengths,
        trained=(True,) * count,
        truncated=(False,) * count,
        advantages=(0.0,) * count,
        scores=(0.0,) * count,
        tensors=None,
    )


def epochs(plan: list[list[int]], of: int = 3) -> list[list[list[int]]]:
    return [plan[start : start + of] for start in range(0, len(plan), of)]


def test_the_first_epoch_takes_groups_as_they_come_and_later_ones_another_order() -> None:
    first, second, third = epochs(minibatches(config(epochs_per_batch=3), step=1))
    assert first == [[0, 1], [2, 3], [4, 5]]
    for later in (second, third):
        assert sorted(chain(*later)) == list(range(6))
    assert len({str(first), str(second), str(third)}) == 3


def test_the_order_is_a_function_of_seed_and_step_alone() -> None:
    many = config(epochs_per_batch=4, groups_per_step=24, seed=5)
    other_seed = config(epochs_per_batch=4, groups_per_step=24, seed=6)
    assert minibatches(many, 3) == minibatches(many, 3)
    assert minibatches(many, 3) != minibatches(many, 4)
    assert minibatches(many, 3) != minibatches(other_seed, 3)


@pytest.mark.slow
@given(
    lengths=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=6, max_size=6),
    ranks=st.integers(1, 3),
    passes=st.integers(1, 3),
)
def test_every_row_is_trained_on_once_an_epoch_and_every_group_has_one_rank(
    lengths: list[list[int]], ranks: int, passes: int
) -> None:
    groups = [group(index, tuple(own)) for index, own in enumerate(lengths)]
    jobs = plan_updates(config(epochs_per_batch=passes), 1, groups, ranks, loss=len)  # type: ignore[arg-type]
    assert len(jobs) == ranks
    rows = sorted((index, c) for index, g in enumerate(groups) for c in range(len(g.lengths)))
    for epoch in range(passes):
        steps = slice(3 * epoch, 3 * epoch + 3)
        seen = [
            (job.groups[row.work].group_id, row)
            for job in jobs
            for part in job.minibatches[steps]
            for row in part
        ]
        assert sorted((index, row.completion) for index, row in seen) == rows
        assert all(row.tokens == 3 + lengths[index][row.completion] for index, row in seen)
    assert {len(job.minibatches) for job in jobs} == {3 * passes}
    shares = whole_groups(config(epochs_per_batch=passes), 1, groups, ranks)
    assert sorted(chain(*shares)) == list(range(6))


def sampled(number: int, completions: int) -> list[GroupWork]:
    """Groups of a run: lengths of a long tail, and references as large as Ray's."""
    draw = random.Random(0)
    groups = []
    for index in range(number):
        lengths = tuple(int(draw.lognormvariate(6.2, 1.0)) for _ in range(completions))
        advantages = tuple(draw.gauss(0, 1) for _ in lengths)
        tensors, reference = draw.randbytes(120), draw.randbytes(120)
        groups.append(
            replace(
                group(index, lengths),
                advantages=advantages,
                scores=advantages,
                tensors=tensors,
                reference=reference,
            )
        )
    return groups


def test_a_rank_is_sent_the_groups_that_its_rows_come_from_and_no_others() -> None:
    settings = config(groups_per_step=64, groups_per_minibatch=64, epochs_per_batch=2)
    jobs = plan_updates(settings, 1, sampled(64, 4), ranks=8, loss=len)  # type: ignore[arg-type]
    for job in jobs:
        used = {row.work for part in job.minibatches for row in part}
        assert used == set(range(len(job.groups)))
        assert len({work.group_id for work in job.groups}) == len(job.groups)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(512, 1), (512, 8), (4096, 64)])
def test_the_bytes_of_an_updates_jobs_grow_with_the_groups_and_not_with_the_ranks(
    number: int, ranks: int
) -> None:
    """Groups of 8 completions take 800 bytes each, two references of 120 among them."""
    settings = config(groups_per_step=number, groups_per_minibatch=number)
    jobs = plan_updates(settings, 1, sampled(number, 8), ranks, loss=len)  # type: ignore[arg-type]
    assert sum(len(job.groups) for job in jobs) == number, "each has one rank"
    assert sum(len(pickle.dumps(job)) for job in jobs) <= 800 * number
    loads = [sum(cost(row.tokens) for part in job.minibatches for row in part) for job in jobs]
    assert max(loads) <= 1.02 * sum(loads) / ranks


@pytest.mark.parametrize("per_minibatch", [8, 32])
def test_values_and_targets_are_made_where_the_group_is_trained_on(per_minibatch: int) -> None:
    """Where mini-batches are shared out by whole groups; else groups are balanced over the step."""
    settings = config(groups_per_step=32, groups_per_minibatch=per_minibatch, epochs_per_batch=1)
    groups = sampled(32, 4)
    jobs = plan_updates(settings, 1, groups, ranks=4, loss=len)  # type: ignore[arg-type]
    shares = whole_groups(settings, 1, groups, ranks=4)
    trained = [sorted(work.group_id for work in job.groups) for job in jobs]
    assert ([sorted(share) for share in shares] == trained) is (per_minibatch == 32)
    loads = [sum(cost(3 + n) for index in share for n in groups[index].lengths) for share in shares]
    assert max(loads) <= 1.05 * sum(loads) / 4


@pytest.mark.slow
@given(
    joined=st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=6, max_size=6),
    ranks=st.integers(1, 4),
)
def test_the_rows_of_a_rollout_go_to_one_rank(joined: list[list[bool]], ranks: int) -> None:
    groups = []
    for index, more in enumerate(joined):
        owners = [0]
        for new in more:
            owners.append(owners[-1] + new)
        lengths = tuple(range(1, len(owners) + 1))
        groups.append(replace(group(index, lengths), rollouts=tuple(owners)))
    jobs = plan_updates(config(), 1, groups, ranks, loss=len)  # type: ignore[arg-type]
    seen: dict[tuple[int, int], set[int]] = {}
    rows = []
    for rank, job in enumerate(jobs):
        for row in chain(*job.minibatches):
            index = job.groups[row.work].group_id
            owner = groups[index].rollouts[row.completion]
            seen.setdefault((index, owner), set()).add(rank)
            rows.append((index, row.completion))
    assert all(len(places) == 1 for places in seen.values())
    assert sorted(rows) == [
        (g, r) for g, work in enumerate(groups) for r in range(len(work.lengths))
    ]


def test_losses_of_whole_rollouts_say_so_to_the_ranks() -> None:
    assert jobs_of("gspo")["policy"][0].whole_rollouts
    assert not jobs_of("dapo")["policy"][0].whole_rollouts


def resolved_of(
    algorithm: str | dict[str, Any], lora: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    tree = config(**train).model_dump(mode="json")
    changes = {"model": {"name": "m", "lora": lora}, "policy": {}, "reference": {}}
    return load_config({**tree, "algorithm": algorithm, **changes})


def jobs_of(
    algorithm: str | dict[str, Any], lora: dict[str, Any] | None = None, **train: Any
) -> dict[str, list[UpdateJob]]:
    resolved = resolved_of(algorithm, lora, **train)
    groups = [group(index, (2, 3)) for index in range(6)]
    return plan_step(resolved, 1, resolved.algorithm, groups)


@pytest.mark.parametrize(
    ("algorithm", "train", "before"),
    [
        ("dapo", {"groups_per_minibatch": 6}, False),  # one update: its own log-probs are the old
        ("dapo", {"groups_per_minibatch": 2}, True),
        ("gspo", {"groups_per_minibatch": 6, "epochs_per_batch": 2}, True),
        ({"name": "dapo", "old": "rollout"}, {"groups_per_minibatch": 2}, False),
        ({"name": "grpo", "kl_in": "reward"}, {"groups_per_minibatch": 2}, False),  # prepared
    ],
)
def test_old_log_probs_are_computed_before_the_first_of_several_updates(
    algorithm: str | dict[str, Any], train: dict[str, Any], before: bool
) -> None:
    jobs = jobs_of(algorithm, **train)
    assert set(jobs) == {"policy"}
    assert [job.recompute_old for job in jobs["policy"]] == [before]


@pytest.mark.parametrize(
    ("algorithm", "dropout", "before"),
    [
        ({"name": "dapo"}, 0.1, True),
        ({"name": "dapo"}, 0.0, False),
        ({"name": "dapo", "correction": "none"}, 0.1, False),
        ({"name": "dapo", "old": "rollout"}, 0.1, False),
    ],
)
def test_old_log_probs_are_computed_where_dropout_would_be_in_the_correction(
    algorithm: dict[str, Any], dropout: float, before: bool
) -> None:
    jobs = jobs_of(algorithm, {"dropout": dropout}, groups_per_minibatch=6)
    assert [job.recompute_old for job in jobs["policy"]] == [before]


@pytest.mark.parametrize(
    ("algorithm", "lora", "train", "passes"),
    [
        ("dapo", None, {"groups_per_minibatch": 6}, 0.0),
        ("dapo", None, {"groups_per_minibatch": 6, "epochs_per_batch": 2}, 0.0),  # the first's own
        ("dapo", None, {"groups_per_minibatch": 2, "epochs_per_batch": 2}, 2 / 3),
        ({"name": "dapo", "old": "rollout"}, None, {"groups_per_minibatch": 2}, 0.0),
        ({"name": "grpo", "kl_in": "reward"}, None, {"groups_per_minibatch": 6}, 1.0),
        ("dapo", {"dropout": 0.1}, {"groups_per_minibatch": 6}, 1.0),
        ("dapo", {"dropout": 0.1}, {"groups_per_minibatch": 2}, 1.0),
        ({"name": "dapo", "correction": "none"}, {"dropout": 0.1}, {"groups_per_minibatch": 6}, 0),
        ({"name": "dapo", "correction": "none"}, {"dropout": 0.1}, {"groups_per_minibatch": 2}, 1),
    ],
)
def test_a_plan_knows_the_passes_for_old_log_probs(
    algorithm: Any, lora: dict[str, Any] | None, train: dict[str, Any], passes: float
) -> None:
    resolved = resolved_of(algorithm, lora, **train)
    shape = from_table("Qwen/Qwen2.5-0.5B")
    assert work_of(resolved, lambda _: shape).step.old_passes == pytest.approx(passes)


def test_the_policy_may_stop_early_and_the_critic_learns_from_the_same_rows() -> None:
    limited = {"name": "tests.e2e.algorithms:PPOOnFunctions", "max_update_kl": 0.02}
    jobs = jobs_of(limited)
    (policy,), (critic,) = jobs["policy"], jobs["critic"]
    assert policy.early_stop == ("kl/update", 0.02)
    assert critic.early_stop is None
    assert policy.minibatches == critic.minibatches
    assert policy.loss.__name__ == "loss"
    assert critic.loss.__name__ == "value_loss"
    assert jobs_of("tests.e2e.algorithms:PPOOnFunctions")["policy"][0].early_stop is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"algorithm": {"name": "dapo"}, "reference": {"replicas": 2}}, "dapo has no reference"),
        (
            {
                "algorithm": {
                    "name": "tests.e2e.algorithms:PPOOnFunctions",
                    "max_update_kl": 0.02,
                },
                "train": {"groups_per_step": 4, "epochs_per_batch": 1},
            },
            "a step has one update",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_refused(changes: dict[str, Any], reason: str) -> None:
    tree = {**config().model_dump(mode="json"), **changes}
    with pytest.raises(UserError, match=reason):
        load_config(tree)


def test_settings_of_a_critic_that_is_not_there_are_refused() -> None:
    tree = config().model_dump(mode="json")
    assert load_config(tree) == config()
    tree["critic"]["ranks"] = 2
    with pytest.raises(UserError, match="grpo has no critic"):
        load_config(tree)


def test_a_critic_has_the_algorithms_rate_and_its_own_limits() -> None:
    tree = {
        **config().model_dump(mode="json"),
        "algorithm": "tests.e2e.algorithms:PPOOnFunctions",
        "train": {"groups_per_step": 4},
    }
    resolved = load_config(tree)
    assert resolved.critic.learning_rate == 1e-5
    assert resolved.critic.adam_betas == (0.9, 0.999)
    assert load_config(resolved.model_dump(mode="json")) == resolved
    tree["critic"] = {"ranks": 2, "strategy": "torch"}
    with pytest.raises(UserError, match=r"critic\.strategy=torch is one rank"):
        load_config(tree)
