"""Several sources as one data set, and the order in which their rows are drawn.

Invariant: the order is a pure function of seed and epoch, so a run that resumes goes on with the
rows that it would have had. With weights every source has its share of each epoch, exactly but for
rounding; one that has no row left begins again in a new order, and no row of it comes a third time
before all came twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from aligntune.data.errors import DataError
from aligntune.data.sources import Rows, load_rows, require_column
from aligntune.data.spec import DatasetSpec, SourceSpec
from aligntune.errors import printable

BLOCK = 4096  # draws of one generator, or one turn of a source that is larger


class Sources:
    """The rows of several data sets, one after the other."""

    def __init__(self, parts: Sequence[Rows], weights: Sequence[float | None]) -> None:
        """`weights` has a number for every part, or None for every one."""
        self.parts = tuple(parts)
        self.weights = [weight for weight in weights if weight is not None]
        self.origin = ", ".join(part.origin for part in parts)
        self.columns = tuple(dict.fromkeys(name for part in parts for name in part.columns))
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, local = self._locate(index)
        return dict.fromkeys(self.columns) | part[local]

    def where(self, index: int) -> str:
        """Where the source has it."""
        part, local = self._locate(index)
        return part.where(local)

    def _locate(self, index: int) -> tuple[Rows, int]:
        at = bisect_right(self.ends, index)
        return self.parts[at], index - (self.ends[at - 1] if at else 0)


class Renamed:
    """A data set with some of its columns, or what lies inside them, under other names."""

    def __init__(self, rows: Rows, columns: Mapping[str, str], key: str) -> None:
        """`columns` has for a new name the old one, or the path `column.field`; `key` is the
        setting that says so. Raises: DataError for a column that is not there."""
        self.rows = rows
        self._paths = {new: _path(rows, old) for new, old in columns.items()}
        for new, path in self._paths.items():
            require_column(rows, path[0], f"{key}.{new}")
        moved = {path[0] for path in self._paths.values() if len(path) == 1}
        self._kept = [name for name in rows.columns if name not in moved]
        self.columns = tuple(dict.fromkeys([*self._paths, *self._kept]))
        self.origin = rows.origin

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        named = {new: _inside(row, path) for new, path in self._paths.items()}
        return {name: row[name] for name in self._kept} | named

    def where(self, index: int) -> str:
        """As the data set has it."""
        return self.rows.where(index)


def _path(rows: Rows, old: str) -> list[str]:
    return [old] if old in rows.columns else old.split(".")


def _inside(value: Any, path: Sequence[str]) -> Any:
    """What lies at `path`; None where a row lacks it."""
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def training_data(spec: DatasetSpec) -> Rows:
    """The training data of a config, of one source or several. Raises: DataError."""
    if spec.path is not None:
        return load_rows(
            spec.path,
            name=spec.name,
            revision=spec.revision,
            split=spec.split,
            max_rows=spec.max_samples,
        )
    parts = [_source(source, f"data.train.{number}") for number, source in enumerate(spec.sources)]
    return Sources(parts, [source.weight for source in spec.sources])


def held_out_data(spec: DatasetSpec) -> Rows | None:
    """The held-out data of a config; None where it names none.

    `data.name` and `data.revision` are those of `data.path`: another `eval_path` has neither. Its
    columns have the names that `data.train` gives to those of the sources. Raises: DataError.
    """
    if not spec.evaluates:
        return None
    same = spec.eval_path is None
    path = spec.path if same else spec.eval_path
    assert path is not None, "a split of path, or a path of its own"
    rows = load_rows(
        path,
        name=spec.name if same else None,
        revision=spec.revision if same else None,
        split=spec.eval_split,
        max_rows=spec.eval_samples,
    )
    return _named_alike(rows, spec.sources)


def _named_alike(rows: Rows, sources: Sequence[SourceSpec]) -> Rows:
    """`rows` with the names that the sources' `columns` give, where they have the old column and
    none of the new name. Raises: DataError where they have two that are to get one name."""
    names: dict[str, str] = {}
    for source in sources:
        for new, old in source.columns.items():
            if new in rows.columns or _path(rows, old)[0] not in rows.columns:
                continue
            if names.setdefault(new, old) != old:
                raise DataError(
                    f"{rows.origin}: data.train makes {new!r} of {names[new]!r} and of {old!r}, "
                    f"and the held-out data have both; give them a column {new!r}"
                )
    return Renamed(rows, names, "data.train, columns") if names else rows


def _source(source: SourceSpec, key: str) -> Rows:
    rows = load_rows(
        source.path,
        name=source.name,
        revision=source.revision,
        split=source.split,
        max_rows=source.max_samples,
    )
    return Renamed(rows, source.columns, f"{key}.columns") if source.columns else rows


def usable_sizes(rows: Rows, used: Sequence[int] | np.ndarray) -> list[int]:
    """How many of the rows `used`, ascending, are of each source.

    Raises: DataError where of one there is none.
    """
    ends = getattr(rows, "ends", [len(rows)])
    sizes = np.diff(np.searchsorted(np.asarray(used, dtype=np.int64), [0, *ends])).tolist()
    for size, part in zip(sizes, getattr(rows, "parts", ()), strict=False):
        if not size:
            raise DataError(
                f"{part.origin}: no row of this source can be used ({part.where(0)} is its first); "
                "repair it, or take it out of data.train"
            )
    return sizes


def epoch_order(
    epoch: int, seed: int, sizes: Sequence[int], weights: Sequence[float], shuffle: bool = True
) -> np.ndarray:
    """Which rows an epoch has, in its order; as many as there are in all.

    Args:
        sizes: rows of each source, which are numbered one source after the other.
        weights: of each source; empty where every row comes once an epoch.
        shuffle: in a new order every epoch; otherwise in the order of the data, the sources spread
            evenly over the epoch.
    """
    total = sum(sizes)
    if not weights:
        return _shuffled(total, seed, epoch) if shuffle else np.arange(total)
    counts = drawn(total, weights)
    order = np.empty(total, dtype=np.int64)
    if shuffle:
        labels = np.repeat(np.arange(len(sizes)), counts)[_shuffled(total, seed, epoch)]
    else:
        at = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
        labels = np.repeat(np.arange(len(sizes)), counts)[np.argsort(at, kind="stable")]
    first = 0
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        begin, end = epoch * count, (epoch + 1) * count  # of all that is ever drawn of it
        rows = _turns(begin, end, size, seed, source) if shuffle else np.arange(begin, end) % size
        order[labels == source] = first + rows
        first += size
    return order


def drawn(total: int, weights: Sequence[float]) -> list[int]:
    """`total` shared out by weight, exactly but for rounding (largest remainders first)."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(weights)), key=lambda i: counts[i] - shares[i])
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def mixed(rows: Rows, used: Sequence[int], seed: int) -> list[int]:
    """The rows of a job that goes over one table in every epoch: as many as `used`, with weights
    by the shares of its first epoch, without them `used` itself. Raises: DataError."""
    sizes = usable_sizes(rows, used)
    weights = getattr(rows, "weights", [])
    if not weights:
        return [*used]
    return [used[at] for at in epoch_order(0, seed, sizes, weights).tolist()]


