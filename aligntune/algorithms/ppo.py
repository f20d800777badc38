"""PPO (1707.06347) as RLHF practises it (2203.02155): a critic, GAE, the KL in the reward.

Before an update every policy rank turns its groups into token-level targets by `prepare`; they are
the same whatever the ranks, because all moments are of the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from actors.messages import LossTerms, TokenBatch, TokenInputs, TokenTargets, ValueBatch
from aligntune.algorithms.advantages import (
    AllSum,
    gae,
    moments,
    on_one_rank,
    weighted_sum,
    whiten,
)
from aligntune.algorithms.base import Algorithm, Defaults, Needs
from aligntune.algorithms.kl import AdaptiveKL, Estimator
from aligntune.algorithms.losses import Aggregation, clipped_surrogate, log_ratio, value_loss

if TYPE_CHECKING:
    import torch


class PPO(Algorithm):
    """Clipped surrogate over whitened GAE advantages; the critic learns the returns."""

    title: ClassVar[str] = "Proximal Policy Optimization"
    defaults: ClassVar[Defaults] = Defaults(
        learning_rate=1e-6, completions_per_group=1, epochs=4, critic_learning_rate=1e-5
    )

    aggregation: Aggregation = "token_mean"
    beta: float = Field(0.05, ge=0, description="weight of the KL to the reference model")
    kl_estimator: Estimator = "k1"
    kl_in: Literal["loss", "reward"] = Field("reward", description="where the KL term is charged")
    kl_target: float | None = Field(
        None, gt=0, description="steer beta towards this kl/reference (nats per token)"
    )
    kl_horizon: float = Field(10_000, gt=0, description="completions; slowness of that steering")
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of generalised advantage estimation")
    whiten_advantages: bool = Field(
        True, description="to mean 0 and variance 1 over the step's tokens"
    )
    bootstrap_truncated: bool = Field(
        True, description="the critic's value stands after a completion cut by the length limit"
    )
    value_clip: float | None = Field(
        0.2, gt=0, description="how far a value may move from its old one; none: freely"
    )
    score_clip: float | None = Field(None, gt=0, description="scores held within +- this")
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="subtracted from the clipped score of a truncated completion"
    )
    max_update_kl: float | None = Field(
        None, gt=0, description="kl/update (nats per token) that ends the updates of a step"
    )

    @field_validator("combine")
    @classmethod
    def _no_groups_to_decouple(
        cls, combine: Literal["sum", "decoupled"]
    ) -> Literal["sum", "decoupled"]:
        if combine == "decoupled":
            raise ValueError(
                "combine: decoupled normalises within groups, and PPO's baseline is its critic, "
                "not a group; set combine: sum"
            )
        return combine

    @model_validator(mode="after")
    def _adaptive_needs_a_start(self) -> Self:
        if self.kl_target is not None and self.beta == 0:
            raise ValueError("kl_target steers beta by factors, and beta is 0; set beta above 0")
        if self.kl_target is None:
            self.refuse_inert("kl_horizon", "without kl_target beta is fixed")
        return self

    @property
    def needs(self) -> Needs:
        """A critic and a reward model; the reference unless beta is 0. Groups may have one."""
        return Needs(reference=self.beta > 0, critic=True, reward_model=True, min_group=1)

    @property
    def prepares(self) -> bool:
        """Always: GAE is per token."""
        return True

    @property
    def places_turn_rewards(self) -> bool:
        """Always: GAE credits each turn with what it earned."""
        return True

    @property
    def early_stop(self) -> tuple[str, float] | None:
        """Past `max_update_kl` the batch is too old for further updates."""
        return None if self.max_update_kl is None else ("kl/update", self.max_update_kl)

    def after_step(self, metrics: dict[str, float], completions: int) -> Self:
        """With `kl_target`, the adaptive beta of the next step. A step without a trained token has
        no KL, and leaves it as it is."""
        kl = metrics.get("kl/reference")
        if self.kl_target is None or kl is None:
            return self
        adapted = AdaptiveKL(self.beta, self.kl_target, self.kl_horizon).after(kl, completions)
        return self.model_copy(update={"beta": adapted.beta})

    def carried_on(self, saved: Mapping[str, Any]) -> Self:
        """With the adapted beta, where it was adapted and still is."""
        if self.kl_target is None or saved["kl_target"] is None:
            return self
        return self.model_copy(update={"beta": saved["beta"]})

    def check_run(self, criteria: Sequence[str], budget: int, completions: int) -> None:
        """Raises ValueError where one step could take beta to 0 or below."""
        if self.kl_target is not None and 0.2 * completions >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon={self.kl_horizon:g} is too short for steps of {completions} "
                f"completions: beta could reach 0 in one; give more than {0.2 * completions:g}, "
                "some hundred steps' worth is usual"
            )

    def sequence_advantages(
        self, groups: Sequence[torch.Tensor], weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """The scores themselves; `prepare` turns them into advantages per token."""
        return [weighted_sum(rewards, weights) for rewards in groups]

    def token_rewards(
        self, scores: torch.Tensor, truncated: torch.Tensor, k: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """rho_t = -beta * k_t + [t = last valid] * score, [B, T]; scores and truncated are [B]."""
        import torch

        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        scores = scores - self.missing_eos_penalty * truncated
        charge = self.beta if self.kl_in == "reward" else 0.0
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        return torch.where(mask, -charge * k, 0.0) + torch.where(last, scores[:, None], 0.0)

    def prepare(
        self, groups: Sequence[TokenInputs], all_sum: AllSum = on_one_rank
    ) -> tuple[list[TokenTargets], dict[str, float]]:
        """Old log-probs, whitened advantages, returns and old values per token, and figures.

        Raises ValueError where a group has no critic values, or no reference with a KL in the
        reward. `ppo/explained_variance` is left out where all returns are equal, up to rounding,
        and means over tokens where none is trained.
        """
        import torch

        from aligntune.algorithms.tokens import TokenRows

        rows = TokenRows.of(groups)
        mask = rows.mask
        in_reward = self.kl_in == "reward" and self.beta > 0
        k = rows.kl(self.kl_estimator) if in_reward else torch.zeros_like(rows.old)
        rho = self.token_rewards(rows.scores, rows.truncated, k, mask)
        rho = rho + torch.where(mask, rows.given("rewards"), 0.0)
        values = rows.padded("values", "GAE")
        after = torch.zeros_like(rows.scores)
        if self.bootstrap_truncated:
            final = rows.per_completion("final_values", "the bootstrap at truncation")
            after = torch.where(rows.truncated, final, after)
        advantages = gae(rho, values, mask, after, self.gamma, self.gae_lambda)
        returns = advantages + values
        of_returns = moments(returns[mask], all_sum)
        of_errors = moments((returns - values)[mask], all_sum)
        of_advantages = moments(advantages[mask], all_sum)
        figures = {"ppo/beta": self.beta}
        if of_returns.count:
            figures["ppo/return_mean"] = of_returns.mean
        if of_returns.varies:
            figures["ppo/explained_variance"] = 1 - of_errors.variance / of_returns.variance
        if in_reward:
            figures |= rows.figure("kl/reference", k, all_sum)
        if self.whiten_advantages:
            advantages = whiten(advantages, of_advantages)
        return rows.targets(advantages, returns, values), figures

    def loss(self, batch: TokenBatch) -> LossTerms:
        """Eq. 7 of the paper, negated."""
        d = log_ratio(batch, self.old)
        ell, clipped = clipped_surrogate(
            d,
            batch.advantages,
            batch.mask,
            self.clip_low,
            self.clip_high,
            self.dual_clip,
            self.weights(batch),
        )
        return self.terms(batch, d, ell, clipped)

    def value_loss(self, batch: ValueBatch) -> LossTerms:
        """The critic's share: squared error to the returns, with clipped values."""
        return value_loss(batch, self.value_clip, self.aggregation)
