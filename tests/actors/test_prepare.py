"""Token-level targets: made on the policy ranks, by the algorithm, the same whatever the ranks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.critic import CriticActor
from actors.liveness import HEALTH_GROUP
from actors.messages import (
    GroupTensors,
    GroupWork,
    PrepareJob,
    StateValues,
    TokenInputs,
    TokenTargets,
)
from actors.policy import PolicyActor
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.ppo import PPO
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.learner import Learner, PolicyLost
from tests.actors.policy_cases import (
    logprobs_of,
    make_group,
    make_jobs,
    make_model_folder,
    one_rank,
    simple_loss,
    weights,
)

GROUPS = [
    make_group(0, 5, (6, 3)),
    make_group(1, 2, (1, 8), holes=True),
    make_group(2, 7, (4, 4)),
    make_group(3, 3, (2, 5)),
]
ALGORITHMS: dict[str, Algorithm] = {
    "ppo": PPO(),
    "ppo against the rollout": PPO(old="rollout"),
    "grpo, kl in the reward": GRPO(kl_in="reward"),
}


def works_of(groups: Sequence[GroupTensors], values: bool) -> list[GroupWork]:
    """Scored groups with reference log-probs, one truncated completion each, one left out."""
    works = []
    for group in groups:
        draw = np.random.default_rng(group.group_id)
        count, n = len(group.lengths), len(group.token_ids)
        states = StateValues(
            draw.normal(size=n).astype(np.float32), draw.normal(size=count).astype(np.float32)
        )
        rewards = (draw.normal(size=n) * (draw.random(n) < 0.3)).astype(np.float32)
        works.append(
            GroupWork(
                group_id=group.group_id,
                prompt_tokens=len(group.prompt_ids),
                lengths=group.lengths,
                trained=tuple(group.group_id != 2 or c == 0 for c in range(count)),
                truncated=tuple(c == 0 for c in range(count)),
                advantages=(0.0,) * count,
                scores=tuple(draw.normal(size=count).tolist()),
                tensors=replace(group, rewards=rewards),
                turn_weight=0.5,
                reference=(group.logprobs + draw.normal(0, 0.1, n)).astype(np.float32),
                values=states if values else None,
            )
        )
    return works


def plainly(
    algorithm: Algorithm, works: Sequence[GroupWork], old: Sequence[np.ndarray]
) -> tuple[list[TokenTargets], dict[str, float]]:
    """What the algorithm says of all groups in one call."""
    inputs = [
        TokenInputs(
            lengths=work.lengths,
            trained=work.trained,
            truncated=work.truncated,
            scores=work.scores,
            mask=work.tensors.mask,
            old=own,
            reference=work.reference,
            values=work.values and work.values.values,
            final_values=work.values and work.values.final,
            rewards=work.turn_weight * work.tensors.rewards,
        )
        for work, own in zip(works, old, strict=True)
    ]
    return algorithm.prepare(inputs)


def assert_same_targets(got: TokenTargets, wanted: TokenTargets, tolerance: float) -> None:
    for name, value in vars(wanted).items():
        other = getattr(got, name)
        assert (value is None) == (other is None), name
        if value is not None:
            np.testing.assert_allclose(other, value, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> PolicyActor:
    return one_rank(folder)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))
def test_targets_are_what_the_algorithm_says_of_the_policys_log_probs(
    policy: PolicyActor, algorithm: Algorithm
) -> None:
    works = works_of(GROUPS, values=algorithm.needs.critic)
    recompute = algorithm.old == "policy"
    old = logprobs_of(policy, GROUPS, 0.9) if recompute else [g.logprobs for g in GROUPS]
    job = PrepareJob(1, tuple(works), algorithm.prepare, recompute, temperature=0.9)
    figures, *targets = policy.prepare(job)
    wanted, wanted_figures = plainly(algorithm, works, old)
    assert figures == wanted_figures
    for got, own, before in zip(targets, wanted, old, strict=True):
        assert_same_targets(got, own, 0.0)
        assert np.array_equal(got.old, before)
    assert any(target.advantages.any() for target in targets)


def test_rollouts_of_several_rows_are_prepared_end_to_end(policy: PolicyActor) -> None:
    """As groups whose rollouts were single rows of the same tokens, but for the state behind the
    last token, which is that of the rollout's last row."""
    owners = [(0, 0), (0, 1), (0, 1), (0, 0)]
    works, joined = [], []
    for work, own in zip(works_of(GROUPS, values=True), owners, strict=True):
        count = own[-1] + 1
        one_each = {
            name: getattr(work, name)[:count] for name in ("trained", "truncated", "scores")
        }
        several = replace(work, **one_each, advantages=(0.0,) * count, rollouts=own)
        works.append(several)
        states = work.values
        final = states.final if count == 2 else states.final[1:]
        lengths = work.lengths if count == 2 else (sum(work.lengths),)
        joined.append(
            replace(several, lengths=lengths, rollouts=(), values=replace(states, final=final))
        )
    job = PrepareJob(1, tuple(works), PPO().prepare, False, temperature=0.9)
    figures, *targets = policy.prepare(job)
    wanted, wanted_figures = plainly(PPO(), joined, [g.logprobs for g in GROUPS])
    assert figures == wanted_figures
    for got, own_targets in zip(targets, wanted, strict=True):
        assert_same_targets(got, own_targets, 0.0)


