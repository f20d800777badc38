"""Files of one JSON object a line: read while they grow, and mended where a kill or a bad disk tore
one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aligntune.runs.disk import write_atomically

Row = dict[str, Any]

LONG = 2**27  # bytes of a file that take seconds to read
LOOK = 2**12, 2**20  # bytes in which the end of a line is looked for at once: at first, at most


def line_end(file: BinaryIO, start: int, end: int) -> int:
    """Where the last complete line in the bytes from `start` to `end` of a file ends; `start` where
    none does. Little more is read than what comes after it."""
    look, most = LOOK
    while end > start:
        at = max(start, end - look)
        file.seek(at)
        if (found := file.read(end - at).rfind(b"\n")) >= 0:
            return at + found + 1
        end, look = at, min(2 * look, most)
    return start


def long_read(what: str, path: Path) -> str | None:
    """What a person is told before all of a file is read; None where that takes no time."""
    size = path.stat().st_size if path.exists() else 0
    return f"reading {what} ({size / 1e9:.1f} GB)" if size >= LONG else None


def cut_torn_line(path: Path) -> None:
    """Remove an unfinished last line from a JSONL file, if any; no more than it is read."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = line_end(file, 0, size)
        if end != size:
            file.truncate(end)


def mend(path: Path, fits: Callable[[Row], bool]) -> int:
    """Take every complete line that is no record, or one that does not `fits`, out of a JSONL file,
    with an unfinished last one; returns how many complete ones. They are kept in `NAME.damaged`."""
    if not path.exists():
        return 0
    cut_torn_line(path)
    damaged = [line for line, record in _lines(path) if record is None or not fits(record)]
    if damaged:
        whole = [line for line, record in _lines(path) if record is not None and fits(record)]
        with path.with_name(path.name + ".damaged").open("ab") as file:
            file.writelines(damaged)
        write_atomically(path, b"".join(whole))
    return len(damaged)


def _lines(path: Path) -> Iterator[tuple[bytes, Row | None]]:
    """Every complete line, and the object in it; None where there is none."""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
                record = None
            yield line, record if isinstance(record, dict) else None


def readable(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file, one at a time and without those in damaged lines; none where
    there is no file. A long run's may be larger than memory."""
    if path.is_file():
        yield from (row for _, row in _lines(path) if row is not None)


def last_row(path: Path) -> Row | None:
    """The last object of a JSONL file; None where there is none."""
    return next((row for _, row in lines_from_end(path)), None)


def lines_from_end(path: Path) -> Iterator[tuple[int, Row]]:
    """The objects of a JSONL file, the last first, with the byte at which each starts. No more of
    the file is read than is asked for; a torn last line is left out.

    Its end may be cut off meanwhile: so it is no memory map, which would end this process then.
    """
    with path.open("rb") as file:
        end = line_end(file, 0, file.seek(0, os.SEEK_END))
        while end:
            start = line_end(file, 0, end - 1)
            file.seek(start)
            yield start, json.loads(file.read(end - start))
            end = start


def read_lines(path: Path) -> list[Row]:
    """The objects of a JSONL file, also one that is being written: a torn last line is left out.

    Raises:
        ValueError: a complete line is not JSON; with file and line.
    """
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not a JSON object: {error}") from error
    return records
