"""One policy rank: updates that repeat bit for bit, state that resumes, models that export."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface

from actors.engines.base import configured_ends
from actors.engines.transformers import matched_parameters
from actors.messages import LossTerms, TokenBatch, TokenTargets, UpdateJob
from actors.models import text_part
from actors.models.adapters import adapters_of
from actors.models.attention import attend
from actors.models.configuration import ModelError
from actors.models.loading import check_adapters, load_causal_lm, load_tokenizer
from actors.policy import PolicyActor
from actors.ranks import NonFiniteUpdate
from actors.specs import LoRASpec, ModelSpec
from actors.strategies import deepspeed, fsdp
from actors.strategies.optimizer import learning_rate
from actors.strategies.specs import DeepSpeedSpec, FSDPSpec, StrategySpec
from actors.strategies.torch import TorchStrategy
from actors.transfer.bundle import WeightBundle
from aligntune.algorithms.grpo import GRPO
from tests.actors.policy_cases import (
    Probe,
    Ranks,
    causal_lm,
    logprobs_of,
    make_composite_folder,
    make_group,
    make_jobs,
    make_model_folder,
    once_more_after_an_abort,
    one_rank,
    policy_spec,
    simple_loss,
    weights,
)

GROUPS = [make_group(0, 4, [3, 9, 5]), make_group(1, 6, [2, 2, 11, 7], holes=True)]
LORA = {"lora": LoRASpec(r=4, alpha=8.0, dropout=0.1)}
PROMPT = torch.tensor([[5, 9, 11, 30, 7, 8]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("policy"))


def job_of_step(step: int, **options: Any) -> UpdateJob:
    return make_jobs(GROUPS, simple_loss, minibatches=2, step=step, **options)[0]


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROMPT).logits


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
def test_the_same_updates_give_the_same_bits(folder: Path, model: dict) -> None:
    ends = []
    for _ in range(2):
        actor = one_rank(folder, model)
        figures = [actor.update(job_of_step(step)).metrics for step in (1, 2)]
        ends.append((figures, weights(actor)))
    assert ends[0][0] == ends[1][0]
    assert_equal(ends[0][1], ends[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
def test_a_resumed_policy_goes_on_bit_for_bit(folder: Path, model: dict, tmp_path: Path) -> None:
    schedule = {"scheduler": "cosine", "warmup_steps": 3}
    straight = one_rank(folder, model, **schedule)
    straight.update(job_of_step(1))
    straight.snapshot()
    wanted = straight.update(job_of_step(2)).metrics
    straight.write(tmp_path / "state")  # what it was, though the weights have gone on

    torch.manual_seed(999)
    resumed = one_rank(folder, model, **schedule)
    resumed.load(tmp_path / "state")
    assert resumed.update(job_of_step(2)).metrics == wanted
    assert_equal(weights(resumed), weights(straight))


THEN = {"weight_decay": 0.1, "adam_betas": (0.9, 0.999), "adam_epsilon": 1e-8}
NOW = {
    "weight_decay": 0.5,
    "adam_betas": (0.6, 0.9),
    "adam_epsilon": 1e-4,
    "max_grad_norm": 1e-3,
    "learning_rate": 3e-2,
}


def changed_amid_the_run(folder: Path, state: Path) -> PolicyActor:
    """A rank of torch that has made a step with the settings `THEN`, written to `state`, and one
    with those of `NOW`, set by hand."""
    actor = one_rank(folder, **THEN)
    actor.update(job_of_step(1))
    actor.save(state)
    for group in actor._strategy._optimizer.param_groups:
        decays = group["weight_decay"] > 0
        group["weight_decay"] = NOW["weight_decay"] if decays else 0.0
        group["betas"], group["eps"] = NOW["adam_betas"], NOW["adam_epsilon"]
    actor._spec = actor._strategy._spec = actor._spec.model_copy(update=NOW)
    actor.update(job_of_step(2))
    return actor


@pytest.mark.slow
def test_settings_of_the_optimiser_hold_from_the_next_step_on(folder: Path, tmp_path: Path) -> None:
    wanted = changed_amid_the_run(folder, tmp_path)
    got = one_rank(folder, **NOW)
    got.load(tmp_path)
    got.update(job_of_step(2))
    assert_equal(weights(got), weights(wanted))


def test_an_update_learns_and_reports(folder: Path) -> None:
    actor = one_rank(folder)
    before = weights(actor)
    result = actor.update(job_of_step(1))
    after = weights(actor)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert result.seconds > 0
    assert result.metrics["policy/learning_rate"] == 1e-2
    assert result.metrics["policy/grad_norm"] > 0
    assert {"loss/total", "test/drift", "test/rows", "test/peak"} <= result.metrics.keys()


def test_figures_are_exact_over_micro_batches_and_averaged_over_optimiser_steps(
    folder: Path,
) -> None:
    actor = one_rank(folder, tokens_per_microbatch=1)
    job = job_of_step(1, trained=lambda group, completion: completion != 0)
    shares = []
    for rows in job.minibatches:
        kept = [r for r in rows if r.completion != 0]
        nonempty = [
            r for r in kept if GROUPS[r.work].mask[GROUPS[r.work].completion(r.completion)].any()
        ]
        shares.append(len(nonempty) / len(rows))
    assert actor.update(job).metrics["test/rows"] == pytest.approx(sum(shares) / len(shares))


def test_a_maximum_is_that_of_all_optimiser_steps(folder: Path) -> None:
    peaks: list[float] = []

    def watch(batch: TokenBatch) -> LossTerms:
        terms = simple_loss(batch)
        peaks.append(float(terms.maxima["test/peak"]))
        return terms

    actor = one_rank(folder, tokens_per_microbatch=1)
    metrics = actor.update(replace(job_of_step(1), loss=watch)).metrics
    assert len(set(peaks)) > 2
    assert metrics["test/peak"] == max(peaks)


def test_old_is_the_policy_at_the_start_of_the_update(folder: Path) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(batch: TokenBatch) -> LossTerms:
        seen.append((batch.logp.detach()[batch.mask], batch.old[batch.mask]))
        return simple_loss(batch)

    actor = one_rank(folder, tokens_per_microbatch=10_000)
    start = logprobs_of(actor, GROUPS, 0.9)
    (job,) = make_jobs(GROUPS, watch)
    actor.update(replace(job, minibatches=job.minibatches * 3))  # three epochs
    known = np.sort(np.concatenate([p[g.mask] for p, g in zip(start, GROUPS, strict=True)]))
    for _, old in seen:
        np.testing.assert_allclose(np.sort(old.numpy()), known, atol=1e-5)
    torch.testing.assert_close(seen[0][0], seen[0][1], rtol=0, atol=1e-5)
    assert float((seen[2][0] - seen[2][1]).abs().max()) > 1e-2

    assert torch.equal(*seen[0]), "those of the first optimiser step are its own"
    seen.clear()
    (job,) = make_jobs(GROUPS, watch, recompute_old=False)
    actor.update(job)
    assert torch.equal(*seen[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("minibatches", "model", "left_out", "recomputed"),
    [
        (1, {}, (), []),
        (2, {}, (), [1]),
        (3, {}, (), [1, 2]),
        (3, {}, (0,), [0, 2]),  # nothing to learn in the first, so it has no forward pass
        (2, LORA, (), [0, 1]),  # dropout: a forward pass in training is not the policy's own
    ],
)
def test_old_log_probs_cost_no_pass_over_the_rows_of_the_first_optimiser_step(
    folder: Path, minibatches: int, model: dict, left_out: tuple[int, ...], recomputed: list[int]
) -> None:
    groups = [make_group(index, 3 + index, [4, 9]) for index in range(6)]
    (job,) = make_jobs(
        groups,
        simple_loss,
        minibatches=minibatches,
        trained=lambda group, row: (2 * group + row) % minibatches not in left_out,
    )
    actor = one_rank(folder, model)
    start = logprobs_of(actor, groups, job.temperature)
    make_passes = actor._passes
    asked: list[set[Any]] = []
    actor._passes = lambda tensors, rows, temperature: (  # type: ignore[method-assign]
        asked.append(set(rows)),
        make_passes(tensors, rows, temperature),
    )[1]
    olds: list[tuple[Any, Any]] = []
    batch_of = actor._batch

    def watched(job: Any, rows: Any, chunks: Any, counts: Any, groups: Any) -> TokenBatch:
        batch = batch_of(job, rows, chunks, counts, groups)
        for place, row in enumerate(rows):
            cut = groups[row.work].tensors.completion(row.completion)
            length = cut.stop - cut.start
            known = start[job.groups[row.work].group_id][cut]
            olds.append((batch.old[place, :length].numpy(), known))
        return batch

    actor._batch = watched  # type: ignore[method-assign]
    actor.update(replace(job, minibatches=job.minibatches * 2))  # two epochs
    (rows,) = asked
    assert rows == {row for index in recomputed for row in job.minibatches[index]}
    assert len(olds) == 2 * sum(
        len(part) for index, part in enumerate(job.minibatches) if index not in left_out
    )
    for old, known in olds:
        np.testing.assert_allclose(old, known, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 2])
def test_dropout_is_in_no_rollout_correction_and_not_in_the_ratio_of_the_first_optimiser_step(
    folder: Path, epochs: int
) -> None:
    actor = one_rank(folder, {"lora": LoRASpec(r=4, alpha=8.0, dropout=0.3)}, learning_rate=0.1)
    for step in (1, 2):
        actor.update(job_of_step(step))  # until the adapters say something
    sampled = [
        replace(group, logprobs=logp)
        for group, logp in zip(GROUPS, logprobs_of(actor, GROUPS, 0.9), strict=True)
    ]
    seen: list[dict[str, float]] = []
    algorithm = GRPO(beta=0)

    def watch(batch: TokenBatch) -> LossTerms:
        terms = algorithm.loss(batch)
        seen.append({name: float(total) for name, (total, _) in terms.sums.items()})
        return terms

    (job,) = make_jobs(sampled, watch)
    actor.update(replace(job, minibatches=job.minibatches * epochs))
    batches = len(seen) // epochs
    for at, sums in enumerate(seen):
        assert sums["kl/rollout_vs_policy"] == pytest.approx(0, abs=1e-6)
        assert (sums["kl/update"] == 0) == (at < batches)
    tokens = sum(int(group.mask.sum()) for group in sampled)
    weighed = sum(sums["correction/weight_mean"] for sums in seen[:batches])
    assert weighed == pytest.approx(tokens, rel=1e-4)


def test_token_targets_take_the_place_of_advantages_and_old(folder: Path) -> None:
    seen: list[TokenBatch] = []

    def watch(batch: TokenBatch) -> LossTerms:
        seen.append(batch)
        return simple_loss(batch)

    (job,) = make_jobs(GROUPS[:1], watch)
    count = len(GROUPS[0].token_ids)
    ramp = np.arange(count, dtype=np.float32)
    targets = TokenTargets(old=-ramp - 1, advantages=ramp)
    job = replace(job, groups=(replace(job.groups[0], targets=targets),))
    one_rank(folder, tokens_per_microbatch=10_000).update(job)
    assert sorted(seen[0].advantages[seen[0].mask].tolist()) == ramp.tolist()
    torch.testing.assert_close(seen[0].old[seen[0].mask], -1 - seen[0].advantages[seen[0].mask])


def nan_in_one_row(batch: TokenBatch) -> LossTerms:
    terms = simple_loss(batch)
    return replace(terms, loss=terms.loss * (float("nan") if len(batch.mask) == 1 else 1.0))


def infinite_gradient(batch: TokenBatch) -> LossTerms:
    """Finite at zero, with a slope that is not: what a loss's own check cannot see."""
    terms = simple_loss(batch)
    return replace(terms, loss=terms.loss + (batch.logp - batch.logp.detach()).abs().sqrt().sum())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            nan_in_one_row,
            r"training step 3, optimiser step 1 of 1: loss nan on rank 0 over groups \[1\]",
        ),
        (infinite_gradient, "training step 3, optimiser step 1 of 1: gradient norm nan"),
    ],
)
def test_what_is_not_finite_stops_before_the_step(folder: Path, loss: Any, message: str) -> None:
    actor = one_rank(folder, tokens_per_microbatch=20)
    before = weights(actor)
    (job,) = make_jobs(GROUPS[1:], loss, step=3)
    with pytest.raises(NonFiniteUpdate, match=message):
        actor.update(job)
    assert_equal(weights(actor), before)


