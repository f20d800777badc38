"""What crosses between roles: prompts, groups of completions, shares of an update. Data only.

Token data is ragged and flat: one array over the completions of a group, cut by `lengths`. Nothing
here is padded, so a group costs what its tokens cost. Shape legend: G completions of one group,
N = sum of their lengths, P prompt tokens, B rows of a micro-batch, T its padded response width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch

Messages = list[dict[str, Any]]


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the model produced an end-of-sequence token, which is the last of its tokens
    LENGTH = "length"  # cut at the sampling budget


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready to be rolled out."""

    row: int  # index in the data set
    source: str | Messages  # as the user's data has it; reward functions get this one
    text: str  # what the model sees, chat template applied
    token_ids: np.ndarray  # [P] int32, of `text`
    columns: dict[str, Any] = field(default_factory=dict)  # every other data column


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy."""

    completions: int  # G
    max_tokens: int  # the sampling budget per completion, end-of-sequence token included
    temperature: float
    seed: int  # with `group_id` it fixes the draw in the transformers engine; vLLM has its own
    group_id: int


@dataclass(frozen=True)
class VersionSpan:
    """`tokens` consecutive tokens of one completion, made by the weights of policy `version`."""

    version: int
    tokens: int


@dataclass(frozen=True)
class GroupRecord:
    """What the controller knows of a rolled-out group: small, and no token arrays."""

    group_id: int
    prompt_tokens: int
    lengths: tuple[int, ...]  # [G] response tokens, end-of-sequence token included
    finish_reasons: tuple[FinishReason, ...]  # [G]
    version_spans: tuple[tuple[VersionSpan, ...], ...]  # [G], spans in token order
    seconds: float  # wall time of the generation
    replica: str

    @property
    def tokens(self) -> int:
        """Response tokens of the whole group."""
        return sum(self.lengths)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version any token of the group was made by."""
        return min(span.version for spans in self.version_spans for span in spans)


@dataclass(frozen=True)
class GroupTensors:
    """The tokens of one group; lives in the object store and is passed by reference."""

    group_id: int
    prompt_ids: np.ndarray  # [P] int32
    lengths: tuple[int, ...]  # [G]
    token_ids: np.ndarray  # [N] int32
    logprobs: np.ndarray  # [N] float32, behaviour log-probs at the sampling temperature
    mask: np.ndarray  # [N] bool; False is an interior token the policy did not write

    def completion(self, index: int) -> slice:
        """Where completion `index` lies in the flat arrays."""
        start = sum(self.lengths[:index])
        return slice(start, start + self.lengths[index])


@dataclass(frozen=True)
class Scores:
    """What the reward actors say of one group: one number per completion and criterion.

    The decoded texts are the call's second return, which stays in the object store.
    """

    group_id: int
    criteria: tuple[str, ...]  # [K]
    values: tuple[tuple[float, ...], ...]  # [G][K], finite
    seconds: float


@dataclass(frozen=True)
class GroupWork:
    """One group of an optimiser batch: references to its arrays and its sequence advantages.

    The fields typed `Any` are Ray object references when they cross an actor call; a policy rank
    fetches only the groups that its rows come from.
    """

    group_id: int
    prompt_tokens: int
    lengths: tuple[int, ...]  # [G]
    trained: tuple[bool, ...]  # [G]; False leaves the completion out of the loss, whatever its mask
    truncated: tuple[bool, ...]  # [G] cut by the length limit
    advantages: tuple[float, ...]  # [G]
    scores: tuple[float, ...]  # [G] the reward after weighting and shaping
    tensors: Any  # GroupTensors
    reference: Any | None = None  # [N] float32 log-probs under the frozen model
    values: Any | None = None  # StateValues, with a critic
    targets: Any | None = None  # TokenTargets, where the algorithm prepared token-level ones


@dataclass(frozen=True)
class StateValues:
    """What the critic says of one group at the start of the step's update."""

    values: np.ndarray  # [N] float32, of the state before each response token
    final: np.ndarray  # [G] float32, of the state after the last one


@dataclass(frozen=True)
class TokenTargets:
    """Token-level targets of one group, fixed before its update (PPO's GAE and what it needs)."""

    old: np.ndarray  # [N] float32 log-probs at the start of the step's update
    advantages: np.ndarray  # [N] float32, whitened where the algorithm whitens
    returns: np.ndarray | None = None  # [N] float32, with a critic
    values: np.ndarray | None = None  # [N] float32, with a critic


