"""Rows of a data set, by index: from local files, or from the hub through `datasets`.

A local path wins over a hub name. Rows are read where they lie (text files by offset, Parquet and
hub data memory-mapped), so a large file costs little memory. Rows count from 0; all the rows of a
file are checked when it is opened, and every error says which file and line is meant.
"""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections.abc import Callable
from glob import escape
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from aligntune.data.errors import DataError
from aligntune.data.textfiles import CsvFile, JsonLinesFile, TextFile, open_json

READERS: dict[str, Callable[[Path], TextFile]] = {
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".json": open_json,
    ".csv": CsvFile,
}
KINDS = (*READERS, ".parquet")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")  # written beside the data
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
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


class FileRows:
    """The rows of text files, one after the other."""

    def __init__(self, files: list[TextFile], origin: str) -> None:
        self.origin = origin
        self._files = files
        self._ends = list(accumulate(len(file) for file in files))
        self.columns = tuple(dict.fromkeys(name for file in files for name in file.columns))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, local = self._locate(index)
        return dict.fromkeys(self.columns) | file[local]

    def where(self, index: int) -> str:
        """As in `questions.jsonl, row 3 (line 5)`."""
        file, local = self._locate(index)
        return f"{file.path}, row {local} (line {file.line(local)})"

    def _locate(self, index: int) -> tuple[TextFile, int]:
        at = bisect_right(self._ends, index)
        return self._files[at], index - (self._ends[at - 1] if at else 0)


class ArrowRows:
    """A `datasets.Dataset`."""

    def __init__(self, dataset: Any, origin: str) -> None:
        self.origin = origin
        self._dataset = dataset
        self.columns: tuple[str, ...] = tuple(dataset.column_names)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._dataset[index]
        return row

    def where(self, index: int) -> str:
        """As in `openai/gsm8k, row 3`."""
        return f"{self.origin}, row {index}"


class Slice:
    """Rows `start` to `stop` of a data set, renumbered from 0; `where` stays the true place."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self._rows = rows
        self._range = range(start, stop)
        self.columns = rows.columns
        self.origin = rows.origin

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[self._range[index]]

    def where(self, index: int) -> str:
        """Of the row in the data set that was cut."""
        return self._rows.where(self._range[index])


def load_rows(
    path: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    split: str | None = "train",
    max_rows: int | None = None,
) -> Rows:
    """Open a data set.

    `path` is a file, a folder of files of one kind, or a hub name; `name` and `revision` are for
    the hub. `split` names a split or a slice of one (`train[:95%]`); None takes the only one there
    is. A lone file is one split, whatever it is called. In a folder, files or subfolders named for
    a split (`test.jsonl`, `validation-00000.parquet`) belong to it; where none is, all is `train`.

    Raises: DataError.
    """
    wanted, start, stop = _parse_split(split)
    local = Path(path).expanduser()
    if local.exists():
        if name is not None or revision is not None:
            raise DataError(
                f"{path}: is local, where data.name and data.revision (for hub data sets) have no "
                "meaning; remove them"
            )
        files = _folder_files(local, wanted) if local.is_dir() else [_data_file(local)]
        rows = _read_files(files, path)
    elif path.startswith((".", "/", "~")) or local.suffix in KINDS:
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
    """Raise DataError unless the data set has `column`; `option` is the setting that named it."""
    if column in rows.columns:
        return
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


def _data_file(path: Path) -> Path:
    if path.suffix not in KINDS:
        raise DataError(f"{path}: not a data file this reads ({', '.join(KINDS)})")
    return path


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in KINDS
        and file.name not in NOT_ROWS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)) or "", []).append(file)
    named = [found for found in by_split if found]
    if named:
        if split is None and len(named) == 1:
            split = named[0]
        if split not in named:
            asked = f"no file of split {split!r}" if split else "which split is not said"
            raise DataError(f"{folder}: {asked}; its files are of {', '.join(sorted(named))}")
        files = by_split[split]
    elif split not in (None, "train"):
        raise DataError(
            f"{folder}: no file is named for split {split!r}, so all of it is 'train'; "
            "take a slice, as in train[90%:]"
        )
    if not files:
        raise DataError(f"{folder}: holds no data file ({', '.join(KINDS)})")
    kinds = sorted({file.suffix for file in files})
    if len(kinds) > 1:
        raise DataError(f"{folder}: files of {len(kinds)} kinds ({', '.join(kinds)}); keep one")
    return files


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(file).lower())
    for split, names in SPLIT_WORDS.items():
        if any(name in words for name in names):
            return split
    return None


def _read_files(files: list[Path], origin: str) -> Rows:
    kind = files[0].suffix
    rows: Rows
    if kind == ".parquet":
        rows = _read_parquet(files, origin)
    else:
        rows = FileRows([READERS[kind](file) for file in files], origin)
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
        raise DataError(
            f"{origin}: cannot be read as Parquet ({_first_line(cause)}); files of one folder must "
            "have the same columns"
        ) from error
    finally:
        if not silent:
            datasets.enable_progress_bars()
    return ArrowRows(dataset, origin)


def _read_hub(path: str, name: str | None, revision: str | None, split: str | None) -> Rows:
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
        raise DataError(
            f"{path}: neither a local file or folder nor a data set the hub gave "
            f"({_first_line(error)}); check the name, data.name, the split and the network"
        ) from error
    return ArrowRows(dataset, path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _neighbour(path: Path) -> str:
    """A hint at a file of nearly the same name."""
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