def test_an_optimiser_step_without_a_trained_token_moves_nothing(folder: Path) -> None:
    actor = one_rank(folder)
    actor.update(job_of_step(1))  # so that Adam has momentum
    before = weights(actor)
    metrics = actor.update(job_of_step(2, trained=lambda group, completion: False)).metrics
    assert metrics["policy/empty_minibatches"] == 2
    assert "policy/grad_norm" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert_equal(weights(actor), before)


def test_groups_with_and_without_reference_do_not_mix(folder: Path) -> None:
    (job,) = make_jobs(GROUPS, simple_loss, with_reference=True)
    job = replace(job, groups=(job.groups[0], replace(job.groups[1], reference=None)))
    with pytest.raises(ValueError, match="groups of a micro-batch have reference log-probs"):
        one_rank(folder, tokens_per_microbatch=10_000).update(job)


@pytest.mark.slow
def test_gradients_are_clipped_and_reported_unclipped(folder: Path) -> None:
    (job,) = make_jobs(GROUPS, simple_loss)
    free = one_rank(folder)
    norm = free.update(job).metrics["policy/grad_norm"]
    held = one_rank(folder, max_grad_norm=norm / 100, adam_epsilon=1.0)
    loose = one_rank(folder, max_grad_norm=norm * 100, adam_epsilon=1.0)
    start = weights(held)
    moved = []
    for actor in (held, loose):
        assert actor.update(job).metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-5)
        end = weights(actor)
        moved.append(math.sqrt(sum(float((end[n] - start[n]).square().sum()) for n in start)))
    assert moved[0] < moved[1] / 10  # with a large epsilon Adam's step keeps the gradient's scale


