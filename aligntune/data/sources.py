"""Rows of a data set, by index: from local files, or from the hub through `datasets`.

A local path wins over a hub name. Rows are read where they lie (text files by offset, Parquet and
hub data memory-mapped), so a large file costs little memory. Rows count from 0; all the rows of a
file are checked when it is opened, and every error says which file and line is meant.
"""

from __future__ import annotations

import difflib
import errno
import re
from bisect import bisect_right
from collections.abc import Callable, Hashable
from glob import escape
from itertools import accumulate
from pathlib import Path
from typing import Any, Never, Protocol

from actors.models.hub import why_silent
from aligntune.data.errors import DataError
from aligntune.data.folders import (
    KINDS,
    folder_files,
    glob_files,
    has_magic,
    kind_of,
    lone_file,
    saved_folder,
)
from aligntune.data.textfiles import CsvFile, JsonLinesFile, TextFile, open_json

READERS: dict[str, Callable[[Path], TextFile]] = {
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".json": open_json,
    ".csv": CsvFile,
}
MOST_OPEN = 64  # text files of one data set that stay open
AHEAD = 64  # rows that are read at once where they are asked for in order: a thirtieth of the time
MANY = 200_000  # rows that take minutes to check
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EDQUOT)
SPLIT = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class Rows(Protocol):
    """A data set with random access."""

    columns: tuple[str, ...]
    origin: str  # the path or hub name, for messages

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: every column of the data set, None where the row does not have it."""
        ...

    def where(self, index: int) -> str:
        """Where row `index` comes from, for messages."""
        ...


def many_rows(rows: Rows) -> str | None:
    """What a person is told before every row is checked; None where that takes no time."""
    return f"checking {len(rows):,} rows of {rows.origin}" if len(rows) >= MANY else None


class FileRows:
    """The rows of text files, one after the other."""

    def __init__(self, files: list[TextFile], origin: str) -> None:
        self.origin = origin
        self.files = files
        self._last = files[0]
        self._ends = list(accumulate(len(file) for file in files))
        self.columns = tuple(dict.fromkeys(name for file in files for name in file.columns))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, local = self._locate(index)
        if file is not self._last:
            if len(self.files) > MOST_OPEN:
                self._last.let_go()
            self._last = file
        return dict.fromkeys(self.columns) | file[local]

    def where(self, index: int) -> str:
        """As in `questions.jsonl, row 3 (line 5)`."""
        file, local = self._locate(index)
        return f"{file.path}, row {local} (line {file.line(local)})"

    def _locate(self, index: int) -> tuple[TextFile, int]:
        at = bisect_right(self._ends, index)
        return self.files[at], index - (self._ends[at - 1] if at else 0)


class ArrowRows:
    """A `datasets.Dataset`."""

    def __init__(self, dataset: Any, origin: str, place: Hashable) -> None:
        """`place` is what its rows were read from: equal for the same rows."""
        self.origin = origin
        self.place = place
        self._dataset = dataset
        self._last = len(dataset)  # that was asked for; none yet
        self._ahead: tuple[int, list[dict[str, Any]]] = (0, [])  # rows from the first one on
        self.columns: tuple[str, ...] = tuple(dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        first, ahead = self._ahead
        if not 0 <= index - first < len(ahead):
            if index != self._last + 1:
                self._last = index
                row: dict[str, Any] = self._dataset[index]
                return row
            block = self._dataset[index : index + AHEAD]
            ahead = [
                dict(zip(block, row, strict=True)) for row in zip(*block.values(), strict=True)
            ]
            first, ahead = self._ahead = index, ahead
        self._last = index
        return dict(ahead[index - first])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": (0, [])}

    def where(self, index: int) -> str:
        """As in `openai/gsm8k, row 3`."""
        return f"{self.origin}, row {index}"


class Slice:
    """Rows `start` to `stop` of a data set, renumbered from 0; `where` stays the true place."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self.rows = rows
        self.range = range(start, stop)
        self.columns = rows.columns
        self.origin = rows.origin

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[self.range[index]]

    def where(self, index: int) -> str:
        """Of the row in the data set that was cut."""
        return self.rows.where(self.range[index])


def load_rows(
    path: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    split: str | None = "train",
    max_rows: int | None = None,
) -> Rows:
    """Open a data set.

    `path` is a file, a glob, a folder of files of one kind or of `save_to_disk`, or a hub name;
    `revision` is for the hub.
    `split` names a split or a slice of one (`train[:95%]`); None takes the only one there is. A
    lone file is one split: `train`, or what it is named for. In a folder, files or subfolders named
    for a split (`test.jsonl`, `validation-00000.parquet`) belong to it; where none is, all is
    `train`. `name` is a configuration: of a hub data set, or a subfolder that has splits itself.

    Raises: DataError.
    """
    wanted, start, stop = _parse_split(split)
    local = Path(path).expanduser()
    if local.exists():
        if revision is not None:
            raise DataError(
                f"{path}: is local, where data.revision (for hub data sets) has no meaning; "
                "remove it"
            )
        saved = saved_folder(local, name) if local.is_dir() else None
        if saved is not None:
            rows = _read_saved(saved, wanted)
        elif local.is_dir():
            rows = _read_files(folder_files(local, name, wanted), path)
        else:
            rows = _read_files([lone_file(local, name, wanted)], path)
    elif has_magic(path):
        rows = _read_files(glob_files(path, name, wanted), path)
    elif path.startswith((".", "/", "~")) or kind_of(local) in KINDS:
        raise DataError(f"{path}: no such file or folder{_neighbour(local)}")
    else:
        rows = _read_hub(path, name, revision, wanted)
    first, last, _ = slice(_bound(start, len(rows)), _bound(stop, len(rows))).indices(len(rows))
    if max_rows is not None:
        last = min(last, first + max_rows)
    if last <= first:
        raise DataError(f"{path}: split {split} holds no rows ({len(rows)} in all)")
    return rows if (first, last) == (0, len(rows)) else Slice(rows, first, last)


