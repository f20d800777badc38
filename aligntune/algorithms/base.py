"""The contract between an algorithm and the loop that runs it.

An algorithm is a frozen bag of its hyperparameters with a few pure functions. The controller asks
it what it needs and for sequence advantages; policy ranks call its loss, which never sees where a
micro-batch ends: every denominator is in `TokenBatch.counts`.

Reading a config needs names and fields alone, so torch is imported by what computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.messages import LossTerms, TokenBatch, TokenInputs, TokenTargets, ValueBatch
from aligntune.algorithms import losses
from aligntune.algorithms.advantages import AllSum, on_one_rank, weighted_sum
from aligntune.algorithms.filters import named, varies
from aligntune.algorithms.kl import Estimator, estimate
from aligntune.algorithms.losses import Aggregation, Correction, OldPolicy

if TYPE_CHECKING:
    import torch

SCORE = "weighted sum"
"""In `Algorithm.keep`, the weighted sum of a group's criteria, before shaping. No criterion of a
run has this name; `reward` and `score` are names that people give their own functions."""


@dataclass(frozen=True)
class Defaults:
    """What the config falls back to where the user sets nothing.

    `epochs` are passes over the batch of a step, `minibatches` the optimiser steps of one pass.
    """

    learning_rate: float
    completions_per_group: int
    epochs: int = 1
    minibatches: int = 1
    adam_betas: tuple[float, float] = (0.9, 0.999)
    critic_learning_rate: float | None = None


@dataclass(frozen=True)
class Needs:
    """Which roles an algorithm cannot do without."""

    reference: bool
    critic: bool = False
    reward_model: bool = False
    min_group: int = 2  # smallest G that gives a signal


class Algorithm(BaseModel):
    """Options every online algorithm has, and the functions it must give."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Defaults]
    backends: ClassVar[tuple[str, ...]] = ("trl", "unsloth")

    aggregation: Aggregation = Field(description="how token losses become one number")
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference model")
    kl_estimator: Estimator = Field("k3", description="of the KL per token")
    kl_in: Literal["loss", "reward"] = Field("loss", description="where the KL term is charged")
    clip_low: float = Field(0.2, gt=0, description="ratios below 1 - this are clipped where A < 0")
    clip_high: float = Field(0.2, gt=0, description="ratios above 1 + this are clipped where A > 0")
    dual_clip: float | None = Field(None, gt=1, description="bound of r where A < 0")
    old: OldPolicy = Field(
        "policy", description="ratios against recomputed log-probs, or the rollout engine's"
    )
    correction: Correction = Field(
        "token", description="importance weights for rollout engine and staleness"
    )
    correction_cap: float = Field(
        2.0, ge=1, description="bound of these weights (icepop: and 1 / cap from below)"
    )
    entropy_coefficient: float = Field(0.0, description="weight of the entropy bonus")
    combine: Literal["sum", "decoupled"] = Field(
        "sum", description="weigh criteria then normalise, or normalise each and then weigh (GDPO)"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_correction_against_the_rollout_itself(cls, given: Any) -> Any:
        # The default correction is that of old: policy; one that was asked for is checked below.
        if isinstance(given, dict) and given.get("old") == "rollout":
            return {"correction": "none", **given}
        return given

    @model_validator(mode="after")
    def _options_make_sense(self) -> Self:
        if self.clip_low >= 1:
            raise ValueError(
                f"clip_low must be below 1, got {self.clip_low}: a ratio never falls to "
                "1 - clip_low <= 0, so nothing would be clipped from below"
            )
        if self.correction == "none":
            self.refuse_inert("correction_cap", "correction: none has no weights to bound")
        if self.old == "rollout" and self.correction != "none":
            raise ValueError(
                f"correction: {self.correction} has no meaning with old: rollout, which takes the "
                "ratio against the rollout engine already; set correction: none or old: policy"
            )
        if self.beta == 0 and not self.needs.reference:
            for option in ("kl_in", "kl_estimator"):
                self.refuse_inert(option, "beta is 0, and there is no KL")
        if self.kl_in == "loss" and self.beta > 0 and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator: k1 has no place in the loss: its expected gradient is 0, so beta "
                "would hold nothing; set kl_estimator: k3 (or k2), or kl_in: reward"
            )
        if self.kl_in == "reward" and self.beta > 0 and self.combine == "decoupled":
            raise ValueError(
                "combine: decoupled has no place for kl_in: reward, which is no criterion and has "
                "no group normalisation of its own; set kl_in: loss or combine: sum"
            )
        return self

    def refuse_inert(self, option: str, reason: str) -> None:
        """Raises ValueError where an option was set that does nothing beside the others."""
        if getattr(self, option) != type(self).model_fields[option].default:
            raise ValueError(f"{option} would do nothing: {reason}; remove it")

    @property
    def needs(self) -> Needs:
        """Roles this algorithm needs with these options; beta 0 needs no reference model."""
        return Needs(reference=self.beta > 0)

    @property
    def prepares(self) -> bool:
        """Whether policy ranks call `prepare` before the update, with the batch's old log-probs."""
        return self.kl_in == "reward" and self.beta > 0

    @property
    def whole_rollouts(self) -> bool:
        """Whether the loss looks at a whole rollout at once: its rows share a micro-batch then."""
        return self.correction == "sequence"

    @property
    def sampling_rounds(self) -> int | None:
        """Rounds of drawing groups until a step's are kept; None where `keep` keeps every group."""
        return None

    @property
    def early_stop(self) -> tuple[str, float] | None:
        """(metric of an optimiser step, limit): the step's further updates are skipped above it."""
        return None

    @property
    def places_turn_rewards(self) -> bool:
        """Whether `prepare` takes the rewards of single turns where they were earned. Else a
        rollout's score has their sum."""
        return False

    @property
    def sampling_metric(self) -> str:
        """What `keep` looks at: a criterion, or `SCORE`."""
        return SCORE

    def check_run(self, criteria: Sequence[str], budget: int, completions: int) -> None:
        """Raises ValueError, before anything starts, where an option does not fit the run.

        `criteria` are the names of the rewards, `budget` is `max_completion_length` in tokens,
        `completions` are those of a step.
        """

    def after_step(self, metrics: dict[str, float], completions: int) -> Self:
        """The algorithm of the next step, from this step's metrics; itself where nothing adapts."""
        return self

    def carried_on(self, saved: Mapping[str, Any]) -> Self:
        """This algorithm with what `after_step` has adapted, from the `model_dump` in a checkpoint.

        All else is as the config says now.
        """
        return self

    def keep(self, scores: dict[str, list[float]]) -> bool:
        """Whether a group is trained on, from its raw scores per criterion and of `SCORE`.

        A criterion's list has no entry for a completion that it abstains from.
        """
        return True

    def length_reward(self, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        """What is added to the rewards [G] of a group for its sampled `lengths` [G], float64."""
        import torch

        return torch.zeros_like(lengths, dtype=torch.float64)

    @final
    def shape(self, rewards: torch.Tensor, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        """Rewards [G] of a group with its `length_reward`."""
        return rewards + self.length_reward(lengths, budget)

    def contrast(self, scores: Mapping[str, list[float]], metric: str = SCORE) -> bool:
        """Whether advantages can tell the completions of a group apart, from its raw scores.

        Where criteria are normalised one by one, each that varies tells, also where their weighted
        sum is constant.
        """
        if self.combine == "decoupled" and metric == SCORE:
            return any(varies(of) for name, of in scores.items() if name != SCORE)
        return varies(named(scores, metric))

    def trains_on(self, truncated: bool) -> bool:
        """Whether a rollout enters the loss; DAPO's overlong filtering says no if truncated."""
        return True

    def sequence_advantages(
        self, groups: Sequence[torch.Tensor], weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """Advantages [G] of each of a step's groups, from its rewards [G, K] and weights [K].

        All float64. Groups may differ in G. A reward is NaN where its criterion abstains; where all
        do, the advantage is 0. Raises ValueError on an infinite reward.
        """
        raise NotImplementedError

    def scores_and_advantages(
        self,
        groups: Sequence[torch.Tensor],
        weights: torch.Tensor,
        lengths: Sequence[torch.Tensor],
        budget: int,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The shaped scores and the advantages, both [G] float64, of each group of a step.

        `groups` are raw rewards [G, K], NaN where a criterion abstains, `weights` [K], `lengths`
        [G] sampled tokens of each rollout, `budget` in tokens. The score of a rollout that all
        abstain from is NaN. Where criteria are normalised one by one, shaping is one more criterion
        of weight 1, carried apart: a difference of scores would lose its digits.
        """
        import torch

        raw = [weighted_sum(rewards, weights) for rewards in groups]
        added = [self.length_reward(n, budget) for n in lengths]
        scores = [self.shape(r, n, budget) for r, n in zip(raw, lengths, strict=True)]
        one = torch.ones(1, dtype=torch.float64)
        if self.combine == "sum":
            return scores, self.sequence_advantages([s[:, None] for s in scores], one)
        criteria = [
            torch.cat([rewards.double(), a.masked_fill(r.isnan(), torch.nan)[:, None]], dim=1)
            for rewards, r, a in zip(groups, raw, added, strict=True)
        ]
        return scores, self.sequence_advantages(criteria, torch.cat([weights.double(), one]))

    def prepare(
        self, groups: Sequence[TokenInputs], all_sum: AllSum = on_one_rank
    ) -> tuple[list[TokenTargets], dict[str, float]]:
        """Token-level targets of a rank's groups, and figures of the whole step. See `prepares`.

        Here, the KL in the reward of a rollout: R' = R - beta * sum_t k_t, then advantages. One
        that is not trained on is in its group's baseline, with its KL.
        """
        import torch

        from aligntune.algorithms.tokens import TokenRows

        rows = TokenRows.of(groups)
        kl = rows.kl(self.kl_estimator)
        penalised = rows.scores - self.beta * kl.sum(1)
        groups_of = [group[:, None] for group in rows.split(penalised)]
        advantages = torch.cat(
            self.sequence_advantages(groups_of, torch.ones(1)) if groups_of else [penalised]
        )
        targets = rows.targets(advantages[:, None].expand_as(kl))
        return targets, rows.figure("kl/reference", kl, all_sum)

    def loss(self, batch: TokenBatch) -> LossTerms:
        """This micro-batch's share of the loss of the optimiser step."""
        raise NotImplementedError

    def value_loss(self, batch: ValueBatch) -> LossTerms:
        """The critic's share of its loss, where the algorithm needs a critic."""
        raise NotImplementedError

    def weights(self, batch: TokenBatch) -> torch.Tensor:
        """Importance weights [B, T] for rollout engine and staleness; 0 drops a token."""
        old = losses.start_logp(batch, self.old)
        how, cap = self.correction, self.correction_cap
        return losses.rollout_weights(old, batch.roll, batch.mask, how, cap, batch.rollouts)

    def terms(
        self,
        batch: TokenBatch,
        log_ratio: torch.Tensor,
        ell: torch.Tensor,
        clipped: torch.Tensor,
    ) -> LossTerms:
        """L = agg(w * ell) + beta * agg(k) - c_entropy * agg(H), and what every algorithm reports.

        `log_ratio`, `ell` and `clipped` [B, T] are the algorithm's own. Figures that are means over
        tokens: `kl/reference` (the chosen estimator, which is what beta multiplies),
        `kl/rollout_vs_policy` (k3 of rollout against old policy, or against the current one where
        old is the rollout), `kl/update` (k3 of old against current policy), `policy/entropy`,
        `policy/clip_fraction`, `correction/weight_mean`. Raises ValueError on a missing input.
        Figures are float64, where an exponential that the loss has clipped does not overflow.
        """
        mask, how, budget, rollouts = batch.mask, self.aggregation, batch.budget, batch.rollouts
        w = self.weights(batch)
        policy, field = losses.numerator(w * ell, mask, how, budget, rollouts)
        total = losses.aggregate(w * ell, mask, batch.counts, how, budget, rollouts)
        drift = losses.log_ratio(batch, self.old).detach()
        recomputed = losses.start_logp(batch, self.old)
        newer = batch.logp.detach() if self.old == "rollout" else recomputed
        mismatch = losses.masked_difference(batch.roll.detach(), newer, mask)
        per_token = {
            "kl/rollout_vs_policy": estimate(mismatch.double(), "k3"),
            "kl/update": estimate(-drift.double(), "k3"),
            "policy/clip_fraction": clipped.to(ell.dtype),
            "correction/weight_mean": w,
        }
        charged = self.beta > 0 and self.kl_in == "loss"
        if batch.ref is not None:
            d_ref = losses.masked_difference(batch.logp, batch.ref.detach(), mask)
            k = estimate(d_ref, self.kl_estimator)
            if charged:
                share = losses.aggregate(k, mask, batch.counts, how, budget, rollouts)
                total = total + self.beta * share
            if self.kl_in == "loss":
                per_token["kl/reference"] = k.detach().double()
        elif charged:
            raise ValueError("beta > 0 needs log-probs of the reference model; the batch has none")
        if batch.entropy is not None:
            entropy = losses.wide(batch.entropy)
            if self.entropy_coefficient != 0:
                bonus = losses.aggregate(entropy, mask, batch.counts, how, budget, rollouts)
                total = total - self.entropy_coefficient * bonus
            per_token["policy/entropy"] = entropy.detach()
        elif self.entropy_coefficient != 0:
            raise ValueError("entropy_coefficient needs the policy's entropy; the batch has none")
        sums = {
            name: losses.numerator(x, mask, "token_mean", budget) for name, x in per_token.items()
        }
        sums["loss/policy"] = (policy.detach(), field)
        ratio = log_ratio.detach().double().exp()
        return LossTerms(total, sums, {"policy/ratio_max": losses.masked_max(ratio, mask)})