@dataclass(frozen=True)
class TokenInputs:
    """What token-level targets of one group are made from, on the policy rank that holds it."""

    lengths: tuple[int, ...]  # [G]
    trained: tuple[bool, ...]  # [G]
    truncated: tuple[bool, ...]  # [G]
    scores: tuple[float, ...]  # [G] after weighting and shaping
    mask: np.ndarray  # [N] bool
    old: np.ndarray  # [N] float32 log-probs at the start of the step's update
    reference: np.ndarray | None = None  # [N] float32
    values: np.ndarray | None = None  # [N] float32, of the state before each token
    final_values: np.ndarray | None = None  # [G] float32, of the state after the last token


@dataclass(frozen=True)
class Row:
    """One completion of an optimiser batch: `work` indexes its groups, `completion` its group."""

    work: int
    completion: int
    tokens: int  # prompt + response


@dataclass(frozen=True)
class Counts:
    """The denominators of one optimiser step, global over its micro-batches and ranks."""

    tokens: float  # sum of the mask
    rows: float  # completions, those without a trained token included
    nonempty_rows: float  # completions with at least one trained token


@dataclass(frozen=True)
class PrepareJob:
    """The work of one policy rank before an update: token-level targets of whole groups.

    `prepare(inputs, all_sum)` gives the targets of these groups and figures of the whole step; it
    calls `all_sum`, which sums a float64 vector over ranks, equally often on every rank.
    """

    step: int  # 1-based
    groups: tuple[GroupWork, ...]  # this rank's own
    prepare: Callable[
        [Sequence[TokenInputs], Callable[[torch.Tensor], torch.Tensor]],
        tuple[list[TokenTargets], dict[str, float]],
    ]
    recompute_old: bool  # False: the rollout engine's log-probs are the old ones
    temperature: float


@dataclass(frozen=True)
class UpdateJob:
    """The work of one policy or critic rank in one step: its rows of every optimiser step, and the
    loss, of a `TokenBatch` for the policy and of a `ValueBatch` for the critic."""

    step: int  # 1-based
    groups: tuple[GroupWork, ...]  # of the whole batch; a rank fetches what its rows need
    minibatches: tuple[tuple[Row, ...], ...]  # this rank's rows, one tuple per optimiser step
    loss: Callable[[Any], LossTerms]
    recompute_old: bool  # old log-probs by a pass of their own; else of the targets or the loss
    temperature: float
    budget: int  # max_completion_length, tokens
    early_stop: tuple[str, float] | None = None  # (metric, limit): above it no further steps


@dataclass(frozen=True)
class UpdateResult:
    """What an update reports: figures already reduced over micro-batches and ranks."""

    metrics: dict[str, float]
    seconds: float
    tokens: int  # prompt and response tokens processed by all ranks, each epoch counted


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch as a loss sees it, padded to [B, T]; padding has mask 0 and finite values."""

    logp: torch.Tensor  # [B, T] log-probs of the current policy; the only place gradient flows
    old: torch.Tensor  # [B, T] at the start of this step's update
    roll: torch.Tensor  # [B, T] what the rollout engine reported
    mask: torch.Tensor  # [B, T] bool
    advantages: torch.Tensor  # [B, T] detached; per-completion advantages are broadcast along rows
    counts: Counts
    budget: int  # max_completion_length, tokens
    ref: torch.Tensor | None = None  # [B, T] under the frozen reference
    entropy: torch.Tensor | None = None  # [B, T] of the full distribution, nats


@dataclass(frozen=True)
class ValueBatch:
    """A micro-batch as a critic's loss sees it, padded to [B, T]; padding has finite values."""

    values: torch.Tensor  # [B, T] of the current critic; the only place gradient flows
    old: torch.Tensor  # [B, T] values at the start of this step's update
    returns: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T] bool
    counts: Counts
    budget: int  # max_completion_length, tokens


@dataclass(frozen=True)
class LossTerms:
    """A loss's share from one micro-batch. Shares add up to the loss of the optimiser step.

    `sums` hold numerators whose denominator is named by the key of `Counts` they are divided by,
    so that reported figures are exact over micro-batches and ranks too.
    """

    loss: torch.Tensor  # scalar
    sums: dict[str, tuple[torch.Tensor, str]] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
