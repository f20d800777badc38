"""Which groups are worth training on, from their raw scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aligntune.algorithms.advantages import is_constant


def varies(scores: Sequence[float]) -> bool:
    """Whether a group's scores are not constant, up to rounding: it has something to compare."""
    import torch

    return len(scores) > 0 and not bool(is_constant(torch.tensor(scores, dtype=torch.float64)))


def named(scores: Mapping[str, list[float]], metric: str) -> list[float]:
    """A group's scores of one metric; ValueError, with the names there are, if it has none."""
    if metric not in scores:
        raise ValueError(
            f"metric {metric!r} of dynamic sampling is none of the criteria: {', '.join(scores)}"
        )
    return scores[metric]
