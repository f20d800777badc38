"""The training and the held-out rows of a config as they lie, and whether they have rows in common.

Invariant: rows are told apart by where they lie, and never by what they say: two rows of a data set
may be equal.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import cached_property

import numpy as np

from aligntune.data.errors import DataError
from aligntune.data.mixture import Renamed, Sources, held_out_data, training_data
from aligntune.data.sources import ArrowRows, FileRows, Rows, Slice
from aligntune.data.spec import DatasetSpec


class ReadData:
    """The rows of a config, read when they are asked for, and once."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec

    @cached_property
    def training(self) -> Rows:
        """The training rows. Raises DataError."""
        return training_data(self._spec)

    @cached_property
    def held_out(self) -> Rows | None:
        """The held-out rows; None where the config names none. Raises DataError."""
        return held_out_data(self._spec)

    def check_apart(self) -> None:
        """Raises DataError where a run would train on rows that it holds out."""
        if self.held_out is None:
            return
        if shared := shared_rows(self.training, self.held_out):
            split = "split of that source in data.train" if self._spec.sources else "data.split"
            raise DataError(
                f"{self.held_out.origin}: the run would train on {shared} of the "
                f"{len(self.held_out)} rows that it holds out; give each its own, as in "
                f"train[:95%] ({split}) and train[95%:] (data.eval_split)"
            )


def shared_rows(training: Rows, held_out: Rows) -> int:
    """How many rows of `held_out` are in `training` too: of one file, or one split on the hub."""
    trained: dict[Hashable, list[range]] = {}
    for place, rows in _spans(training):
        trained.setdefault(place, []).append(rows)
    count = 0
    for place, rows in _spans(held_out):
        found = np.zeros(len(rows), dtype=bool)
        for other in trained.get(place, ()):
            found[max(0, other.start - rows.start) : max(0, other.stop - rows.start)] = True
        count += int(found.sum())
    return count


def _spans(rows: Rows) -> Iterator[tuple[Hashable, range]]:
    """What the rows were read from, one after the other, and which rows of it."""
    match rows:
        case Sources():
            for part in rows.parts:
                yield from _spans(part)
        case Renamed():
            yield from _spans(rows.rows)
        case Slice():
            before = 0
            for place, span in _spans(rows.rows):
                start, stop = rows.range.start - before, rows.range.stop - before
                if kept := span[max(0, start) : max(0, stop)]:
                    yield place, kept
                before += len(span)
        case FileRows():
            for file in rows.files:
                yield file.path.resolve(), range(len(file))
        case ArrowRows():
            yield rows.place, range(len(rows))
