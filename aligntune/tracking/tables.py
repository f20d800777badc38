"""Groups of completions as the text tables that trackers show. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

GROUPS = 4  # of an evaluation: the same prompts each time, to see their answers change
CHARACTERS = 4000  # of a cell

Cell = str | float | int | None


def table(step: int, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """The columns and a line for each completion of the first groups.

    `rows` are as in samples.jsonl. A score that there is not is None, and so is a lost text. A
    criterion that is called as another column is `reward/NAME`.
    """
    groups = rows[:GROUPS]
    said = [completion for row in groups for completion in row["completions"]]
    criteria = list(dict.fromkeys(name for completion in said for name in completion["scores"]))
    own = ["step", "row", "prompt", "completion", "reward", "tokens"]
    named = [f"reward/{name}" if name in own else name for name in criteria]
    columns = [*own[:-1], *named, own[-1]]
    lines: list[list[Cell]] = [
        [
            step,
            row["row"],
            _text(row["prompt"]),
            _text(completion["text"]),
            completion["reward"],
            *(completion["scores"].get(name) for name in criteria),
            completion["tokens"],
        ]
        for row in groups
        for completion in row["completions"]
    ]
    return columns, lines


def markdown(columns: Sequence[str], lines: Sequence[Sequence[Cell]]) -> str:
    """A table as Markdown, each cell on one line."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _text(text: str | None) -> str | None:
    """A text that every service can store: no half of a character, and not without end."""
    if text is None:
        return None
    whole = text.encode("utf-8", "replace").decode()
    return whole if len(whole) <= CHARACTERS else whole[:CHARACTERS] + "…"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", "<br>")):
        text = text.replace(mark, instead)
    return text