@pytest.mark.parametrize(
    ("scheduler", "warmup", "rates"),
    [
        ("constant", 0, [1.0, 1.0, 1.0, 1.0]),
        ("constant", 2, [0.5, 1.0, 1.0, 1.0]),
        ("linear", 0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 2, [0.5, 1.0, 1.0, 0.5]),
        ("cosine", 0, [1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_the_learning_rate_of_every_step(scheduler: str, warmup: int, rates: list[float]) -> None:
    spec = policy_spec(scheduler=scheduler, warmup_steps=warmup, learning_rate=1.0)
    assert [learning_rate(spec, step, 4) for step in (1, 2, 3, 4)] == pytest.approx(rates)


@pytest.mark.slow
def test_lora_export_is_the_merged_model_and_leaves_training_weights_alone(
    folder: Path, tmp_path: Path
) -> None:
    merges_and_stays(folder, tmp_path, LORA, causal_lm(seed=5))


ENDS = {"lora": LoRASpec(r=4, alpha=8.0, target_modules=["lm_head", "embed_tokens", "q_proj"])}


@pytest.mark.slow
def test_adapters_on_the_embeddings_are_merged_where_these_are_two_weights(
    folder: Path, tmp_path: Path
) -> None:
    apart = tmp_path / "apart"
    shutil.copytree(folder, apart)
    causal_lm(tie_word_embeddings=False).save_pretrained(apart)
    merges_and_stays(apart, tmp_path, ENDS, causal_lm(seed=5, tie_word_embeddings=False))


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "embed_tokens"]], ids=str)
def test_adapters_on_embeddings_that_are_the_head_too_are_refused(
    folder: Path, targets: list[str]
) -> None:
    spec = ModelSpec(name=str(folder), lora=LoRASpec(target_modules=targets))
    for load in (check_adapters, lambda spec: load_causal_lm(spec, lora=True)):
        with pytest.raises(ModelError, match=f"model.lora.target_modules has .*{targets[-1]}, but"):
            load(spec)


@pytest.mark.slow
def test_an_exported_adapter_alone_makes_the_policy_of_the_model_it_started_from(
    folder: Path,
) -> None:
    actor = one_rank(folder, LORA)
    actor.update(job_of_step(1))
    size, bundle = actor.export_adapter(1)
    assert bundle is not None
    assert size == bundle.nbytes < actor.export_weights(1)[0] / 2
    spec = ModelSpec.model_validate({"name": str(folder), **LORA})
    engine = load_causal_lm(spec, lora=True).eval()
    with torch.no_grad():
        for parameter, tensor in matched_parameters(engine, bundle, adapter=True):
            parameter.copy_(tensor)
    live = actor._strategy.model.model
    torch.testing.assert_close(logits_of(engine), logits_of(live), rtol=0, atol=0)
    assert set(adapters_of(spec).shapes) == set(bundle.arrays)


@pytest.mark.slow
def test_lora_of_a_mixtures_experts_is_merged_under_the_plain_models_names(
    folder: Path, tmp_path: Path
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    mixture = tmp_path / "mixture"
    shutil.copytree(folder, mixture)
    causal_lm("Qwen3Moe", **experts).save_pretrained(mixture)
    other = causal_lm("Qwen3Moe", seed=5, **experts)
    merges_and_stays(mixture, tmp_path, {"lora": LoRASpec(r=4, alpha=8.0)}, other)


@pytest.mark.slow
def test_a_mixture_leaves_for_who_reads_checkpoints_as_it_is_saved(
    folder: Path, tmp_path: Path
) -> None:
    mixture = tmp_path / "mixture"
    shutil.copytree(folder, mixture)
    causal_lm("Mixtral", num_local_experts=4, num_experts_per_tok=2).save_pretrained(mixture)
    actor = one_rank(mixture, {"lora": LoRASpec(r=4, alpha=8.0)})
    actor.update(job_of_step(1))
    actor.save_model(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    _, bundle = actor.export_weights(1, as_checkpoint=True)
    _, changes = actor.export_changes(1, None, as_checkpoint=True)
    for left in (bundle, changes):
        assert isinstance(left, WeightBundle)
        assert_equal(dict(left.items()), saved)
    plain = dict(load_causal_lm(ModelSpec(name=str(mixture))).named_parameters())
    assert weights(actor).keys() == plain.keys() != saved.keys()


def merges_and_stays(folder: Path, tmp_path: Path, lora: dict, plain: Any) -> None:
    """Trains adapters of the model in `folder`; `plain` is another model of its shape."""
    from peft import PeftModel

    actor = one_rank(folder, lora)
    start = weights(actor)
    for step in (1, 2):
        actor.update(job_of_step(step))
    trained = {n: p.clone() for n, p in actor._strategy.model.named_parameters()}
    merged = weights(actor)
    assert merged.keys() == {name for name, _ in plain.named_parameters()}
    assert any(not torch.equal(merged[name], start[name]) for name in merged)

    live = actor._strategy.model.model
    wanted = logits_of(live)
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(logits_of(plain), wanted, rtol=0, atol=1e-4)

    actor.save_model(tmp_path / "model")
    reloaded = load_causal_lm(ModelSpec(name=str(tmp_path / "model")))
    torch.testing.assert_close(logits_of(reloaded), wanted, rtol=0, atol=1e-4)
    base = load_causal_lm(ModelSpec(name=str(folder)))
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    torch.testing.assert_close(logits_of(adapted), wanted, rtol=0, atol=1e-4)

    assert_equal({n: p.detach() for n, p in actor._strategy.model.named_parameters()}, trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_model_loads_and_says_the_same(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    actor = one_rank(folder, {"dtype": dtype, "stop_token_ids": [5]})
    actor.update(job_of_step(1))
    actor.save_model(tmp_path / "model")
    spec = ModelSpec(name=str(tmp_path / "model"), dtype=dtype)
    reloaded = load_causal_lm(spec)
    assert reloaded.config.dtype == getattr(torch, dtype)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == dtype
    exported = weights(actor)
    loaded = dict(reloaded.named_parameters())
    assert_equal({n: p.detach() for n, p in loaded.items()}, exported)
    assert 5 in configured_ends(spec), "it ends where the run ended it"
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert load_tokenizer(spec).encode("w5 w9") == [5, 9]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}, {"eos_token_id": 2}),
        ({"do_sample": True, "temperature": 0.9}, {"do_sample": True, "temperature": 0.9}),
        (
            {"length_penalty": 2.0, "eos_token_id": [2, 3], "pad_token_id": -1},
            {"eos_token_id": [2, 3]},
        ),
    ],
    ids=["sampling only", "samples", "beams only"],
)
def test_a_model_is_exported_though_its_generation_config_contradicts_itself(
    folder: Path, tmp_path: Path, given: dict[str, Any], kept: dict[str, Any]
) -> None:
    """transformers loads such a one, and refuses to save it."""
    shutil.copytree(folder, tmp_path / "given")
    (tmp_path / "given" / "generation_config.json").write_text(json.dumps(given))
    one_rank(tmp_path / "given").save_model(tmp_path / "model")
    load_causal_lm(ModelSpec(name=str(tmp_path / "model")))
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    del written["transformers_version"]
    assert written == kept


def test_bfloat16_keeps_updates_smaller_than_its_last_digit(folder: Path) -> None:
    actor = one_rank(folder, {"dtype": "bfloat16"}, learning_rate=1e-6)
    start = {n: p.detach().clone() for n, p in actor._strategy.model.named_parameters()}
    actor.update(job_of_step(1))
    moved = [not torch.equal(p, start[n]) for n, p in actor._strategy.model.named_parameters()]
    assert sum(moved) > len(moved) / 2
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights(actor).values())


