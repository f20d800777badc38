"""The ragged groups of one rank as padded float64 rows, for targets that are made per token.

Rows are the rollouts of all groups in order, those of several rows end to end: R rows, T their
longest; tokens of a rollout that is not trained on are masked, and have a KL all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.messages import TokenInputs, TokenTargets
from aligntune.algorithms.advantages import AllSum, moments
from aligntune.algorithms.kl import Estimator, estimate


@dataclass(frozen=True)
class TokenRows:
    """Padded view of `groups`; padding is masked and holds zeros."""

    groups: tuple[TokenInputs, ...]
    present: torch.Tensor  # [R, T] bool, where the ragged arrays have a token
    sampled: torch.Tensor  # [R, T] bool, what the policy wrote
    mask: torch.Tensor  # [R, T] bool, valid tokens: sampled ones of rollouts that are trained on
    old: torch.Tensor  # [R, T]
    scores: torch.Tensor  # [R]
    truncated: torch.Tensor  # [R] bool

    @classmethod
    def of(cls, groups: Sequence[TokenInputs]) -> TokenRows:
        """Raises ValueError where an array's length is not that of its group's tokens."""
        lengths = torch.tensor([n for g in groups for n in g.lengths], dtype=torch.int64)
        width = int(lengths.max()) if len(lengths) else 0
        present = torch.arange(width) < lengths[:, None]
        trained = _per_row([g.trained for g in groups], torch.bool)
        sampled = _padded([g.mask for g in groups], present).bool()
        return cls(
            groups=tuple(groups),
            present=present,
            sampled=sampled,
            mask=sampled & trained[:, None],
            old=_padded([g.old for g in groups], present),
            scores=_per_row([g.scores for g in groups], torch.float64),
            truncated=_per_row([g.truncated for g in groups], torch.bool),
        )

    def padded(self, field: str, needed_for: str) -> torch.Tensor:
        """A token-level field [N] of every group as [R, T]; ValueError where a group has none."""
        return _padded(self._arrays(field, needed_for), self.present)

    def given(self, field: str) -> torch.Tensor:
        """As `padded`, with zeros for a group that has none."""
        arrays = [getattr(g, field) for g in self.groups]
        filled = zip(arrays, self.groups, strict=True)
        return _padded([np.zeros(len(g.mask)) if a is None else a for a, g in filled], self.present)

    def per_completion(self, field: str, needed_for: str) -> torch.Tensor:
        """A field [G] of every group as [R]; ValueError where a group has none."""
        arrays = self._arrays(field, needed_for)
        if [len(a) for a in arrays] != [len(g.lengths) for g in self.groups]:
            raise ValueError(f"`{field}` must hold one number per rollout of its group")
        return torch.from_numpy(np.concatenate(arrays)).double() if arrays else self.scores

    def _arrays(self, field: str, needed_for: str) -> list[np.ndarray]:
        arrays = [getattr(g, field) for g in self.groups]
        if any(a is None for a in arrays):
            raise ValueError(f"{needed_for} needs `{field}` of every group, and a group has none")
        return arrays

    def kl(self, estimator: Estimator) -> torch.Tensor:
        """Estimates [R, T] of the KL of the old policy to the reference, 0 where not sampled."""
        d_ref = self.old - self.padded("reference", "a KL in the reward")
        return estimate(torch.where(self.sampled, d_ref, 0.0), estimator)

    def figure(self, name: str, x: torch.Tensor, all_sum: AllSum) -> dict[str, float]:
        """{name: mean of [R, T] over the valid tokens of all ranks}; empty where there is none."""
        of = moments(x[self.mask], all_sum)
        return {name: of.mean} if of.count else {}

    def split(self, per_row: torch.Tensor) -> list[torch.Tensor]:
        """A tensor over rows cut into one piece per group."""
        return list(per_row.split([len(g.lengths) for g in self.groups])) if self.groups else []

    def targets(
        self,
        advantages: torch.Tensor,
        returns: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> list[TokenTargets]:
        """Rows [R, T] back to the ragged arrays of each group; masked tokens get 0."""
        made = {"advantages": advantages, "returns": returns, "values": values}
        ragged = {name: self._ragged(x) for name, x in made.items() if x is not None}
        return [
            TokenTargets(old=g.old, **{name: pieces[i] for name, pieces in ragged.items()})
            for i, g in enumerate(self.groups)
        ]

    def _ragged(self, x: torch.Tensor) -> list[np.ndarray]:
        x = torch.where(self.mask, x, 0.0)
        flat = x[self.present].float()
        return [piece.numpy() for piece in flat.split([sum(g.lengths) for g in self.groups])]


def _per_row(values: Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([v for group in values for v in group], dtype=dtype)


def _padded(arrays: Sequence[np.ndarray], present: torch.Tensor) -> torch.Tensor:
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    if len(flat) != int(present.sum()):
        raise ValueError(
            f"token arrays hold {len(flat)} tokens where the lengths say {int(present.sum())}"
        )
    rows = torch.zeros(present.shape, dtype=torch.float64)
    rows[present] = torch.from_numpy(flat).double()
    return rows
