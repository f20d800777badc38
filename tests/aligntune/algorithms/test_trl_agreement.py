"""Independence: TRL's GRPOTrainer computes the same losses from the same tensors, where it does.

Its `_compute_loss` is called on a stand-in for the trainer that carries the settings it reads, and
whose forward pass returns the given log-probs. The last tests hold where TRL differs and by what.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.messages import TokenBatch
from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from tests.trl_without_vllm import grpo_trainer

from .batches import counts_of, random_batch

pytestmark = pytest.mark.slow  # importing TRL's trainer takes seconds


def trl_loss(batch: TokenBatch, **settings: Any) -> torch.Tensor:
    """TRL's loss of one batch that is the whole optimiser step on one process."""
    s = {
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0,
        "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, "correct": False, "entropy": 0.0,
    } | settings  # fmt: skip
    metrics: dict[str, Any] = {"train": {}}

    class Anything(dict[str, list[float]]):
        def __missing__(self, key: str) -> list[float]:
            return self.setdefault(key, [])

    metrics["train"] = Anything()
    trainer = SimpleNamespace(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=s["importance_sampling_level"],
        beta=s["beta"],
        loss_type=s["loss_type"],
        epsilon_low=s["epsilon_low"],
        epsilon_high=s["epsilon_high"],
        args=SimpleNamespace(
            delta=s["delta"], use_bias_correction_kl=False, steps_per_generation=1
        ),
        use_vllm=s["correct"],
        vllm_importance_sampling_correction=s["correct"],
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=batch.budget,
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            reduce=lambda x, reduction: x,
            gather=lambda x: x,
        ),
        _entropy_bonus_enabled=s["entropy"] != 0,
        use_adaptive_entropy=False,
        entropy_coef=s["entropy"],
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *a, **k: (batch.logp, batch.entropy, None),
    )
    ids = torch.zeros(batch.mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": batch.mask.to(batch.logp.dtype),
        "advantages": batch.advantages[:, 0],
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": batch.mask.sum(),
        "importance_sampling_ratio": (batch.old - batch.roll).exp().clamp(max=2.0),
    }
    return grpo_trainer().GRPOTrainer._compute_loss(trainer, None, inputs)


def without_empty_rows(seed: int, drift: float = 0.4) -> TokenBatch:
    batch = random_batch(seed, drift=drift)
    mask = batch.mask.clone()
    mask[~mask.any(1), 1] = True
    return dataclasses.replace(batch, mask=mask, counts=counts_of(mask))


def loss_and_gradient(loss: torch.Tensor, batch: TokenBatch) -> tuple[float, torch.Tensor]:
    return loss.item(), torch.autograd.grad(loss, batch.logp)[0]


WIDE = {"clip_low": 0.1, "clip_high": 0.15}
SAME: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "grpo": (GRPO(correction="none"), {"beta": 0.04}),
    "grpo, corrected": (GRPO(correction="token"), {"beta": 0.04, "correct": True}),
    "grpo, dual clip": (GRPO(beta=0, correction="none", dual_clip=1.5), {"delta": 1.5}),
    "dr_grpo": (DrGRPO(correction="none"), {"loss_type": "dr_grpo"}),
    "dr_grpo, kl": (
        DrGRPO(correction="token", beta=0.1),
        {"loss_type": "dr_grpo", "beta": 0.1, "correct": True},
    ),
    "dapo": (DAPO(correction="none"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, entropy": (
        DAPO(correction="none", entropy_coefficient=0.1),
        {"loss_type": "dapo", "epsilon_high": 0.28, "entropy": 0.1},
    ),
    "gspo": (
        GSPO(correction="none"),
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, wide": (
        GSPO(correction="none", beta=0.1, **WIDE),
        {
            "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15,
            "beta": 0.1,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drift", [0.4, 3e-4])
def test_trl_computes_the_same_loss_and_gradient(name: str, seed: int, drift: float) -> None:
    algorithm, settings = SAME[name]
    batch = without_empty_rows(seed, drift)
    ours, our_gradient = loss_and_gradient(algorithm.loss(batch).loss, batch)
    theirs, their_gradient = loss_and_gradient(trl_loss(batch, **settings), batch)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["dr_grpo", "dapo"])
def test_an_empty_row_is_counted_alike_by_dr_grpo_and_not_at_all_by_dapo(name: str) -> None:
    algorithm, settings = SAME[name]
    batch = random_batch(0)
    assert not batch.mask.any(1).all()
    assert algorithm.loss(batch).loss.item() == pytest.approx(
        trl_loss(batch, **settings).item(), rel=1e-9
    )


@pytest.mark.parametrize("name", ["grpo", "gspo, wide"])
def test_trl_divides_sequence_means_by_empty_rows_too(name: str) -> None:
    """Ours / theirs is all rows over rows with a trained token."""
    algorithm, settings = SAME[name]
    batch = random_batch(0)
    ratio = algorithm.loss(batch).loss.item() / trl_loss(batch, **settings).item()
    assert batch.counts.rows != batch.counts.nonempty_rows
    assert ratio == pytest.approx(batch.counts.rows / batch.counts.nonempty_rows, rel=1e-9)


def test_trl_takes_the_entropy_as_a_token_mean_whatever_the_loss() -> None:
    batch = without_empty_rows(1)
    algorithm = GRPO(beta=0, correction="none", entropy_coefficient=0.1)
    entropy = batch.entropy
    assert entropy is not None
    token_mean = entropy[batch.mask].mean().item()
    sequence_mean = torch.stack(
        [row[m].mean() for row, m in zip(entropy, batch.mask, strict=True)]
    ).mean().item()  # fmt: skip
    difference = algorithm.loss(batch).loss.item() - trl_loss(batch, entropy=0.1).item()
    assert difference == pytest.approx(-0.1 * (sequence_mean - token_mean), rel=1e-9)
    assert abs(difference) > 1e-4


def test_trl_holds_a_dual_clip_inside_the_window_at_the_window() -> None:
    """With c < 1 + clip_high TRL bounds r at 1 + clip_high for A < 0 (and at c for A > 0)."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    old = torch.zeros(2, 1, dtype=torch.float64)
    batch = TokenBatch(
        logp=torch.tensor([[2.0], [1.15]], dtype=torch.float64).log().requires_grad_(), old=old,
        roll=old, ref=old, entropy=old, mask=mask, counts=counts_of(mask), budget=4,
        advantages=torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
    )  # fmt: skip
    ours = GRPO(beta=0, correction="none", dual_clip=1.1).loss(batch).loss.item()
    assert ours == pytest.approx((1.1 - 1.15) / 2, rel=1e-9)
    assert trl_loss(batch, delta=1.1).item() == pytest.approx((1.2 - 1.1) / 2, rel=1e-9)


def test_trl_averages_the_means_of_micro_batches() -> None:
    """Two micro-batches of unequal rows: TRL weighs the micro-batches, we the rows."""
    batch = without_empty_rows(2)
    whole = GRPO(beta=0, correction="none").loss(batch).loss.item()
    per_row = []
    for row in range(len(batch.mask)):
        part = {
            f.name: getattr(batch, f.name)[row : row + 1]
            for f in dataclasses.fields(batch)
            if isinstance(getattr(batch, f.name), torch.Tensor)
        }
        per_row.append(trl_loss(dataclasses.replace(batch, **part)).item())
    assert whole == pytest.approx(sum(per_row) / len(per_row), rel=1e-9)
    theirs = (per_row[0] + sum(per_row[1:]) / len(per_row[1:])) / 2
    assert abs(theirs - whole) > 1e-3
