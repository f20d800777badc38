"""A training step of episodes, from the turns of the policy to the gradients of policy and critic.

Groups are ragged: of other numbers of rollouts, some of several rows, with tokens of tools amid
those of the policy, and rewards of single turns. What is trained does not depend on how the step is
cut, packed, padded or shared out over ranks, and a rollout weighs the same whatever its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.critic import CriticActor
from actors.environments.base import Episode, ModelCall
from actors.environments.groups import made_group
from actors.messages import (
    FinishReason,
    GroupWork,
    LossTerms,
    PrepareJob,
    Prompt,
    Scores,
    Segment,
    TokenBatch,
    VersionSpan,
)
from actors.specs import CriticSpec, ModelSpec
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.groups import ReadyGroup, group_works
from aligntune.online.learner import _by_group
from aligntune.online.sharing import plan_step, whole_groups
from tests.actors.policy_cases import VOCABULARY, Probe, make_model_folder, one_rank
from tests.actors.test_same_loss import TOLERANCE, WHOLE, Gather, assert_same

AGAINST_ROLLOUT: dict[str, Any] = {"old": "rollout", "correction": "none"}
ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO(entropy_coefficient=0.01, **AGAINST_ROLLOUT),
    "drgrpo": DrGRPO(beta=0.04),
    "dapo": DAPO(**AGAINST_ROLLOUT),
    "gspo": GSPO(clip_low=0.1, clip_high=0.1, beta=0.04, **AGAINST_ROLLOUT),
    "ppo": PPO(),
}
PROMPT = Prompt(0, "a", "a", np.array([1], dtype=np.int32))


@dataclass(frozen=True)
class Turn:
    """Tokens that the policy samples, then tokens of a tool; `forked`: with a history that was
    rendered anew, which makes another row."""

    sampled: int
    told: int
    forked: bool


Rollout = Sequence[Turn]
turns = st.builds(Turn, st.integers(1, 5), st.integers(0, 3), st.sampled_from([False, False, True]))
rollouts = st.lists(turns, min_size=1, max_size=4)
some_groups = st.lists(st.lists(rollouts, min_size=2, max_size=4), min_size=1, max_size=4)
many_groups = st.lists(  # enough for whole groups on each of three ranks
    st.lists(st.lists(turns, min_size=1, max_size=2), min_size=1, max_size=2),
    min_size=12,
    max_size=12,
)
cuts = st.tuples(st.sampled_from([1, 13, 24, 40, WHOLE]), st.integers(1, 30), st.booleans())
ONE, OTHER = [Turn(3, 2, False), Turn(2, 0, False)], [Turn(2, 1, False), Turn(4, 1, True)]


def episode(rollout: Rollout, draw: np.random.Generator) -> Episode:
    """An episode of these turns, each of which is worth something."""
    prompt = [3, 4, 5]
    ids, calls = prompt, []
    for turn in rollout:
        if turn.forked:
            ids = [*prompt, *draw.integers(3, VOCABULARY, 3).tolist()]
        sampled = draw.integers(3, VOCABULARY, turn.sampled).astype(np.int32)
        logprobs = draw.normal(-4, 0.3, turn.sampled).astype(np.float32)
        segment = Segment(sampled, logprobs, (VersionSpan(0, turn.sampled),))
        calls.append(ModelCall(np.array(ids, dtype=np.int32), segment, FinishReason.STOP))
        ids = [*ids, *sampled.tolist(), *draw.integers(3, VOCABULARY, turn.told).tolist()]
    return Episode(
        calls=tuple(calls),
        finish_reason=FinishReason.TURNS if draw.random() < 0.3 else FinishReason.STOP,
        messages=[],
        rewards={"environment": float(draw.normal())},
        turn_rewards=tuple(draw.normal(size=len(calls)).tolist()),
    )


@cache
def config(groups: int) -> RunConfig:
    made = load_config(
        {
            "algorithm": "tests.e2e.algorithms:PPOOnFunctions",  # has both policy and critic
            "model": {"name": "m"},
            "data": {"path": "d"},
            "environment": "a.game:Game",
            "rewards": [{"function": "environment", "weight": 0.5}],
            "output_dir": "out",
            "rollout": {"max_completion_length": 16, "temperature": 0.9},
            "train": {"groups_per_step": groups, "groups_per_minibatch": groups},
        },
        ["train.epochs_per_batch=1"],
    )
    assert isinstance(made, RunConfig)
    return made


def ready(groups: Sequence[Sequence[Rollout]]) -> list[ReadyGroup]:
    """The groups, played and scored, with reference log-probs."""
    made = []
    for number, rollouts in enumerate(groups):
        draw = np.random.default_rng([number, len(groups)])
        record, tensors, talks = made_group(
            number, [episode(rollout, draw) for rollout in rollouts], 0.9, 0.1, "rollout-0"
        )
        assert record.episodes is not None
        rewards = record.episodes.rewards["environment"]
        scores = Scores(number, ("environment",), tuple((r,) for r in rewards), 0.0)
        drift = draw.normal(0, 0.1, len(tensors.logprobs))
        reference = (tensors.logprobs + drift).astype(np.float32)
        made.append(ReadyGroup(PROMPT, record, scores, None, tensors, talks, reference))
    return made


@dataclass
class Part:
    """The ranks of one model, in threads of this process."""

    probes: list[Probe]

    def together(self, cut: tuple[int, int, bool], work: Any, given: Sequence[Any]) -> list[Any]:
        """`work(probe, its own)` on each rank."""
        exchange = Gather(len(given))
        ranks = self.probes[: len(given)]
        for rank, probe in enumerate(ranks):
            probe.actor._strategy.gather = exchange.of(rank)  # type: ignore[method-assign]
            settings = {"tokens_per_microbatch": cut[0], "packing": cut[2]}
            probe.actor._spec = probe.actor._spec.model_copy(update=settings)
        with ThreadPoolExecutor(len(given)) as threads:
            return list(threads.map(work, ranks, given, timeout=120))


def in_float64(actor: Any) -> Probe:
    actor._strategy.model.double()
    return Probe(actor)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Part]:
    folder = make_model_folder(tmp_path_factory.mktemp("policy"))
    spec = CriticSpec(
        learning_rate=1e-2,
        adam_betas=(0.9, 0.999),
        tokens_per_microbatch=64,
        max_grad_norm=1e9,
        start_timeout_s=120,
        update_timeout_s=120,
    )
    critics = [CriticActor(ModelSpec(name=str(folder)), spec, 0, 1, 100, 0) for _ in range(3)]
    for critic in critics:
        critic.start("", 0)
        with torch.no_grad():  # a head of zeros would value all states alike
            for name, weight in critic._strategy.model.named_parameters():
                if weight.ndim == 2 and weight.shape[0] == 1:
                    weight.copy_(torch.linspace(-1, 1, weight.numel())[None])
                    assert "score" in name
    return {
        "policy": Part([in_float64(one_rank(folder)) for _ in range(3)]),
        "critic": Part([in_float64(critic) for critic in critics]),
    }


def prepared(
    parts: dict[str, Part],
    algorithm: Algorithm,
    config: RunConfig,
    works: list[GroupWork],
    cut: tuple[int, int, bool],
    ranks: int,
) -> list[GroupWork]:
    """The groups with values and targets, as `Learner.prepare` has them made."""

    def spread(part: str, work: Any, given: list[Any], shares: list[list[int]]) -> dict[int, Any]:
        answers = parts[part].together(cut, work, given)
        made = [answer[1:] if isinstance(answer, tuple) else () for answer in answers]
        return _by_group(shares, made)

    shares = whole_groups(config, 1, works, ranks)
    tensors = [[works[i].tensors for i in share] for share in shares]
    values = spread("critic", lambda probe, own: probe.actor.values(own), tensors, shares)
    works = [replace(work, values=values[i]) for i, work in enumerate(works)]
    jobs = [
        PrepareJob(1, tuple(works[i] for i in share), algorithm.prepare, True, 0.9)
        for share in shares
    ]
    targets = spread("policy", lambda probe, job: probe.actor.prepare(job), jobs, shares)
    return [replace(work, targets=targets[i], values=None) for i, work in enumerate(works)]


def step(
    parts: dict[str, Part],
    algorithm: Algorithm,
    groups: list[ReadyGroup],
    cut: tuple[int, int, bool],
    ranks: int,
) -> dict[str, Any]:
    """(gradients, figures) of policy and critic, all ranks together."""
    settings = config(len(groups))
    settings = settings.model_copy(
        update={
            role: getattr(settings, role).model_copy(update={"ranks": ranks})
            for role in ("policy", "critic")
        }
    )
    works = group_works(settings, algorithm, groups)
    if algorithm.prepares:
        works = prepared(parts, algorithm, settings, works, cut, ranks)
    found = {}
    for name, jobs in plan_step(settings, 1, algorithm, works).items():
        answers = parts[name].together(cut, lambda probe, job: probe.gradient(job, *cut), jobs)
        gradient = {key: sum(own[key] for own, _ in answers) for key in answers[0][0]}
        figures = {k: v for k, v in answers[0][1].items() if not k.endswith("grad_norm")}
        found[name] = gradient, figures
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@settings(deadline=None, max_examples=6)
@given(groups=some_groups | many_groups, cut=cuts, ranks=st.integers(1, 3))
@example(groups=[[ONE, OTHER, ONE], [OTHER, ONE]], cut=(13, 7, True), ranks=2)
def test_a_step_of_episodes_is_the_same_however_it_is_cut_and_shared_out(
    parts: dict[str, Part], name: str, groups: Any, cut: Any, ranks: int
) -> None:
    algorithm, given = ALGORITHMS[name], ready(groups)
    wanted = step(parts, algorithm, given, (WHOLE, WHOLE, False), 1)
    got = step(parts, algorithm, given, cut, ranks)
    assert set(got) == set(wanted) == ({"policy", "critic"} if name == "ppo" else {"policy"})
    for part in wanted:
        if all(float(g.norm()) == 0 for g in wanted[part][0].values()):
            assert all(float(g.norm()) == 0 for g in got[part][0].values())  # no contrast
        else:
            assert_same(got[part], wanted[part], TOLERANCE)


class Weights:
    """A loss that notes how much each rollout pulls: minus its gradient by log-probs, all in all,
    for an advantage of 1, where no ratio has moved yet."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self.of: dict[float, float] = {}  # by the rollout's advantage

    def __call__(self, batch: TokenBatch) -> LossTerms:
        leaf = batch.logp.detach().requires_grad_()
        terms = self._algorithm.loss(replace(batch, logp=leaf, old=leaf.detach()))
        (gradient,) = torch.autograd.grad(terms.loss, leaf)
        for row, advantages in zip(gradient, batch.advantages, strict=True):
            advantage = round(float(advantages[0]), 9)
            self.of[advantage] = self.of.get(advantage, 0.0) - float(row.sum()) / advantage
        return self._algorithm.loss(batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "drgrpo", "dapo", "gspo"])