def sources_shown(rows: Rows, used: Sequence[int] | np.ndarray) -> Iterator[str]:
    """A line for every source: its rows, those of `used`, and its share; none for a lone set."""
    parts: Sequence[Rows] = getattr(rows, "parts", ())
    if not parts:
        return
    sizes, weights = usable_sizes(rows, used), getattr(rows, "weights", [])
    counts = drawn(sum(sizes), weights) if weights else sizes
    for number, (part, size, count) in enumerate(zip(parts, sizes, counts, strict=True)):
        weight = f"weight {weights[number]:g}, " if weights else ""
        share = f"{count} of {sum(sizes)} an epoch ({100 * count / sum(sizes):.1f} %)"
        yield f"  {printable(part.origin)}: {len(part)} rows, {size} used; {weight}{share}"


def _turns(begin: int, end: int, size: int, seed: int, source: int) -> np.ndarray:
    """Draws `begin` to `end` of a source, which comes again and again, each time in a new order."""
    turns = max(1, BLOCK // size)  # that one generator gives: small sources have many
    block = turns * size
    made = [
        np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number, source])))
        .permuted(np.tile(np.arange(size), (turns, 1)), axis=1)
        .ravel()
        for number in range(begin // block, -(-end // block))
    ]
    skipped = begin // block * block
    return np.concatenate([np.empty(0, dtype=np.int64), *made])[begin - skipped : end - skipped]


def _shuffled(size: int, *of: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(of))).permutation(size)