def test_old_log_probs_of_the_rollout_cost_no_forward_pass(policy: PolicyActor) -> None:
    def forbidden(**inputs: Any) -> Any:
        raise AssertionError("a forward pass was made")

    works = tuple(works_of(GROUPS, values=True))
    forward = policy._strategy.forward
    policy._strategy.forward = forbidden  # type: ignore[method-assign]
    try:
        policy.prepare(PrepareJob(1, works, PPO().prepare, False, temperature=0.9))
        with pytest.raises(AssertionError, match="a forward pass"):
            policy.prepare(PrepareJob(1, works, PPO().prepare, True, temperature=0.9))
    finally:
        policy._strategy.forward = forward  # type: ignore[method-assign]


def test_each_micro_batch_of_old_log_probs_shows_that_the_rank_moves(policy: PolicyActor) -> None:
    """A pass over many of them takes as long as an update may."""
    seen: list[int] = []
    forward = policy._strategy.forward

    def watched(**inputs: Any) -> Any:
        seen.append(policy.ping())
        return forward(**inputs)

    policy._strategy.forward = watched  # type: ignore[method-assign]
    try:
        works = tuple(works_of(GROUPS, values=True))
        policy.prepare(PrepareJob(1, works, PPO().prepare, True, temperature=0.9))
    finally:
        policy._strategy.forward = forward  # type: ignore[method-assign]
    assert len(seen) > 1
    assert [*seen, policy.ping()] == list(range(seen[0], seen[0] + len(seen) + 1))


def test_a_rank_without_groups_prepares_nothing_and_still_has_figures(policy: PolicyActor) -> None:
    figures = policy.prepare(PrepareJob(1, (), PPO().prepare, True, temperature=0.9))
    assert figures["ppo/beta"] == 0.05


@pytest.mark.slow
def test_the_update_takes_old_log_probs_and_advantages_from_the_targets(folder: Path) -> None:
    (job,) = make_jobs(GROUPS, simple_loss, minibatches=3)
    old = logprobs_of(one_rank(folder), GROUPS, job.temperature)

    def with_targets(scale: float) -> Any:
        works = [
            replace(
                work,
                targets=TokenTargets(
                    before, scale * np.repeat(np.array(work.advantages, np.float32), work.lengths)
                ),
            )
            for work, before in zip(job.groups, old, strict=True)
        ]
        return replace(job, groups=tuple(works), recompute_old=False)

    plain, same, other = (one_rank(folder) for _ in range(3))
    wanted = plain.update(job).metrics
    got = same.update(with_targets(1.0)).metrics
    assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert other.update(with_targets(-1.0)).metrics["loss/total"] != pytest.approx(
        wanted["loss/total"], rel=0.1
    )


@pytest.mark.slow
def test_an_update_past_its_kl_limit_leaves_the_other_optimiser_steps_out(folder: Path) -> None:
    algorithm = PPO(max_update_kl=1e-7, beta=0)
    policy = one_rank(folder)
    _, *targets = policy.prepare(
        PrepareJob(1, tuple(works_of(GROUPS, True)), algorithm.prepare, True, temperature=0.9)
    )
    jobs = make_jobs(GROUPS, algorithm.loss, minibatches=4, recompute_old=False)
    groups = tuple(
        replace(work, targets=own) for work, own in zip(jobs[0].groups, targets, strict=True)
    )
    whole = replace(jobs[0], groups=groups, minibatches=jobs[0].minibatches)
    # The first optimiser step is made by the old policy itself; the second is the one too far.
    two = replace(whole, minibatches=whole.minibatches[:2])
    wanted = policy.update(two).metrics
    stopped = one_rank(folder)
    metrics = stopped.update(replace(whole, early_stop=algorithm.early_stop)).metrics
    assert metrics.pop("policy/early_stopped") == 1.0
    assert metrics == wanted
    expected = weights(policy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(stopped).items())

    patient = one_rank(folder)
    metrics = patient.update(replace(whole, early_stop=("kl/update", 1e9))).metrics
    assert metrics["policy/early_stopped"] == 0.0
    assert any(not torch.equal(v, expected[n]) for n, v in weights(patient).items())