def require_column(rows: Rows, column: str, option: str) -> None:
    """Raise DataError unless the data set has `column`, and each of its sources where they are
    several; `option` is the setting that named it."""
    for part in getattr(rows, "parts", (rows,)):
        if column not in part.columns:
            _refuse_column(part, column, option)


def _refuse_column(rows: Rows, column: str, option: str) -> Never:
    near = difflib.get_close_matches(column, rows.columns, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{rows.origin}: no column {column!r} ({option}); it has {', '.join(rows.columns)}{hint}"
    )


def _parse_split(split: str | None) -> tuple[str | None, str | None, str | None]:
    if split is None:
        return None, None, None
    match = SPLIT.fullmatch(split)
    if match is None:
        raise DataError(f"split {split!r}: write it as train, train[:1000] or train[90%:]")
    return match["name"], match["start"], match["stop"]


def _bound(text: str | None, rows: int) -> int | None:
    if text is None:
        return None
    return round(int(text[:-1]) * rows / 100) if text.endswith("%") else int(text)


def _read_files(files: list[Path], origin: str) -> Rows:
    kind = kind_of(files[0])
    rows: Rows
    if kind == ".parquet":
        rows = _read_parquet(files, origin)
    else:
        read = READERS[kind.removesuffix(".gz")]
        rows = FileRows([read(file) for file in files], origin)
    if not len(rows):
        raise DataError(f"{origin}: empty, there is no row in it")
    return rows


def _read_parquet(files: list[Path], origin: str) -> Rows:
    import datasets

    silent = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(
            "parquet", data_files=[escape(str(file.resolve())) for file in files], split="train"
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        _check_cache(origin, error)
        alone = "the file is damaged or no Parquet: get it again, or write it anew"
        cure = alone if len(files) == 1 else "files of one folder must have the same columns"
        raise DataError(
            f"{origin}: cannot be read as Parquet ({_first_line(cause)}); {cure}"
        ) from error
    finally:
        if not silent:
            datasets.enable_progress_bars()
    return ArrowRows(dataset, origin, tuple(file.resolve() for file in files))


def _read_saved(folder: Path, split: str | None) -> Rows:
    """What `datasets` has saved with `save_to_disk`, read where it lies."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{folder}: cannot be read as a folder of save_to_disk ({_first_line(error)}); save it "
            "anew"
        ) from error
    one_of_several = isinstance(found, datasets.DatasetDict)
    if one_of_several:
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split not in found:
            asked = f"no split {split!r}" if split else "which split is not said"
            raise DataError(f"{folder}: {asked}; it has {', '.join(found)}")
        found = found[split]
    elif split not in (None, "train", str(found.split)):
        raise DataError(
            f"{folder}: holds one split, and it is not {split!r}; take slices, as in "
            "train[:90%] and train[90%:]"
        )
    if not len(found):
        raise DataError(f"{folder}: empty, there is no row in it")
    place = (folder.resolve(), split if one_of_several else None)
    return ArrowRows(found.with_format(None), str(folder), place)


def _read_hub(path: str, name: str | None, revision: str | None, split: str | None) -> Rows:
    silent = why_silent()  # before its client tries for most of a minute
    import datasets

    try:
        if split is None:
            found = datasets.get_dataset_split_names(path, name, revision=revision)
            if len(found) != 1:
                raise DataError(f"{path}: has splits {', '.join(found)}; say which")
            split = found[0]
        dataset = datasets.load_dataset(path, name, split=split, revision=revision)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        _check_cache(path, error)
        if silent:
            raise DataError(
                f"{path}: is not on this machine, and the hub {silent}; check the network and its "
                "proxy, or name a local file"
            ) from error
        unseen = isinstance(error, datasets.exceptions.DatasetNotFoundError)
        cure = "; one that is private or gated needs HF_TOKEN or `hf auth login`" if unseen else ""
        raise DataError(
            f"{path}: neither a local file or folder nor a data set the hub gave "
            f"({_first_line(error)}); check the name, data.name, the split and the network{cure}"
        ) from error
    return ArrowRows(dataset, path, (path, name, revision, split))


def _check_cache(origin: str, error: BaseException) -> None:
    """Raise DataError where `error` says that the cache of `datasets` cannot be written."""
    import datasets

    cache = str(datasets.config.HF_DATASETS_CACHE)
    for cause in (error, error.__cause__, error.__context__):
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            named = str(cause.filename or cause)
            if not cause.filename or named.startswith(cache) or cache.startswith(named):
                raise DataError(
                    f"{origin}: the cache of datasets, {cache}, cannot be written "
                    f"({cause.strerror}); set HF_DATASETS_CACHE to a folder that can"
                ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _neighbour(path: Path) -> str:
    """A hint at a file of nearly the same name."""
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
