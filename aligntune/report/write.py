"""report.html: written whole, by the command and at the end of every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aligntune.report.page import page
from aligntune.runs.books import Books
from aligntune.runs.disk import write_atomically
from aligntune.runs.reading import open_run

NAME = "report.html"


def write_report(runs: Sequence[Path], out: Path | None = None, books: Books | None = None) -> Path:
    """Write the report of one run, or of several beside each other; returns the file, by default
    `report.html` in the first one's directory. `books` are the first run's, where they are known:
    to read those of a long run takes minutes.

    Raises:
        UserError: a folder holds no run.
        OSError: the file cannot be written.
    """
    opened = [open_run(path) for path in runs]
    if books is not None:
        opened[0].books = books
    text = page(opened)
    target = out or runs[0] / NAME
    write_atomically(target, text)
    return target