def test_gradient_checkpointing_gives_the_same_gradient(folder: Path) -> None:
    (job,) = make_jobs(GROUPS, simple_loss)
    plain, _ = Probe(one_rank(folder)).gradient(job, 64, 16, False)
    saved, _ = Probe(one_rank(folder, {"gradient_checkpointing": True})).gradient(
        job, 64, 16, False
    )
    for name in plain:
        torch.testing.assert_close(saved[name], plain[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apart", [True, False])
def test_flash_kernels_run_on_the_device_alone_and_are_looked_at_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    placed: list[bool] = []

    def kernel(module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        assert placed, "the weights lie on a CPU"
        ends = options.pop("cu_seq_lens_q", None)
        return attend(module, q, k, v, None, cu_seq_lens_q=ends if apart else None, **options)

    def load(spec: ModelSpec, lora: bool) -> Any:
        model = load_causal_lm(spec.model_copy(update={"attention": "sdpa"}), lora)
        model.config._attn_implementation = spec.attention
        return model

    def setup(strategy: TorchStrategy, *address: Any) -> None:
        place(strategy, *address)
        placed.append(True)

    place = TorchStrategy.setup
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", kernel)
    monkeypatch.setattr("actors.policy.load_causal_lm", load)
    monkeypatch.setattr(TorchStrategy, "setup", setup)
    model, settings = {"attention": "flash_attention_2"}, {"packing": True}
    if apart:
        assert one_rank(folder, model, **settings)._attention == "packed rows, flash_attention_2"
        return
    with pytest.raises(ModelError, match=r"packed rows other .*set policy.packing to false"):
        one_rank(folder, model, **settings)


def test_a_policy_that_draws_at_random_while_it_trains_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "noisy")
    noise = {"num_local_experts": 4, "router_jitter_noise": 1.0}
    causal_lm("Phimoe", **noise).save_pretrained(tmp_path / "noisy")
    with pytest.raises(ModelError, match="PhimoeForCausalLM draws at random while it trains"):
        one_rank(tmp_path / "noisy")


@pytest.mark.slow
def test_references_are_fetched_through_ray(folder: Path, ray_session: None) -> None:
    import ray

    (job,) = make_jobs(GROUPS, simple_loss, with_reference=True)
    by_reference = replace(
        job,
        groups=tuple(
            replace(work, tensors=ray.put(work.tensors), reference=ray.put(work.reference))
            for work in job.groups
        ),
    )
    plain, remote = one_rank(folder), one_rank(folder)
    assert plain.update(job).metrics == remote.update(by_reference).metrics
    assert_equal(weights(plain), weights(remote))


def test_state_of_another_layout_is_refused(folder: Path, tmp_path: Path) -> None:
    actor = one_rank(folder)
    with pytest.raises(ValueError, match=r"holds no state of policy.strategy torch"):
        actor.load(tmp_path)
    one_rank(folder, LORA).save(tmp_path)
    with pytest.raises(ValueError, match="another model or of other LoRA settings"):
        actor.load(tmp_path)


def test_settings_that_cannot_be_are_refused(folder: Path, tmp_path: Path) -> None:
    spec = ModelSpec(name=str(folder))
    with pytest.raises(ValueError, match=r"policy.ranks is 2, but 1 ranks were made"):
        PolicyActor(spec, policy_spec(strategy=DeepSpeedSpec(), ranks=2), 0, 1, 10, 0)
    with pytest.raises(ValueError, match="torch has one rank, not 2"):
        PolicyActor(spec, policy_spec(ranks=2), 0, 2, 10, 0).start("", 0)
    with pytest.raises(ValueError, match=r"policy.learning_rate is not set"):
        one_rank(folder, learning_rate=None).update(job_of_step(1))
    from transformers import Qwen3ForSequenceClassification

    Qwen3ForSequenceClassification(causal_lm().config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="it is Qwen3ForSequenceClassification"):
        one_rank(tmp_path)


def _update(probe: Probe, job: UpdateJob) -> dict[str, float]:
    return probe.actor.update(job).metrics


def _placed(probe: Probe) -> list[int]:
    return probe.placed


def _save(probe: Probe, folder: Path) -> None:
    probe.actor.save(folder)


def _snapshot(probe: Probe) -> None:
    probe.actor.snapshot()


def _lets_go(probe: Probe) -> bool:
    """Whether nothing of DeepSpeed's leads to what the last snapshot holds."""
    engine = getattr(probe.actor._strategy, "_engine", None)
    return engine is None or not {"save", "makedirs"} & vars(engine.checkpoint_engine).keys()


def _write(probe: Probe, folder: Path) -> None:
    probe.actor.write(folder)


def _load(probe: Probe, folder: Path) -> None:
    probe.actor.load(folder)


def _weights(probe: Probe) -> dict[str, torch.Tensor] | None:
    _, bundle = probe.actor.export_weights(0)
    return None if bundle is None else {n: t.clone() for n, t in bundle.items()}


def _save_model(probe: Probe, folder: Path) -> None:
    probe.actor.save_model(folder)


FSDP, ZERO1, ZERO2, ZERO3 = (
    FSDPSpec(),
    *(DeepSpeedSpec.model_validate({"stage": stage}) for stage in (1, 2, 3)),
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        (ZERO1, {}),
        (ZERO2, LORA),
        (ZERO3, {}),
        (ZERO3, {**LORA, "dtype": "bfloat16"}),
        (FSDP, {}),
        pytest.param(FSDP, LORA, marks=pytest.mark.long),
        (FSDP, {**LORA, "dtype": "bfloat16", "gradient_checkpointing": True}),
    ],
    ids=str,
)
@once_more_after_an_abort
def test_ranks_resume_export_and_stop_like_one_rank(
    folder: Path, tmp_path: Path, strategy: StrategySpec, model: dict
) -> None:
    def jobs(step: int, loss: Any = simple_loss) -> list[tuple]:
        return [(j,) for j in make_jobs(GROUPS, loss, world=2, minibatches=2, step=step)]

    both = [(tmp_path / "state",)] * 2
    straight = Ranks(folder, 2, strategy, model)
    try:
        if strategy == ZERO3:  # or a GPU would have all of it at once
            assert straight.call(_placed, [()] * 2) == [[0], [0]]
        straight.call(_update, jobs(1))
        straight.call(_snapshot, [()] * 2)
        assert straight.call(_lets_go, [()] * 2) == [True, True]
        wanted_metrics = straight.call(_update, jobs(2))
        straight.call(_write, both)  # what it was, though the weights have gone on
        wanted, nothing = straight.call(_weights, [()] * 2)
        assert nothing is None
        straight.call(_save_model, [(tmp_path / "model",)] * 2)
        with pytest.raises(RuntimeError, match=r"NonFiniteUpdate: policy, training step 3"):
            straight.call(_update, jobs(3, infinite_gradient))
        after, _ = straight.call(_weights, [()] * 2)
        assert_equal(after, wanted)
    finally:
        straight.close()

    for path in (tmp_path / "state").glob("deepspeed/*model_states.pt"):
        written = torch.load(path, weights_only=False)
        assert all("lora_" in name for name in written["module"]) == ("lora" in model)
        assert written["frozen_param_fragments"] is None

    resumed = Ranks(folder, 2, strategy, model)
    try:
        resumed.call(_load, both)
        assert resumed.call(_update, jobs(2)) == wanted_metrics
        got, _ = resumed.call(_weights, [()] * 2)
        assert_equal(got, wanted)
    finally:
        resumed.close()

    spec = ModelSpec(name=str(tmp_path / "model"), dtype=model.get("dtype", "float32"))
    exported = dict(load_causal_lm(spec).named_parameters())
    assert_equal({n: p.detach() for n, p in exported.items()}, wanted)
    adapter = tmp_path / "model" / "adapter" / "adapter_model.safetensors"
    assert adapter.is_file() == ("lora" in model)
    with pytest.raises(ValueError, match=r"holds no state of policy.strategy torch"):
        one_rank(folder, model).load(tmp_path / "state")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", [ZERO1, ZERO2, ZERO3, FSDP], ids=str)
@once_more_after_an_abort
def test_settings_of_the_optimiser_hold_from_the_next_step_on_with_every_strategy(
    folder: Path, tmp_path: Path, strategy: StrategySpec
) -> None:
    wanted = weights(changed_amid_the_run(folder, tmp_path / "torch"))
    state = [(tmp_path / "state",)]
    then = Ranks(folder, 1, strategy, **THEN)
    try:
        then.call(_update, [(job_of_step(1),)])
        then.call(_save, state)
    finally:
        then.close()
    now = Ranks(folder, 1, strategy, **NOW)
    try:
        now.call(_load, state)
        now.call(_update, [(job_of_step(2),)])
        (got,) = now.call(_weights, [()])
    finally:
        now.close()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", [ZERO2, ZERO3, FSDP], ids=str)
@once_more_after_an_abort
def test_what_text_never_reaches_of_a_model_neither_decays_nor_stops_a_checkpoint(
    folder: Path, tmp_path: Path, strategy: StrategySpec
) -> None:
    composite = make_composite_folder(tmp_path / "composite", folder)
    before = load_file(composite / "model.safetensors")
    ranks = Ranks(composite, 1, strategy, weight_decay=0.5)
    try:
        for step in (1, 2):
            ranks.call(_update, [(job_of_step(step),)])
        ranks.call(_snapshot, [()])
        ranks.call(_save_model, [(tmp_path / "model",)])
    finally:
        ranks.close()
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(after[name], before[name])}
    assert same == {name for name in before if "vision" in name or "projector" in name}


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, LORA], ids=["full", "lora"])
def test_a_checkpoint_of_when_what_text_never_reaches_was_trained_goes_on(
    folder: Path, tmp_path: Path, model: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    composite = make_composite_folder(tmp_path / "composite", folder)
    with monkeypatch.context() as before:
        before.setattr(text_part, "beside_text", lambda model: [])
        old = one_rank(composite, model, weight_decay=0.5)
    old.update(job_of_step(1))
    old.save(tmp_path / "old")
    old.update(job_of_step(2))
    new = one_rank(composite, model, weight_decay=0.5)
    new.load(tmp_path / "old")
    new.update(job_of_step(2))
    assert_equal(weights(new), weights(old))
    trained = [name for name, p in old._strategy.model.named_parameters() if p.requires_grad]
    now = new._strategy.model
    with pytest.raises(ValueError, match="old was written by a version that trained parts of this"):
        text_part.check_text_part(now, trained, tmp_path / "old")
    kept = now.state_dict().keys() - deepspeed._frozen(now)
    text_part.check_text_part(now, kept, tmp_path / "new")
    if model:
        text_part.check_text_part(now, now.state_dict(), tmp_path / "with frozen weights")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", [ZERO3, FSDP], ids=lambda strategy: strategy.name)
@once_more_after_an_abort
def test_adapters_of_ranks_start_and_move_as_those_of_one(
    folder: Path, strategy: StrategySpec
) -> None:
    lora = {"lora": LoRASpec(r=4, alpha=8.0)}
    one = one_rank(folder, lora)
    ranks = Ranks(folder, 2, strategy, lora)
    try:
        for step in (1, 2):
            wanted = one.update(*make_jobs(GROUPS, simple_loss, step=step)).metrics
            jobs = [(job,) for job in make_jobs(GROUPS, simple_loss, world=2, step=step)]
            for metrics in ranks.call(_update, jobs):
                assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        got, _ = ranks.call(_weights, [()] * 2)
    finally:
        ranks.close()
    for name, tensor in weights(one).items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=2e-5)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP on one rank, in this process; a real group would leave sockets that programs inherit."""

    def join(*where: Any) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)

    monkeypatch.setattr(fsdp, "join", join)


@pytest.mark.parametrize("model", [{}, {"lora": LoRASpec(r=4, alpha=8.0)}], ids=["full", "lora"])
def test_a_rank_of_fsdp_sends_weights_in_the_dtype_that_they_are_exported_in(
    folder: Path, model: dict, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the bytes of float32, and the same bits. What LoRA adds to a weight stays exact."""

    def watched(tensor: DTensor) -> torch.Tensor:
        sent.append(tensor.dtype)
        return gather(tensor)

    gather = DTensor.full_tensor
    sent: list[torch.dtype] = []
    spec = ModelSpec(name=str(folder), dtype="bfloat16", **model)
    actor = PolicyActor(spec, policy_spec(strategy=FSDP), 0, 1, 10, 0)
    try:
        actor.start("", 0)
        with torch.no_grad():
            for parameter in actor._strategy.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-3)  # beyond the digits of bfloat16
        trained = dict(actor._strategy._trained())
        wanted = {name: gather(each).detach().bfloat16() for name, each in trained.items()}
        monkeypatch.setattr(DTensor, "full_tensor", watched)
        got = weights(actor)
    finally:
        actor._strategy.close()
    if model:
        assert set(sent) == {torch.bfloat16, torch.float32}
        assert sent.count(torch.float32) == len(trained)
    else:
        assert set(sent) == {torch.bfloat16}
        assert_equal(got, {name.removeprefix("model."): w for name, w in wanted.items()})


