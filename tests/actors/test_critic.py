"""The critic: values of the states before each token, its update, and its checkpoints."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.critic import CriticActor
from actors.messages import GroupTensors, StateValues, TokenTargets, UpdateJob
from actors.models.configuration import ModelError
from actors.models.values import critic_model, load_value_model
from actors.specs import CriticSpec, LoRASpec, ModelSpec
from actors.strategies.specs import DeepSpeedSpec, FSDPSpec, StrategySpec
from aligntune.algorithms.ppo import PPO
from tests.actors.policy_cases import (
    VOCABULARY,
    Probe,
    Ranks,
    causal_lm,
    make_composite_folder,
    make_group,
    make_jobs,
    make_model_folder,
    once_more_after_an_abort,
)

GROUPS = [
    make_group(0, 5, (6, 3)),
    make_group(1, 2, (1, 8), holes=True),
    make_group(2, 7, (0, 4)),  # a completion without a token has a final state all the same
]
PPO_LOSS: Any = PPO().value_loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def scorer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with the policy's tokenizer and a head that is not zero."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    path = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def composite(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of a checkpoint that reads images too, with the policy's tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    whole = make_composite_folder(tmp_path_factory.mktemp("whole"), folder)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(whole, num_labels=1)
    path = tmp_path_factory.mktemp("composite")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


def critic(folder: Path, model: Path | None = None, **options: Any) -> CriticActor:
    """A started critic of one torch rank for the policy in `folder`."""
    spec = critic_spec(model, **options)
    actor = CriticActor(ModelSpec(name=str(folder)), spec, 0, 1, total_steps=100, seed=0)
    actor.start("", 0)
    return actor


def critic_spec(model: Path | None = None, **options: Any) -> CriticSpec:
    """Settings that the algorithm would have filled in."""
    return CriticSpec(
        **{
            "model": None if model is None else str(model),
            "learning_rate": 1e-2,
            "adam_betas": (0.9, 0.999),
            "tokens_per_microbatch": 16,
            "max_grad_norm": 1e9,
            "start_timeout_s": 120,
            "update_timeout_s": 120,
        }
        | options
    )


def values_of(actor: CriticActor, groups: list[GroupTensors]) -> list[StateValues]:
    tokens, *values = actor.values(groups)
    assert tokens == sum(len(group.token_ids) for group in groups)
    return values


def jobs_with_targets(groups: list[GroupTensors], **options: Any) -> UpdateJob:
    """One update towards random returns, from values near them."""
    (job,) = make_jobs(groups, PPO_LOSS, recompute_old=False, **options)
    works = []
    for work in job.groups:
        draw = np.random.default_rng(work.group_id)
        n = len(work.tensors.token_ids)
        returns = draw.normal(size=n).astype(np.float32)
        old = returns + draw.normal(0, 0.3, n).astype(np.float32)
        works.append(replace(work, targets=TokenTargets(old, old, returns, old)))
    return replace(job, groups=tuple(works))


@torch.no_grad()
def value_after(model: Any, ids: np.ndarray) -> float:
    """What the classifier says of `ids` alone: its score is read at the last token."""
    return float(model(input_ids=torch.as_tensor(ids, dtype=torch.int64)[None]).logits)


def test_each_micro_batch_of_values_shows_that_the_rank_moves(folder: Path) -> None:
    actor, passes = critic(folder), 0
    forward, before = actor._strategy.forward, actor.ping()

    def counted(**inputs: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(**inputs)

    actor._strategy.forward = counted  # type: ignore[method-assign]
    values_of(actor, GROUPS)
    assert passes > 1
    assert actor.ping() - before == passes


@pytest.mark.parametrize("named", ["scorer", "composite"])
def test_a_value_is_that_of_the_text_before_its_token(
    folder: Path, named: str, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForSequenceClassification

    model_folder: Path = request.getfixturevalue(named)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    model.config.get_text_config().pad_token_id = None
    found = values_of(critic(folder, model_folder), GROUPS)
    for group, values in zip(GROUPS, found, strict=True):
        assert values.values.dtype == np.float32
        for completion in range(len(group.lengths)):
            cut = group.completion(completion)
            response = group.token_ids[cut]
            wanted = [
                value_after(model, np.concatenate([group.prompt_ids, response[:t]]))
                for t in range(len(response) + 1)
            ]
            got = [*values.values[cut], values.final[completion]]
            assert got == pytest.approx(wanted, abs=2e-5)
            assert len(set(np.round(wanted, 3))) == len(wanted), "states must differ to be told"


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("tokens_per_microbatch", [1, 20, 1000])
def test_values_do_not_depend_on_how_they_are_batched(
    folder: Path, scorer: Path, packing: bool, tokens_per_microbatch: int
) -> None:
    wanted = values_of(critic(folder, scorer), GROUPS)
    options: Any = {"packing": packing, "tokens_per_microbatch": tokens_per_microbatch}
    for got, plain in zip(
        values_of(critic(folder, scorer, **options), GROUPS), wanted, strict=True
    ):
        np.testing.assert_allclose(got.values, plain.values, atol=1e-5)
        np.testing.assert_allclose(got.final, plain.final, atol=1e-5)


def test_without_groups_a_rank_still_answers(folder: Path) -> None:
    assert critic(folder).values([]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("composite", [False, True])
def test_from_a_causal_lm_every_value_starts_at_zero_and_is_learnt(
    folder: Path, tmp_path: Path, composite: bool
) -> None:
    start = make_composite_folder(tmp_path, folder) if composite else folder
    actor = critic(start, learning_rate=3e-2, tokens_per_microbatch=1000)
    assert all(not v.values.any() and not v.final.any() for v in values_of(actor, GROUPS))
    job = jobs_with_targets(GROUPS)
    losses = [actor.update(replace(job, step=step)).metrics["loss/value"] for step in range(1, 13)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_that_of_the_trained_tokens_alone(folder: Path) -> None:
    job = jobs_with_targets(GROUPS, trained=lambda group, c: (group, c) != (1, 0))
    metrics = critic(folder).update(job).metrics  # a new critic: every value is 0
    squares, clipped = [], []
    for index, work in enumerate(job.groups):
        assert work.targets is not None
        mask = work.tensors.mask.copy()
        mask[: work.lengths[0]] &= index != 1
        old = work.targets.values[mask].astype(np.float64)
        returns = work.targets.returns[mask].astype(np.float64)
        held = (old + np.clip(-old, -0.2, 0.2) - returns) ** 2
        squares.append(np.maximum(returns**2, held))
        clipped.append(held > returns**2)
    wanted = 0.5 * np.concatenate(squares).mean()
    assert metrics.pop("loss/value") == pytest.approx(wanted, rel=1e-5)
    fraction = np.concatenate(clipped).mean()
    assert 0 < fraction < 1
    assert metrics.pop("ppo/value_clip_fraction") == pytest.approx(fraction)
    assert metrics.pop("critic/learning_rate") == 1e-2
    assert metrics.keys() == {"critic/grad_norm"}


@pytest.fixture(scope="module")
def probe(folder: Path, scorer: Path) -> Probe:
    actor = critic(folder, scorer)
    actor._strategy.model.double()
    return Probe(actor)  # type: ignore[arg-type]


@pytest.mark.slow
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tokens=st.integers(1, 60), packing=st.booleans(), left_out=st.integers(-1, 5))
def test_the_gradient_does_not_depend_on_microbatches_or_packing(
    probe: Probe, tokens: int, packing: bool, left_out: int
) -> None:
    job = jobs_with_targets(GROUPS, trained=lambda group, c: 2 * group + c != left_out)
    wanted, figures = probe.gradient(job, 10_000, 1, False)
    got, metrics = probe.gradient(job, tokens, 1, packing)
    assert wanted.keys() == got.keys()
    assert "score.weight" in wanted
    assert all(torch.allclose(got[n], wanted[n], rtol=1e-11, atol=1e-13) for n in wanted)
    assert metrics["loss/value"] == pytest.approx(figures["loss/value"], rel=1e-12)
    assert any(g.abs().max() > 1e-6 for g in wanted.values())


def _update(probe: Probe, job: UpdateJob) -> dict[str, float]:
    return probe.actor.update(job).metrics


def _values(probe: Any, groups: list[GroupTensors]) -> list[StateValues]:
    return values_of(probe.actor, groups) if groups else []


def _keep(probe: Probe, what: str, folder: Path) -> None:
    getattr(probe.actor, what)(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "strategy", [DeepSpeedSpec(stage=3), FSDPSpec()], ids=lambda strategy: strategy.name
)
@once_more_after_an_abort
def test_on_two_ranks_a_critic_learns_resumes_and_is_exported_as_on_one(
    folder: Path, scorer: Path, tmp_path: Path, strategy: StrategySpec, dtype: str
) -> None:
    shares = [(GROUPS[:1],), (GROUPS[1:],)]
    job = jobs_with_targets(GROUPS, minibatches=2)
    halves = [tuple(part[rank::2] for part in job.minibatches) for rank in (0, 1)]

    def jobs(step: int) -> list[tuple]:
        return [(replace(job, minibatches=half, step=step),) for half in halves]

    alone = critic(folder, scorer)
    wanted = [alone.update(replace(job, step=step)).metrics for step in (1, 2)]
    near = 1e-5 if dtype == "float32" else 0.05
    spec = critic_spec(scorer)
    straight = Ranks(folder, 2, strategy, {"dtype": dtype}, critic=spec)
    try:
        first = straight.call(_update, jobs(1))
        straight.call(_keep, [("save", tmp_path / "state")] * 2)
        second = straight.call(_update, jobs(2))
        values = [v for found in straight.call(_values, shares) for v in found]
        straight.call(_keep, [("save_model", tmp_path / "model")] * 2)
    finally:
        straight.close()
    for got, single in zip((first, second), wanted, strict=True):
        assert got[0] == got[1]
        assert got[0].keys() == single.keys()
        for name, value in single.items():
            if dtype == "float32" or name != "ppo/value_clip_fraction":  # it counts tokens
                assert got[0][name] == pytest.approx(value, rel=near), name
    resumed = Ranks(folder, 2, strategy, {"dtype": dtype}, critic=spec)
    try:
        resumed.call(_keep, [("load", tmp_path / "state")] * 2)
        assert resumed.call(_update, jobs(2)) == second
        again = [v for found in resumed.call(_values, shares) for v in found]
    finally:
        resumed.close()
    said = values_of(critic(folder, tmp_path / "model"), GROUPS)
    for one, other, exported in zip(values, again, said, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_allclose(exported.values, one.values, atol=near, rtol=near)


@pytest.mark.slow
def test_a_saved_critic_goes_on_bit_for_bit(folder: Path, scorer: Path, tmp_path: Path) -> None:
    job = jobs_with_targets(GROUPS, minibatches=2)
    straight = critic(folder, scorer)
    straight.update(job)
    straight.save(tmp_path / "critic")
    wanted = straight.update(replace(job, step=2)).metrics
    resumed = critic(folder, scorer)
    resumed.load(tmp_path / "critic")
    assert resumed.update(replace(job, step=2)).metrics == wanted
    pairs = zip(values_of(straight, GROUPS), values_of(resumed, GROUPS), strict=True)
    assert all(np.array_equal(a.values, b.values) for a, b in pairs)


def test_an_exported_critic_is_a_classifier_that_says_the_same(
    folder: Path, tmp_path: Path
) -> None:
    actor = critic(folder)
    actor.update(jobs_with_targets(GROUPS))
    actor.save_model(tmp_path / "critic")
    wanted = values_of(actor, GROUPS)
    assert wanted[0].values.any()
    for got, values in zip(
        values_of(critic(folder, tmp_path / "critic"), GROUPS), wanted, strict=True
    ):
        np.testing.assert_allclose(got.values, values.values, atol=1e-6)
        np.testing.assert_allclose(got.final, values.final, atol=1e-6)


def test_a_critic_that_reads_other_tokens_does_not_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another vocabulary than the policy"):
        critic(folder, make_model_folder(tmp_path, "x"))


def test_a_critic_that_draws_at_random_while_it_trains_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    """Its model is another than the policy's, which is looked at by itself."""
    shutil.copytree(folder, tmp_path / "noisy")
    noise = {"num_local_experts": 4, "router_jitter_noise": 1.0}
    causal_lm("Phimoe", **noise).save_pretrained(tmp_path / "noisy")
    with pytest.raises(ModelError, match=r"critic model '.*noisy' draws at random while it trains"):
        critic(folder, tmp_path / "noisy")


def test_a_model_without_a_head_over_tokens_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no linear `score` head.*critic\.model"):
        load_value_model(ModelSpec(name=str(tmp_path)))


def test_an_update_without_returns_says_what_is_missing(folder: Path) -> None:
    (job,) = make_jobs(GROUPS, PPO_LOSS, recompute_old=False)
    with pytest.raises(ValueError, match="the critic learns returns"):
        critic(folder).update(job)


def test_the_critic_has_no_adapters_and_a_model_of_its_own_has_its_own_revision() -> None:
    policy = ModelSpec(name="a/b", revision="v1", lora=LoRASpec(r=4))
    same = critic_model(policy, CriticSpec())
    assert (same.name, same.revision, same.lora) == ("a/b", "v1", None)
    other = critic_model(policy, CriticSpec(model="c/d"))
    assert (other.name, other.revision, other.lora) == ("c/d", None, None)
