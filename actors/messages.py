"""What crosses between roles: prompts, groups of completions, shares of an update. Data only.

A group is one prompt and its G rollouts. A rollout is one row of tokens after the prompt, or more
where its history was rendered anew between turns; R rows in all, those of a rollout side by side.
Token data is ragged and flat: one array over the rows of a group, cut by `lengths`, unpadded. Shape
legend: G rollouts and R rows of one group (one turn of text: R = G), N = sum of the rows' lengths,
P prompt tokens, B rows of a micro-batch, T its padded response width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.lean import Lean
from actors.transcript import Transcript

if TYPE_CHECKING:
    import torch

Messages = list[dict[str, Any]]


class FinishReason(StrEnum):
    """Why a rollout ended."""

    STOP = "stop"  # the model ended its (last) turn, or the environment the episode
    LENGTH = "length"  # cut at the sampling budget
    TURNS = "turns"  # cut at the limit of turns, or of tool calls
    CONTEXT = "context"  # the next turn had no room in the model's positions
    TIME = "time"  # cut at the limit of time
    ERROR = "error"  # the environment could not go on

    @property
    def truncated(self) -> bool:
        """Whether a limit cut the rollout, which might have gone on."""
        return self not in (FinishReason.STOP, FinishReason.ERROR)


@dataclass(frozen=True)
class Prompt:
    """One row of the data set, ready to be rolled out."""

    row: int  # index in the data set
    source: str | Messages  # as the user's data has it; user code gets this one
    text: str  # what the model sees, chat template applied
    token_ids: np.ndarray  # [P] int32, of `text`
    columns: dict[str, Any] = field(default_factory=dict)  # every other data column
    tools: tuple[dict[str, Any], ...] = ()  # schemas in the row's column `tools`, in `text` too
    transcript: Transcript | None = None  # both forms of `source`, where it is one

    def __reduce__(self) -> tuple[Any, ...]:
        """As bytes and a letter: an array has more than that around it."""
        row, source, text, ids, *rest = vars(self).values()
        return _prompt, (ids.tobytes(), ids.dtype.str, row, source, text, *rest)


def _prompt(ids: bytes, dtype: str, row: int, source: Any, text: str, *rest: Any) -> Prompt:
    return Prompt(row, source, text, np.frombuffer(ids, dtype).copy(), *rest)


@dataclass(frozen=True)
class Sampling(Lean):
    """How tokens are drawn. Temperature 0 is greedy."""

    max_tokens: int  # the budget of what is sampled, end-of-sequence token included
    temperature: float


@dataclass(frozen=True)
class GroupSampling(Sampling):
    """How the rollouts of a group are drawn; `max_tokens` is the budget of each."""

    completions: int  # G
    seed: int  # with `group_id` it fixes the draw in the transformers engine; vLLM has its own
    group_id: int


@dataclass(frozen=True)
class VersionSpan(Lean):
    """`tokens` consecutive sampled tokens of one row, made by the weights of policy `version`."""

    version: int
    tokens: int


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one row that one side wrote: the policy, or an environment.

    What an environment wrote is never trained on; nor is what the policy wrote and an earlier row
    of its rollout trains already, which is given as the environment's.
    """

    token_ids: Sequence[int] | np.ndarray  # [n]
    logprobs: Sequence[float] | np.ndarray | None = None  # [n]; None: by an environment
    spans: tuple[VersionSpan, ...] = ()  # of the policy's tokens


