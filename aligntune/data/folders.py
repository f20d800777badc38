"""Which files of a folder are the data set that is asked for: by configuration, split and kind.

Invariant: files that may be two data sets, or two copies of one, are refused and never put
together.
"""

from __future__ import annotations

import glob
import re
from itertools import takewhile
from pathlib import Path

from aligntune.data.errors import DataError

TEXTS = (".jsonl", ".ndjson", ".json", ".csv")
KINDS = (*TEXTS, *(f"{kind}.gz" for kind in TEXTS), ".parquet")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")  # written beside the data
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def kind_of(path: Path) -> str:
    """The end of a file's name that says how to read it, as in `.jsonl.gz`."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def lone_file(path: Path, name: str | None, split: str | None) -> Path:
    """`path`, where it is a data file that has the split. Raises: DataError."""
    if kind_of(path) not in KINDS:
        raise DataError(f"{path}: not a data file this reads ({', '.join(KINDS)})")
    if name is not None:
        raise DataError(
            f"{path}: is a file, where data.name (a configuration of a hub data set or folder) has "
            "no meaning; remove it"
        )
    if split not in (None, "train", _split_of(Path(path.name))):
        raise DataError(
            f"{path}: a lone file has one split, and it is not {split!r}; take slices, as in "
            "train[:90%] and train[90%:], or name another file (data.eval_path)"
        )
    return path


def folder_files(folder: Path, name: str | None, split: str | None) -> list[Path]:
    """The files of one split of a folder, all of one kind.

    `name` is a configuration: a subfolder with a data set of its own. Files and subfolders named
    for a split belong to it; where none is, all are `train`. Raises: DataError.
    """
    files = _data_files(folder)
    configurations = _configurations(folder, files)
    if name is not None:
        if not (folder / name).is_dir():
            found = f"; it has {', '.join(configurations)}" if configurations else ""
            raise DataError(f"{folder}: has no subfolder {name!r} (data.name){found}")
        folder = folder / name
        files = _data_files(folder)
    elif configurations:
        raise DataError(
            f"{folder}: the config name is missing: {', '.join(configurations)}; set data.name to "
            "one of them"
        )
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
            "take slices, as in train[:90%] and train[90%:]"
        )
    if not files:
        raise DataError(f"{folder}: holds no data file ({', '.join(KINDS)})")
    return _of_one_kind(folder, files)


def has_magic(path: str) -> bool:
    """Whether it is a pattern of names, as in `data/*.jsonl`."""
    return glob.has_magic(path)


def glob_files(pattern: str, name: str | None, split: str | None) -> list[Path]:
    """The files that a pattern matches, sorted by name, all of one kind and one split, which what
    stands for its open parts names.

    Raises: DataError.
    """
    path = Path(pattern).expanduser()
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    found = glob.glob(str(path), recursive=True)
    files = [Path(file) for file in sorted(found) if Path(file).is_file()]
    if not files:
        raise DataError(
            f"{pattern}: matches no file here ({Path.cwd()}); ** stands for folders at any depth, "
            "and what begins with a dot is left out"
        )
    named = {_split_of(file.relative_to(fixed)) for file in files}
    splits = sorted(split for split in named if split is not None)
    if len(splits) > 1:
        raise DataError(
            f"{pattern}: matches files of {len(splits)} splits ({', '.join(splits)}); match those "
            "of one"
        )
    if split not in (None, "train", *splits):
        raise DataError(
            f"{pattern}: its files are of one split, and it is not {split!r}; take slices, as in "
            "train[:90%] and train[90%:], or match other files (data.eval_path)"
        )
    return _of_one_kind(pattern, [lone_file(file, name, None) for file in files])


def saved_folder(folder: Path, name: str | None) -> Path | None:
    """`folder`, or its subfolder `name`, where it is one that `save_to_disk` has written."""
    place = folder if name is None else folder / name
    whole = all((place / file).is_file() for file in ("state.json", "dataset_info.json"))
    return place if whole or (place / "dataset_dict.json").is_file() else None


def _of_one_kind(where: Path | str, files: list[Path]) -> list[Path]:
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise DataError(f"{where}: files of {len(kinds)} kinds ({', '.join(kinds)}); keep one")
    return files


def _data_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if kind_of(file) in KINDS
        and file.name not in NOT_ROWS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _configurations(folder: Path, files: list[Path]) -> list[str]:
    """Subfolders that hold a split beside another place that holds it too, as `main` and
    `socratic`; none where each split lies in one place."""
    places: dict[str, set[str]] = {}
    for file in files:
        inside = file.relative_to(folder)
        split = _split_of(inside)
        if split is not None:
            parts = [part for part in inside.parts[:-1] if _split_of(Path(part)) is None]
            places.setdefault(split, set()).add("/".join(parts))
    several = any(len(found) > 1 for found in places.values())
    return sorted(set().union(*places.values()) - {""}) if several else []


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(file).lower())
    for split, names in SPLIT_WORDS.items():
        if any(name in words for name in names):
            return split
    return None