def config_for(folder: Path, tmp_path: Path, ranks: int, **sections: Any) -> RunConfig:
    """A resolved config of `ranks` policy ranks and as many of the critic."""
    strategy: dict[str, Any] = {"start_timeout_s": 240.0, "update_timeout_s": 120.0}
    if ranks > 1:
        strategy |= {"strategy": "deepspeed", "ranks": ranks}
    return load_config(
        {
            "algorithm": {"name": "tests.e2e.algorithms:PPOOnFunctions"},
            "model": {"name": str(folder)},
            "data": {"path": "unused.jsonl"},
            "rewards": ["length"],
            "output_dir": str(tmp_path),
            "train": {"groups_per_step": 4, "groups_per_minibatch": 2, "epochs_per_batch": 2},
            "rollout": {"max_completion_length": 16, "temperature": 0.9},
            "policy": {**strategy, "learning_rate": 1e-2, "max_grad_norm": 1e9},
            "critic": {**strategy, "learning_rate": 1e-2, "max_grad_norm": 1e9},
            **sections,
        }
    )


def learner_for(config: RunConfig) -> Learner:
    """A learner whose ranks are plain Ray actors, outside any placement group."""
    import ray

    def make(cls: type, spec: Any) -> Any:
        # With the group in which each is asked for a sign of life, every 5 s.
        remote = ray.remote(num_cpus=0.5, concurrency_groups=HEALTH_GROUP)(cls)
        return lambda rank, name: remote.remote(
            config.model, spec, rank, spec.ranks, total_steps=10, seed=0
        )

    return Learner(config, make(PolicyActor, config.policy), make(CriticActor, config.critic))


async def two_steps(
    config: RunConfig,
) -> tuple[list[dict[str, float]], list[dict[str, float]], list[TokenTargets], dict[str, Any]]:
    """Figures and metrics of two training steps, the targets of the second, and the weights."""
    import ray

    learner = learner_for(config)
    works = [replace(w, tensors=ray.put(w.tensors)) for w in works_of(GROUPS, values=False)]
    figures, metrics = [], []
    try:
        await learner.start()
        for step in (1, 2):
            ready, said = await learner.prepare(step, config.algorithm, works)
            assert all(isinstance(work.targets, ray.ObjectRef) for work in ready)
            figures.append(said)
            metrics.append((await learner.update(step, config.algorithm, ready)).metrics)
        exported = ray.get(await learner.export(2))
        return figures, metrics, ray.get([w.targets for w in ready]), dict(exported.items())
    finally:
        learner.kill()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_of_policy_and_critic_do_what_one_does(
    folder: Path, tmp_path: Path, ray_session: None
) -> None:
    wanted = asyncio.run(two_steps(config_for(folder, tmp_path, ranks=1)))
    got = asyncio.run(two_steps(config_for(folder, tmp_path, ranks=2)))
    assert got[0][0] == pytest.approx(wanted[0][0], rel=1e-4, abs=1e-6)
    for mine, other in zip(wanted[0] + wanted[1], got[0] + got[1], strict=True):
        assert other == pytest.approx(mine, rel=2e-3, abs=2e-5)
    assert "ppo/explained_variance" in wanted[0][1]
    for mine_, other_ in zip(wanted[2], got[2], strict=True):
        assert_same_targets(other_, mine_, 2e-3)
        assert mine_.values is not None
        assert mine_.values.any(), "the critic has learnt nothing in the first step"
    assert wanted[3].keys() == got[3].keys()
    for name, value in wanted[3].items():
        torch.testing.assert_close(got[3][name], value, rtol=0, atol=5e-4)


@pytest.mark.slow
def test_a_lost_critic_is_a_lost_policy(folder: Path, tmp_path: Path, ray_session: None) -> None:
    import ray

    async def losing() -> None:
        config = config_for(folder, tmp_path, ranks=1)
        learner = learner_for(config)
        works = [replace(w, tensors=ray.put(w.tensors)) for w in works_of(GROUPS, values=False)]
        try:
            await learner.start()
            assert learner._critic is not None
            critic = learner._critic._handles[0]
            ray.kill(critic)
            with contextlib.suppress(ray.exceptions.RayActorError):
                while True:  # it may answer until it has ended
                    await critic.__ray_ready__.remote()
            await learner.prepare(1, config.algorithm, works)
        finally:
            learner.kill()

    with pytest.raises(PolicyLost, match=r"critic-0|lost"):
        asyncio.run(losing())
