"""Flat response tokens of a micro-batch's rows, padded as a loss sees them.

Shapes: B rows of a micro-batch, T its padded response width, N response tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from actors.fetching import Fetched, of_several_rows
from actors.messages import RolloutRows, Row

V = TypeVar("V")


class Padding:
    """Where the flat response tokens of a micro-batch's rows lie in its padded [B, T]."""

    def __init__(
        self, groups: Mapping[int, Fetched], rows: Sequence[Row], device: torch.device
    ) -> None:
        self._groups = groups
        self._rows = rows
        self._device = device
        self.lengths = [groups[r.work].tensors.lengths[r.completion] for r in rows]
        self.width = max(1, *self.lengths)
        self._cells = torch.cat(
            [torch.arange(n) + self.width * place for place, n in enumerate(self.lengths)]
        ).to(device)

    def pad(self, flat: torch.Tensor) -> torch.Tensor:
        """Values of the rows' response tokens, in row order, as [B, T]; zeros elsewhere."""
        empty = flat.new_zeros(len(self._rows) * self.width)
        return empty.index_copy(0, self._cells, flat).view(len(self._rows), self.width)

    def mask(self) -> torch.Tensor:
        """[B, T] bool, the tokens that are trained on."""
        parts = [self._groups[row.work].mask(row.completion) for row in self._rows]
        return self.pad(torch.as_tensor(np.concatenate(parts), device=self._device))

    def rows(self, arrays: Mapping[int, np.ndarray], dtype: torch.dtype) -> torch.Tensor:
        """The rows' cuts of arrays [N] by group, as [B, T] in `dtype`."""
        parts = [
            arrays[row.work][self._groups[row.work].tensors.completion(row.completion)]
            for row in self._rows
        ]
        return self.pad(torch.as_tensor(np.concatenate(parts), device=self._device).to(dtype))

    def rollouts(self) -> RolloutRows | None:
        """Which rollouts the rows belong to; None where each row is one of its own."""
        if not of_several_rows(self._rows, self._groups):
            return None
        owners = [(r.work, self._groups[r.work].work.rollouts[r.completion]) for r in self._rows]
        tokens = [self._groups[r.work].rollout_tokens(r.completion) for r in self._rows]
        return RolloutRows(
            index=torch.tensor([owners.index(owner) for owner in owners], device=self._device),
            tokens=torch.tensor(tokens, device=self._device),
        )

    def per_row(self, numbers: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        """One number a row along its response, as [B, T] in `dtype`."""
        spread = torch.tensor(numbers, dtype=dtype).repeat_interleave(torch.tensor(self.lengths))
        return self.pad(spread.to(self._device))

    def of_each(self, what: str, pick: Callable[[Fetched], V | None]) -> dict[int, V]:
        """What `pick` finds in each of the rows' groups; empty where no group has it.

        Raises:
            ValueError: some groups have it and others have not.
        """
        groups = {row.work: self._groups[row.work] for row in self._rows}
        picked = {index: pick(group) for index, group in groups.items()}
        found = {index: value for index, value in picked.items() if value is not None}
        if found and len(found) < len(groups):
            raise ValueError(f"some groups of a micro-batch have {what} and others have none")
        return found