@dataclass(frozen=True)
class Completion:
    """One row of a rollout, after its prompt: segments in token order, one where it is one turn."""

    segments: tuple[Segment, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class ReplicaLoad(Lean):
    """What a rollout replica did while one group was in flight there, that group included."""

    tokens_per_s: float  # sampled
    running: float  # completions in the engine's batch, mean over its steps
    queue: float  # completions that wait for a place in it, mean over its steps
    kv_cache_used: float | None  # share, mean over its steps; None: the engine has no fixed cache


@dataclass(frozen=True)
class EpisodesRecord:
    """What environments, tools and agents say of a group's episodes."""

    rewards: Mapping[str, tuple[float | None, ...]]  # [G] by criterion; None: it abstains
    figures: Mapping[str, float]  # sums over the rollouts: fields of `EpisodeFigures`
    final: tuple[float | None, ...] | None = None
    """[G] `environment` without the rewards of single turns; None: no turn has one of its own."""


@dataclass(frozen=True)
class GroupRecord(Lean):
    """What the controller knows of a rolled-out group: small, and no token arrays.

    The last three are those of one turn of text where they are left out.
    """

    group_id: int
    prompt_tokens: int
    lengths: tuple[int, ...]  # [R] tokens after the prompt, sampled or not
    finish_reasons: tuple[FinishReason, ...]  # [G]
    version_spans: tuple[tuple[VersionSpan, ...], ...]  # [R] of the sampled tokens, in their order
    seconds: float  # wall time from the replica's being given the group to the end
    replica: str
    load: ReplicaLoad | None = None  # None: it was not watched
    episodes: EpisodesRecord | None = None  # None: one turn of text, without an environment
    sampled: tuple[int, ...] = ()  # [R] tokens the policy wrote
    turns: tuple[int, ...] = ()  # [G] turns of the policy
    rollouts: tuple[int, ...] = ()  # [R] the rollout that a row belongs to, ascending

    def __post_init__(self) -> None:
        _fill(self, "sampled", self.lengths)
        _fill(self, "turns", (1,) * len(self.finish_reasons))
        _fill(self, "rollouts", tuple(range(len(self.lengths))))

    @property
    def sampled_lengths(self) -> tuple[int, ...]:
        """[G] tokens the policy wrote in each rollout: what budgets and lengths are about."""
        return sum_rows(self.sampled, self.rollouts)

    @property
    def oldest_version(self) -> int:
        """The oldest policy version any token of the group was made by."""
        return min(span.version for spans in self.version_spans for span in spans)


@dataclass(frozen=True)
class GroupTensors:
    """The tokens of one group; lives in the object store and is passed by reference."""

    group_id: int
    prompt_ids: np.ndarray  # [P] int32
    lengths: tuple[int, ...]  # [R]
    token_ids: np.ndarray  # [N] int32
    logprobs: np.ndarray  # [N] float32, behaviour log-probs at the sampling temperature; else 0
    mask: np.ndarray  # [N] bool; False is a token the policy did not write: never trained on
    rewards: np.ndarray | None = None  # [N] float32, of a turn at its last token; None: no turn has

    def completion(self, row: int) -> slice:
        """Where row `row` lies in the flat arrays."""
        start = sum(self.lengths[:row])
        return slice(start, start + self.lengths[row])


def sum_rows(numbers: Sequence[int], rollouts: Sequence[int]) -> tuple[int, ...]:
    """Sums over the rows of each rollout: [R] numbers and the rollout of each row to [G]."""
    sums = [0] * (max(rollouts, default=-1) + 1)
    for number, rollout in zip(numbers, rollouts, strict=True):
        sums[rollout] += number
    return tuple(sums)


def last_rows(rollouts: Sequence[int]) -> list[int]:
    """The last row of each rollout, [G], from the rollout of each row [R], ascending."""
    return [row for row, owner in enumerate(rollouts) if owner not in rollouts[row + 1 : row + 2]]


def _fill(record: Any, field_name: str, value: tuple[Any, ...]) -> None:
    """Set a field of a frozen record that was left out."""
    if not getattr(record, field_name):
        object.__setattr__(record, field_name, value)


@dataclass(frozen=True)
class Conversations:
    """The episodes of a group as messages; lives in the object store and is passed by reference."""

    messages: tuple[Messages, ...]  # [G] all of them, prompt included
    asked: tuple[int, ...]  # [G] messages before the policy's first one
    last_rows: tuple[int, ...]  # [G] the row of `GroupTensors` that is the end of each

    @property
    def answers(self) -> list[Messages]:
        """[G] what was said from the policy's first message on."""
        return [said[first:] for said, first in zip(self.messages, self.asked, strict=True)]


@dataclass(frozen=True)
class Scores(Lean):
    """What the reward actors say of one group: one number per rollout and criterion.

    The decoded texts are the call's second return, which stays in the object store.
    """

    group_id: int
    criteria: tuple[str, ...]  # [K]
    values: tuple[tuple[float | None, ...], ...]  # [G][K], finite; None: the criterion abstains
    seconds: float


@dataclass(frozen=True)
class GroupWork(Lean):
    """One group of an optimiser batch: references to its arrays and its sequence advantages.

    The fields typed `Any` are Ray object references when they cross an actor call. A rank is sent
    the groups that its rows come from and no others. `rollouts` is that of one turn where it is
    left out: each row is a rollout.
    """

    group_id: int
    prompt_tokens: int
    lengths: tuple[int, ...]  # [R]
    trained: tuple[bool, ...]  # [G]; False leaves the rollout out of the loss, whatever its mask
    truncated: tuple[bool, ...]  # [G] cut by a limit
    advantages: tuple[float, ...]  # [G]
    scores: tuple[float, ...]  # [G] the reward after weighting and shaping
    tensors: Any  # GroupTensors
    reference: Any | None = None  # [N] float32 log-probs under the frozen model
    values: Any | None = None  # StateValues, with a critic
    targets: Any | None = None  # TokenTargets, where the algorithm prepared token-level ones
    rollouts: tuple[int, ...] = ()  # [R] the rollout that a row belongs to, ascending
    turn_weight: float = 0.0  # of the rewards of single turns, where they are no part of `scores`

    def __post_init__(self) -> None:
        _fill(self, "rollouts", tuple(range(len(self.lengths))))


@dataclass(frozen=True)
class StateValues:
    """What the critic says of one group at the start of the step's update."""

    values: np.ndarray  # [N] float32, of the state before each response token
    final: np.ndarray  # [R] float32, of the state after the last one of a row


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

    lengths: tuple[int, ...]  # [G] tokens of a rollout, in all its rows, which lie side by side
    trained: tuple[bool, ...]  # [G]
    truncated: tuple[bool, ...]  # [G]
    scores: tuple[float, ...]  # [G] after weighting and shaping
    mask: np.ndarray  # [N] bool
    old: np.ndarray  # [N] float32 log-probs at the start of the step's update
    reference: np.ndarray | None = None  # [N] float32
    values: np.ndarray | None = None  # [N] float32, of the state before each token
    final_values: np.ndarray | None = None  # [G] float32, of the state after the last token
    rewards: np.ndarray | None = None  # [N] float32, of single turns, weighted; beside `scores`


@dataclass(frozen=True)
class Row:
    """A row of an optimiser batch: `work` indexes a job's groups, `completion` a group's rows."""

    work: int
    completion: int
    tokens: int  # prompt + response


@dataclass(frozen=True)
class Counts:
    """The denominators of one optimiser step, global over its micro-batches and ranks."""

    tokens: float  # sum of the mask
    rows: float  # rollouts, whatever rows they have; those without a trained token included
    nonempty_rows: float  # rollouts with at least one trained token


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
    """The work of a policy or critic rank in one step: its rows of every optimiser step, a loss."""

    step: int  # 1-based
    groups: tuple[GroupWork, ...]  # those that this rank's rows come from and no others
    minibatches: tuple[tuple[Row, ...], ...]  # this rank's rows, one tuple per optimiser step
    loss: Callable[[Any], LossTerms]  # of a `TokenBatch`; of a `ValueBatch` for the critic
    recompute_old: bool  # old log-probs by a pass of their own; else of the targets or the loss
    temperature: float
    budget: int  # max_completion_length, tokens
    early_stop: tuple[str, float] | None = None  # (metric, limit): above it no further steps
    whole_rollouts: bool = False  # the loss wants all rows of a rollout in one micro-batch


@dataclass(frozen=True)
class UpdateResult:
    """What an update reports: figures already reduced over micro-batches and ranks."""

    metrics: dict[str, float]
    seconds: float  # inside the rank


@dataclass(frozen=True)
class RolloutRows:
    """Which rollout each row of a micro-batch belongs to, where rollouts have several rows."""

    index: torch.Tensor  # [B] int64 below B; rows of one rollout share theirs
    tokens: torch.Tensor  # [B] trained tokens of the whole rollout, also in other micro-batches


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch as a loss sees it, padded to [B, T]; padding has mask 0 and finite values."""

    logp: torch.Tensor  # [B, T] log-probs of the current policy; the only place gradient flows
    old: torch.Tensor  # [B, T] at the start of this step's update
    roll: torch.Tensor  # [B, T] what the rollout engine reported
    mask: torch.Tensor  # [B, T] bool
    advantages: torch.Tensor  # [B, T] detached; a rollout's one advantage is that of all its tokens
    counts: Counts
    budget: int  # max_completion_length, tokens
    ref: torch.Tensor | None = None  # [B, T] under the frozen reference
    entropy: torch.Tensor | None = None  # [B, T] of the full distribution, nats
    rollouts: RolloutRows | None = None  # None: each row is a rollout
    start: torch.Tensor | None = None  # [B, T] `old` as without dropout, where it has its noise


@dataclass(frozen=True)
class ValueBatch:
    """A micro-batch as a critic's loss sees it, padded to [B, T]; padding has finite values."""

    values: torch.Tensor  # [B, T] of the current critic; the only place gradient flows
    old: torch.Tensor  # [B, T] values at the start of this step's update
    returns: torch.Tensor  # [B, T]
    mask: torch.Tensor  # [B, T] bool
    counts: Counts
    budget: int  # max_completion_length, tokens
    rollouts: RolloutRows | None = None  # None: each row is a rollout


@dataclass(frozen=True)
class LossTerms:
    """A loss's share from one micro-batch. Shares add up to the loss of the optimiser step.

    `sums` hold numerators whose denominator is named by the key of `Counts` they are divided by,
    so that reported figures are exact over micro-batches and ranks too.
    """

    loss: torch.Tensor  # scalar
    sums: dict[str, tuple[torch.Tensor, str]] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
