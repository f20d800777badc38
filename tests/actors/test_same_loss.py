"""The gradient does not depend on micro-batch size, packing, padding or the number of ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from actors.messages import GroupTensors
from actors.strategies.specs import DeepSpeedSpec, FSDPSpec, StrategySpec
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO
from tests.actors.policy_cases import (
    Probe,
    Ranks,
    gradients,
    make_group,
    make_jobs,
    make_model_folder,
    one_rank,
    simple_loss,
)
from tests.aligntune.algorithms import slow

TOLERANCE = 1e-6  # float32, relative to the norm of the gradient and the size of a figure

Result = tuple[dict[str, torch.Tensor], dict[str, float]]  # gradients and metrics
WHOLE = 10**6  # a budget that everything fits into
LOSSES = {
    "simple": simple_loss,
    "grpo": GRPO(beta=0.04, entropy_coefficient=0.01).loss,
    "drgrpo": DrGRPO(beta=0.04).loss,
    "dapo": DAPO(entropy_coefficient=0.01).loss,
    "gspo": GSPO(beta=0.04).loss,
    "ppo": PPO(kl_in="loss", kl_estimator="k3").loss,
}
STRATEGIES: dict[str, StrategySpec] = {
    **{f"zero{stage}": DeepSpeedSpec.model_validate({"stage": stage}) for stage in (1, 2, 3)},
    "fsdp": FSDPSpec(),
}
RANKS = [
    (1, "fsdp"),
    *((2, name) for name in STRATEGIES),
    *((3, name) for name in ("zero3", "fsdp")),
    *(pytest.param((3, name), marks=pytest.mark.long) for name in ("zero1", "zero2")),
]

batches = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 12), min_size=2, max_size=4)),
    min_size=1,
    max_size=4,
)
many = st.lists(  # enough for whole groups on each of three ranks
    st.tuples(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=2, max_size=2)),
    min_size=12,
    max_size=13,
)
cuts = st.tuples(st.sampled_from([1, 13, 24, 40, WHOLE]), st.integers(1, 30), st.booleans())


def groups_of(shapes: list[tuple[int, list[int]]]) -> list[GroupTensors]:
    return [
        make_group(index, prompt, lengths, holes=True)
        for index, (prompt, lengths) in enumerate(shapes)
    ]


def leave_some_out(group: int, completion: int) -> bool:
    return (group + completion) % 4 != 3


def some_joined(group: int, rows: int) -> tuple[int, ...]:
    """Groups of other sizes, some of whose rollouts have several rows."""
    owners = [0]
    for row in range(1, rows):
        owners.append(owners[-1] + ((group + row) % 3 != 2))
    return tuple(owners)


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])


def assert_same(
    got: Result, wanted: Result, tolerance: float = TOLERANCE, exact: Result | None = None
) -> None:
    """`exact` is `wanted` in float64: what float32 rounds off in `wanted` is allowed on top, for
    where gradients of rows cancel that alone can be more than the tolerance."""
    (gradient, metrics), (wanted_gradient, wanted_metrics) = got, wanted
    assert set(gradient) == set(wanted_gradient)
    target = flat(wanted_gradient)
    assert float(target.norm()) > 0
    rounding = float((target - flat(exact[0])).norm()) if exact else 0.0
    difference = float((flat(gradient) - target).norm())
    assert difference <= tolerance * float(target.norm()) + rounding
    assert rounding <= 10 * tolerance * float(target.norm())
    assert set(metrics) == set(wanted_metrics)
    for name, value in wanted_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def single(folder: Path) -> Probe:
    return Probe(one_rank(folder))


@pytest.fixture(scope="module")
def single_float64(folder: Path) -> Probe:
    actor = one_rank(folder, packing=True)  # by rows, where `single` has a dense mask
    actor._strategy.model.double()
    return Probe(actor)


@pytest.fixture(scope="module")
def sharing(folder: Path) -> Probe:
    """In float32, with each prompt once in a micro-batch."""
    return Probe(one_rank(folder, shared_prompts=True))


@pytest.fixture(scope="module")
def three(folder: Path) -> list[Probe]:
    """Three actors in float64, to be ranks of one policy."""
    actors = [one_rank(folder) for _ in range(3)]
    for actor in actors:
        actor._strategy.model.double()
    return [Probe(actor) for actor in actors]


@pytest.fixture(scope="module", params=RANKS, ids=lambda ranks: "{}-ranks-{}".format(*ranks))
def ranks(folder: Path, request: Any) -> Iterator[tuple[int, Ranks]]:
    world, name = request.param
    made = Ranks(folder, world, STRATEGIES[name])
    yield world, made
    made.close()


def job_of_one_rank(shapes: Any, loss: str, recompute_old: bool) -> Any:
    """All of a batch, with some tokens left out and some rows joined."""
    (job,) = make_jobs(
        groups_of(shapes),
        LOSSES[loss],
        recompute_old=recompute_old,
        trained=leave_some_out,
        with_reference=True,
        rollouts=some_joined,
        whole_rollouts=loss == "gspo",
    )
    return job


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shapes=batches, cut=cuts, recompute_old=st.booleans())
def test_on_one_rank_whatever_the_microbatches(
    single: Probe, single_float64: Probe, loss: str, recompute_old: bool, shapes: Any, cut: Any
) -> None:
    job = job_of_one_rank(shapes, loss, recompute_old)
    wanted, exact = (p.gradient(job, WHOLE, WHOLE, False) for p in (single, single_float64))
    assert_same(single.gradient(job, *cut), wanted, exact=exact)


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@given(shapes=batches, cut=cuts, recompute_old=st.booleans())
def test_a_prompt_that_is_computed_once_gives_the_same_loss(
    single: Probe,
    single_float64: Probe,
    sharing: Probe,
    loss: str,
    recompute_old: bool,
    shapes: Any,
    cut: Any,
) -> None:
    """Of episodes of several rows, too: all rows of a group begin with its prompt."""
    job = job_of_one_rank(shapes, loss, recompute_old)
    wanted, exact = (p.gradient(job, WHOLE, WHOLE, False) for p in (single, single_float64))
    assert_same(sharing.gradient(job, *cut), wanted, exact=exact)


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(shapes=batches, cut=cuts)
def test_the_law_is_exact_beyond_rounding(single_float64: Probe, shapes: Any, cut: Any) -> None:
    """In float64 the difference is a billion times smaller: it is rounding, not weighting."""
    (job,) = make_jobs(groups_of(shapes), simple_loss, recompute_old=False, trained=leave_some_out)
    probe = single_float64
    assert_same(probe.gradient(job, *cut), probe.gradient(job, WHOLE, WHOLE, False), 1e-13)


class Gather:
    """What ranks in threads of one process exchange, in rank order."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world)
        self._given: list[Any] = [None] * world

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        """The `gather` of one rank's strategy."""

        def gather(value: Any) -> list[Any]:
            self._given[rank] = value
            self._barrier.wait(60)
            everything = list(self._given)
            self._barrier.wait(60)
            return everything

        return gather


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(shapes=many, cut=cuts)
def test_whole_groups_on_each_rank_add_up_to_the_gradient_of_the_step(
    single_float64: Probe, three: list[Probe], shapes: Any, cut: Any
) -> None:
    """Ranks in threads: what each is sent is all that it needs, and nothing counts twice."""
    make: Any = {"loss": simple_loss, "trained": leave_some_out, "rollouts": some_joined}
    (whole,) = make_jobs(groups_of(shapes), **make)
    jobs = make_jobs(groups_of(shapes), world=3, **make)
    assert sum(len(job.groups) for job in jobs) == len(shapes)
    exchange = Gather(3)
    for rank, probe in enumerate(three):
        probe.actor._strategy.gather = exchange.of(rank)  # type: ignore[method-assign]
    with ThreadPoolExecutor(3) as threads:
        parts = list(
            threads.map(lambda probe, job: probe.gradient(job, *cut), three, jobs, timeout=120)
        )
    gradient = {name: sum(own[name] for own, _ in parts) for name in parts[0][0]}
    wanted = single_float64.gradient(whole, WHOLE, WHOLE, False)
    figures = {k: v for k, v in parts[0][1].items() if k != "policy/grad_norm"}  # of a part
    rest = {k: v for k, v in wanted[1].items() if k != "policy/grad_norm"}
    assert_same((gradient, figures), (wanted[0], rest), 1e-12)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(
    deadline=None,
    max_examples=8,
    phases=[Phase.generate],  # ranks that failed once are not fit for shrinking
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(shapes=batches | many, cut=cuts, loss=st.sampled_from(sorted(LOSSES)))
def test_on_any_number_of_ranks(
    single: Probe,
    single_float64: Probe,
    ranks: tuple[int, Ranks],
    shapes: Any,
    cut: Any,
    loss: str,
) -> None:
    world, processes = ranks
    make: Any = {
        "loss": LOSSES[loss],
        "trained": leave_some_out,
        "with_reference": True,
        "rollouts": some_joined,
        "whole_rollouts": loss == "gspo",
    }
    (whole,) = make_jobs(groups_of(shapes), **make)
    shares = make_jobs(groups_of(shapes), world=world, **make)
    wanted, exact = (p.gradient(whole, WHOLE, WHOLE, False) for p in (single, single_float64))
    for got in processes.call(Probe.gradient, [(job, *cut) for job in shares]):
        assert_same(got, wanted, exact=exact)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_ranks_that_share_a_model_share_prompts_too(
    folder: Path, single: Probe, single_float64: Probe, name: str
) -> None:
    shapes = [(6, [5, 2, 7, 4]), (9, [3, 6, 1]), (2, [4])]
    make: Any = {"loss": simple_loss, "rollouts": some_joined}
    (whole,) = make_jobs(groups_of(shapes), **make)
    shares = make_jobs(groups_of(shapes), world=2, **make)
    wanted, exact = (p.gradient(whole, WHOLE, WHOLE, False) for p in (single, single_float64))
    ranks = Ranks(folder, 2, STRATEGIES[name], shared_prompts=True)
    try:
        for got in ranks.call(Probe.gradient, [(job, 24, 5, True) for job in shares]):
            assert_same(got, wanted, exact=exact)
    finally:
        ranks.close()


INDEPENDENT = {
    "grpo": (
        GRPO(beta=0.04, entropy_coefficient=0),
        slow.Options(how="sequence_mean", beta=0.04, correction="token"),
    ),
    "drgrpo": (DrGRPO(), slow.Options(how="constant", correction="token")),
    "dapo": (DAPO(), slow.Options(high=0.28, correction="token")),
    "gspo, sequence weights": (
        GSPO(correction="sequence"),
        slow.Options(
            how="sequence_mean", low=3e-4, high=4e-4, level="sequence", correction="sequence"
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("cut", [(1, 3, False), (40, 7, True), (WHOLE, WHOLE, False)])
def test_ragged_groups_have_the_loss_and_gradient_of_the_independent_implementation(
    single_float64: Probe, name: str, cut: Any
) -> None:
    """Groups of 3, 2 and 1 rollouts, some of several rows, some tokens an environment's: by a plain
    forward pass of each row, and loops over the tokens of each rollout."""
    algorithm, options = INDEPENDENT[name]
    groups = groups_of([(3, [5, 2, 7, 4]), (6, [3, 6, 1]), (2, [4, 9, 2])])
    owners = [(0, 1, 1, 2), (0, 0, 1), (0, 0, 0)]
    (job,) = make_jobs(
        groups,
        algorithm.loss,
        recompute_old=False,
        with_reference=True,
        rollouts=lambda group, rows: owners[group],
        whole_rollouts=algorithm.whole_rollouts,
    )
    got, metrics = single_float64.gradient(job, *cut)

    model = single_float64.actor._strategy.model
    logps: list[torch.Tensor] = []
    inputs: dict[str, list[list[Any]]] = {
        field: [] for field in ("logp", "old", "roll", "ref", "entropy", "advantages", "mask")
    }
    for group, work in zip(groups, job.groups, strict=True):
        for row, owner in enumerate(work.rollouts):
            where = group.completion(row)
            tokens = np.concatenate([group.prompt_ids, group.token_ids[where]]).astype(np.int64)
            logits = model.unwrapped(torch.from_numpy(tokens)[None]).logits[0] / job.temperature
            start = len(group.prompt_ids)
            chosen = torch.from_numpy(tokens[start:, None])
            logp = logits[start - 1 : -1].log_softmax(-1).gather(-1, chosen)[:, 0]
            if row == 0 or owner != work.rollouts[row - 1]:
                for rows in inputs.values():
                    rows.append([])
            said = {
                "logp": logp.tolist(),
                "old": logp.tolist(),
                "roll": group.logprobs[where].tolist(),
                "ref": work.reference[where].tolist(),
                "entropy": [0.0] * len(logp),
                "advantages": [work.advantages[owner]] * len(logp),
                "mask": group.mask[where].tolist(),
            }
            for field, values in said.items():
                inputs[field][-1] += values
            logps.append(logp)
    answer = slow.policy_loss(slow.Tensors(**inputs, budget=job.budget), options)
    flow = torch.tensor([x for row in answer.grad_logp for x in row], dtype=torch.float64)
    model.zero_grad()
    (torch.cat(logps) * flow).sum().backward()
    wanted = dict(gradients(single_float64.actor._strategy))
    model.zero_grad()
    assert metrics["loss/total"] == pytest.approx(answer.loss, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(flat(got), flat(wanted), rtol=1e-9, atol=1e-9)
    assert float(flat(wanted).norm()) > 1e-3
