"""The rewards of an online run as its reward actors get them."""

from __future__ import annotations

from actors.reward import Criterion
from actors.scoring.model import RewardModelCriterion
from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.online.episodes import UserCode


def for_actors(
    criteria: tuple[Criterion, ...], config: RunConfig, code: UserCode | None
) -> tuple[Criterion, ...]:
    """`criteria` of a settled config, each on the day that chat templates write; one that wants the
    living environments of `code` is scored with the episode. Raises UserError where the algorithm
    cannot train on them."""
    if code is not None:
        criteria = tuple(map(code.placed, criteria))
    day, train = config.model.chat_template_day, config.train
    criteria = tuple(c.on_day(day) if isinstance(c, RewardModelCriterion) else c for c in criteria)
    try:
        config.algorithm.check_run(
            [criterion.name for criterion in criteria],
            config.rollout.max_completion_length,
            train.groups_per_step * (train.completions_per_group or 1),
        )
    except ValueError as error:
        raise UserError(f"algorithm: {error}") from error
    return criteria
