"""The shared parts of a policy loss: ratios, clipping, rollout correction, global aggregation.

Invariant: a share of the loss depends on its own rows and on the global `Counts` only, so shares
add up to the loss however rows are split. Masked positions are replaced before any exp or product,
so whatever stands there reaches neither values nor gradients. What is per sequence is per rollout,
which is a row unless `rollouts` says otherwise. Shapes: [B, T] unless said otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, assert_never

from actors.messages import Counts, LossTerms, RolloutRows, TokenBatch, ValueBatch

if TYPE_CHECKING:
    import torch

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Correction = Literal["none", "token", "sequence", "icepop"]
OldPolicy = Literal["policy", "rollout"]


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: differences of log-probs do not survive bf16."""
    import torch

    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def masked_difference(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """a - b in float32 or wider, 0 where masked."""
    import torch

    return torch.where(mask, wide(a) - wide(b), 0.0)


def old_logp(batch: TokenBatch, old: OldPolicy) -> torch.Tensor:
    """The log-probs that the ratio is taken against, detached."""
    return (batch.old if old == "policy" else batch.roll).detach()


def start_logp(batch: TokenBatch, old: OldPolicy) -> torch.Tensor:
    """`old_logp` to compare with the rollout engine's, which has no dropout: without its noise."""
    if old == "policy" and batch.start is not None:
        return batch.start.detach()
    return old_logp(batch, old)


def log_ratio(batch: TokenBatch, old: OldPolicy = "policy") -> torch.Tensor:
    """d = logp - old, 0 where masked."""
    return masked_difference(batch.logp, old_logp(batch, old), batch.mask)


def rollout_tokens(mask: torch.Tensor, rollouts: RolloutRows | None = None) -> torch.Tensor:
    """Valid tokens of each row's whole rollout, [B]."""
    return mask.sum(1) if rollouts is None else rollouts.tokens


def rollout_sum(
    x: torch.Tensor, mask: torch.Tensor, rollouts: RolloutRows | None = None
) -> torch.Tensor:
    """Sum over the valid tokens of each row's rollout, [B]; all rows of a rollout must be here."""
    import torch

    of_rows = torch.where(mask, x, 0.0).sum(1)
    if rollouts is None:
        return of_rows
    return torch.zeros_like(of_rows).index_add(0, rollouts.index, of_rows)[rollouts.index]


def rollout_mean(
    x: torch.Tensor, mask: torch.Tensor, rollouts: RolloutRows | None = None
) -> torch.Tensor:
    """Mean over the valid tokens of each row's rollout, [B]; 0 for one without a valid token."""
    return rollout_sum(x, mask, rollouts) / rollout_tokens(mask, rollouts).clamp(min=1)


def clipped_surrogate(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ell = -min(r*A, clip(r, 1-low, 1+high)*A), dual clip min(ell, -c*A) for A < 0; and a mask.

    Written as -A * r with r held inside the window that the sign of A leaves: above by 1+high for
    A > 0, below by 1-low (and above by c) for A < 0. The returned mask (bool) says where r was
    outside, which is where no gradient flows; on the edge it does. `exp` is differentiated only
    where it counts, so a ratio that overflows beyond the clip makes no 0 * inf; nor does one of a
    token whose rollout weight is 0, where `weights` are given: such a token is dropped.
    """
    import torch

    a = torch.where(mask, wide(advantages.detach()), 0.0)
    ceiling = float("inf") if dual_clip is None else dual_clip
    upper = torch.where(a > 0, 1.0 + clip_high, torch.full_like(log_ratio, ceiling))
    lower = torch.where(a < 0, 1.0 - clip_low, torch.zeros_like(log_ratio))
    ratio = log_ratio.detach().exp()
    outside = ((ratio > upper) | (ratio < lower)) & (a != 0)
    still = outside | (a == 0) if weights is None else outside | (a == 0) | (weights == 0)
    flows = torch.where(still, 0.0, log_ratio).exp()
    ratio = torch.where(outside, ratio.clamp(lower, upper), flows)
    return -a * ratio, outside


def rollout_weights(
    old: torch.Tensor,
    roll: torch.Tensor,
    mask: torch.Tensor,
    correction: Correction,
    cap: float,
    rollouts: RolloutRows | None = None,
) -> torch.Tensor:
    """w from q = exp(old - roll), detached: truncated importance weights of the rollout engine.

    `token` min(q, cap); `sequence` min(prod q, cap) along the rollout; `icepop` q where
    1/cap <= q <= cap and 0 elsewhere; `none` 1.
    """
    import torch

    log_q = masked_difference(old.detach(), roll.detach(), mask)
    match correction:
        case "none":
            return torch.ones_like(log_q)
        case "token":
            return log_q.exp().clamp(max=cap)
        case "sequence":
            product = rollout_sum(log_q, mask, rollouts).exp()
            return product.clamp(max=cap)[:, None].expand_as(log_q)
        case "icepop":
            q = log_q.exp()
            return torch.where((q >= 1.0 / cap) & (q <= cap), q, 0.0)
    assert_never(correction)


def numerator(
    x: torch.Tensor,
    mask: torch.Tensor,
    how: Aggregation,
    budget: int,
    rollouts: RolloutRows | None = None,
) -> tuple[torch.Tensor, str]:
    """This share's part of agg(x) before the global division, and the `Counts` field it needs."""
    import torch

    x = torch.where(mask, x, 0.0)
    match how:
        case "token_mean":
            return x.sum(), "tokens"
        case "sequence_mean":
            return (x.sum(1) / rollout_tokens(mask, rollouts).clamp(min=1)).sum(), "nonempty_rows"
        case "constant":
            return x.sum() / budget, "rows"
    assert_never(how)


def aggregate(
    x: torch.Tensor,
    mask: torch.Tensor,
    counts: Counts,
    how: Aggregation,
    budget: int,
    rollouts: RolloutRows | None = None,
) -> torch.Tensor:
    """This share of agg(x); shares add up to it. 0 where the whole step has no trained token."""
    total, field = numerator(x, mask, how, budget, rollouts)
    return total / max(getattr(counts, field), 1.0)


def masked_max(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The largest non-negative x on valid tokens; 0 where there is none."""
    import torch

    return torch.cat([x[mask], x.new_zeros(1)]).max()


def value_loss(batch: ValueBatch, clip: float | None, how: Aggregation = "token_mean") -> LossTerms:
    """0.5 * agg(max((V-R)^2, (V_old + clip(V-V_old, -c, c) - R)^2)); `clip` None leaves (V-R)^2."""
    import torch

    mask = batch.mask
    old = torch.where(mask, wide(batch.old.detach()), 0.0)
    returns = torch.where(mask, wide(batch.returns.detach()), 0.0)
    values = torch.where(mask, wide(batch.values), 0.0)
    squares = (values - returns).square()
    clipped = torch.zeros_like(mask)
    if clip is not None:
        held = (old + (values - old).clamp(-clip, clip) - returns).square()
        clipped = held.detach() > squares.detach()
        squares = torch.maximum(squares, held)
    loss, field = numerator(0.5 * squares, mask, how, batch.budget, batch.rollouts)
    return LossTerms(
        loss=loss / max(getattr(batch.counts, field), 1.0),
        sums={
            "loss/value": (loss.detach(), field),
            "ppo/value_clip_fraction": ((clipped & mask).sum().to(loss.dtype), "tokens"),
        },
    )
