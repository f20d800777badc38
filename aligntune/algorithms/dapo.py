"""DAPO (2503.14476): clip-higher, dynamic sampling, token-level loss, soft overlong punishment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator

from aligntune.algorithms.base import SCORE, Defaults
from aligntune.algorithms.filters import named
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.losses import Aggregation
from aligntune.algorithms.shaping import soft_overlong

if TYPE_CHECKING:
    import torch


WHOLE = "score"
"""How `metric` names the weighted sum, though a criterion is called so."""


class DAPO(GRPO):
    """GRPO's advantages and clipped loss, with what DAPO changes around them; no KL."""

    title: ClassVar[str] = "Decoupled Clip and Dynamic Sampling Policy Optimization"
    defaults: ClassVar[Defaults] = Defaults(
        learning_rate=1e-6, completions_per_group=16, minibatches=16
    )

    aggregation: Aggregation = "token_mean"  # section 3.3
    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference model")
    clip_high: float = Field(0.28, gt=0)  # section 3.1
    dynamic_sampling: bool = Field(True, description="draw again for groups without contrast")
    metric: str = Field(
        WHOLE, description="what dynamic sampling looks at: a criterion, or score, the weighted sum"
    )
    max_sampling_rounds: int = Field(
        10, gt=0, description="this times groups_per_step filtered in one step stops the run"
    )
    overlong_shaping: bool = Field(True, description="punish completions near the length limit")
    overlong_cache: int | None = Field(
        None, gt=0, description="tokens; default a fifth of the budget, the paper's 4096 of 20480"
    )
    overlong_filtering: bool = Field(False, description="truncated completions leave the loss")

    @property
    def sampling_rounds(self) -> int | None:
        """The bound of dynamic sampling, where it is on."""
        return self.max_sampling_rounds if self.dynamic_sampling else None

    @model_validator(mode="after")
    def _what_is_off_has_no_options(self) -> Self:
        if not self.dynamic_sampling:
            for option in ("metric", "max_sampling_rounds"):
                self.refuse_inert(option, "dynamic_sampling is off")
        if not self.overlong_shaping:
            self.refuse_inert("overlong_cache", "overlong_shaping is off")
        return self

    @property
    def sampling_metric(self) -> str:
        """What dynamic sampling looks at."""
        return SCORE if self.metric == WHOLE else self.metric

    def check_run(self, criteria: Sequence[str], budget: int, completions: int) -> None:
        """Raises ValueError on a metric that is no criterion and a cache beyond the budget."""
        import torch

        if self.dynamic_sampling:
            named({name: [] for name in (*criteria, WHOLE)}, self.metric)
        self.length_reward(torch.zeros(1), budget)

    def keep(self, scores: dict[str, list[float]]) -> bool:
        """Section 3.2: a group whose raw metric is constant has no gradient and is drawn again."""
        return not self.dynamic_sampling or self.contrast(scores, self.sampling_metric)

    def length_reward(self, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        """Section 3.4, eq. 13."""
        if not self.overlong_shaping:
            return super().length_reward(lengths, budget)
        cache = self.overlong_cache or max(budget // 5, 1)
        return soft_overlong(lengths, budget, cache)

    def trains_on(self, truncated: bool) -> bool:
        """Section 3.4: overlong filtering masks the loss of truncated completions."""
        return not (self.overlong_filtering and truncated)
