"""Files of one JSON object a line: read while they grow, and mended where a kill tore one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def cut_torn_line(path: Path) -> int:
    """Remove an unfinished last line from a JSONL file, if any; returns the complete lines."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    complete = data.rfind(b"\n") + 1
    if complete != len(data):
        with path.open("r+b") as file:
            file.truncate(complete)
    return data.count(b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
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