def test_a_rank_of_fsdp_casts_a_layer_just_before_it_shares_it_out(
    folder: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a whole model in float32 would lie in the host's memory, once a rank."""

    def watched(part: torch.nn.Module, **options: Any) -> Any:
        for of, found in ((actor._strategy.model, wide), (part, own)):
            whole = [p for p in of.parameters() if not isinstance(p, DTensor)]
            found.append({id(p) for p in whole if p.dtype == torch.float32})
        return shard(part, **options)

    shard = fsdp.fully_shard
    monkeypatch.setattr(fsdp, "fully_shard", watched)
    spec = ModelSpec(name=str(folder), dtype="bfloat16")
    wide: list[set[int]] = []
    own: list[set[int]] = []
    actor = PolicyActor(spec, policy_spec(strategy=FSDP), 0, 1, 10, 0)
    try:
        actor.start("", 0)
    finally:
        actor._strategy.close()
    assert len(own) == 3, "two layers, and what is around them"
    assert wide == own
    assert all(own)


@pytest.mark.slow
@pytest.mark.timeout(600)
@once_more_after_an_abort
def test_ranks_of_fsdp_go_on_as_another_number_of_them(folder: Path, tmp_path: Path) -> None:
    def jobs(world: int, step: int) -> list[tuple]:
        return [(j,) for j in make_jobs(GROUPS, simple_loss, world, minibatches=2, step=step)]

    state = tmp_path / "state"
    two = Ranks(folder, 2, FSDP, max_grad_norm=0.5)
    try:
        two.call(_update, jobs(2, 1))
        two.call(_save, [(state,)] * 2)
        saved, _ = two.call(_weights, [()] * 2)
        wanted, _ = two.call(_update, jobs(2, 2))
        after, _ = two.call(_weights, [()] * 2)
    finally:
        two.close()
    files = {path.name: path.suffix for path in state.iterdir()}
    assert sorted(files.values()) == [".json", ".pt", ".pt", ".safetensors", ".safetensors"], files
    assert wanted["policy/grad_norm"] > 0.5, "clipping must show"

    for world in (1, 3):
        other = Ranks(folder, world, FSDP, max_grad_norm=0.5)
        try:
            other.call(_load, [(state,)] * world)
            got = other.call(_weights, [()] * world)[0]
            assert_equal(got, saved)
            metrics = other.call(_update, jobs(world, 2))[0]
            assert metrics == pytest.approx(wanted, rel=1e-5, abs=1e-6)
            moved = other.call(_weights, [()] * world)[0]
            for name, tensor in after.items():
                torch.testing.assert_close(moved[name], tensor, rtol=1e-4, atol=2e-5)
        finally:
            other.close()


@pytest.mark.parametrize("tied", [True, False])
def test_deepspeed_takes_checkpoints_with_frozen_weights_or_without_and_of_its_own_layers_alone(
    tied: bool,
) -> None:
    model = torch.nn.ModuleDict({"in": torch.nn.Linear(2, 2), "out": torch.nn.Linear(2, 2)})
    model["adapter"] = torch.nn.BatchNorm1d(2)  # with buffers, which are kept
    model["in"].requires_grad_(False)
    if tied:
        model["out"].weight = model["in"].weight
    whole = {name: torch.full_like(tensor, 7) for name, tensor in model.state_dict().items()}
    frozen = {"in.weight", "in.bias"} | ({"out.weight"} if tied else set())
    assert deepspeed._frozen(model) == frozen
    deepspeed._take({name: tensor for name, tensor in whole.items() if name not in frozen}, model)
    assert {name for name, tensor in model.state_dict().items() if (tensor != 7).any()} == frozen
    deepspeed._take(whole, model)
    assert all((tensor == 7).all() for tensor in model.state_dict().values())
    for other in (
        {**whole, "more": torch.zeros(1)},
        {name: tensor for name, tensor in whole.items() if name != "out.bias"},
        {name: tensor for name, tensor in whole.items() if name != "adapter.running_mean"},
    ):
        with pytest.raises(ValueError, match="another model or of other LoRA settings"):
            deepspeed._take(other, model)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_checkpoint_that_is_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    state = tmp_path / "state"
    ranks = Ranks(folder, 1, ZERO2)
    try:
        ranks.call(_update, [(j,) for j in make_jobs(GROUPS, simple_loss)])
        ranks.call(_save, [(state,)])
        for path in (state / "deepspeed").iterdir():
            kept = path.read_bytes()
            torch.save({"module": Harmful()}, path)
            with pytest.raises(RuntimeError, match="holds more than tensors"):
                ranks.call(_load, [(state,)])
            path.write_bytes(kept)
        ranks.call(_load, [(state,)])
    finally:
        ranks.close()
    assert not (tmp_path / "ran").exists()