@pytest.mark.parametrize("cut", [(1, 3, False), (40, 7, True)])
def test_a_rollout_of_several_rows_weighs_as_much_as_one_of_a_single_row(
    parts: dict[str, Part], name: str, cut: Any
) -> None:
    """Four rollouts of six sampled tokens each, in one, two, three rows and one again."""
    split = [
        [Turn(3, 1, False), Turn(3, 0, False)],
        [Turn(3, 1, False), Turn(3, 0, True)],
        [Turn(2, 1, False), Turn(2, 1, True), Turn(2, 0, True)],
        [Turn(6, 0, False)],
    ]
    (group,) = ready([split])
    assert group.record.rollouts == (0, 1, 1, 2, 2, 2, 3)
    plain = {"correction": "none", "beta": 0.0, "entropy_coefficient": 0.0, "old": "policy"}
    weights = Weights(ALGORITHMS[name].model_copy(update=plain))
    algorithm = weights._algorithm
    (work,) = group_works(config(1), algorithm, [group])
    work = replace(work, advantages=(1.0, 2.0, 3.0, 4.0))
    (job,) = plan_step(config(1), 1, algorithm, [work])["policy"]
    parts["policy"].together(
        cut, lambda probe, job: probe.gradient(job, *cut), [replace(job, loss=weights)]
    )
    each = {"grpo": 1 / 4, "gspo": 1 / 4, "dapo": 6 / 24, "drgrpo": 6 / (4 * 16)}[name]
    assert weights.of == pytest.approx(dict.fromkeys((1.0, 2.0, 3.0, 4.0), each), rel=1e-9)
