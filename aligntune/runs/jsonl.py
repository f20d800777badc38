"""Files of one JSON object a line: read while they grow, and mended where a kill or a bad disk tore
one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from aligntune.runs.disk import write_atomically

Row = dict[str, Any]


def cut_torn_line(path: Path) -> int:
    """Remove an unfinished last line from a JSONL file, if any; returns the complete lines."""
    if not path.exists():
        return 0
    lines = end = 0  # complete ones, and where the last of them ends
    with path.open("r+b") as file:
        while block := file.read(2**20):
            if found := block.count(b"\n"):
                lines += found
                end = file.tell() - len(block) + block.rfind(b"\n") + 1
        if end != file.tell():
            file.truncate(end)
    return lines


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
    the file is read than is asked for; a torn last line is left out."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            while end:
                start = content.rfind(b"\n", 0, end - 1) + 1
                yield start, json.loads(content[start:end])
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
