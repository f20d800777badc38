"""One group of samples for a terminal: what was asked, and what was said, side by side. Pure.

Invariant: a text of a model moves no cursor and sets no colour. Control characters are shown by
their codes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aligntune.evaluation.summary import path_of

NARROWEST = 24  # columns of the terminal that one completion takes
WIDEST = 4  # completions in a row of them
HEAD, TAIL = 700, 300  # characters of a long text that are shown
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)

Row = Mapping[str, Any]


def visible(text: str) -> str:
    """The text with what a terminal would act on, or nobody would see, as codes."""
    return HIDDEN.sub(lambda match: f"<U+{ord(match[0]):04X}>", text)


def shortened(text: str, full: bool) -> str:
    """The text, without its middle where it is long."""
    left_out = len(text) - HEAD - TAIL
    if full or left_out < 200:
        return text
    return f"{text[:HEAD]}\n… {left_out:,} characters (--full shows them) …\n{text[-TAIL:]}"


def shown(group: Row, width: int, full: bool = False) -> RenderableType:
    """A group for a terminal of `width` columns."""
    number = int(group.get("group", 0))
    name = f"prompt {-1 - number}" if number < 0 else f"group {number}"
    parts: list[RenderableType] = [
        Text(f"step {group['step']}, {name}", style="bold"),
        Panel(
            Text(visible(shortened(str(group.get("prompt", "")), full))),
            title="prompt",
            title_align="left",
            box=box.ROUNDED,
        ),
    ]
    for key, value in dict(group.get("columns") or {}).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        line = Text(visible(f"{key}: "), style="dim")
        parts.append(line.append(visible(shortened(text, full)), style="not dim"))
    said = list(group.get("completions") or [])
    in_a_row = max(1, min(WIDEST, width // NARROWEST, len(said)))
    for begin in range(0, len(said), in_a_row):
        table = Table.grid(expand=True)
        for _ in range(in_a_row):
            table.add_column(ratio=1, overflow="fold")
        cells = [
            _completion(begin + place, one, full)
            for place, one in enumerate(said[begin : begin + in_a_row])
        ]
        table.add_row(*cells, *[""] * (in_a_row - len(cells)))
        parts.append(table)
    return Group(*parts, "")


def _completion(index: int, said: Row, full: bool) -> Panel:
    scores = dict(said.get("scores") or {})
    facts = [("reward", said.get("reward")), *((path_of(name), scores[name]) for name in scores)]
    facts += [(key, said[key]) for key in ("advantage", "tokens", "turns") if key in said]
    facts += [("ended by", said.get("finish_reason", ""))]
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="dim", overflow="fold", ratio=1)
    table.add_column(justify="right", overflow="fold")
    for name, value in facts:
        table.add_row(visible(str(name)), visible(_number(value)))
    return Panel(
        Group(_text(said, full), "", table),
        title=f"{index + 1}",
        title_align="left",
        box=box.ROUNDED,
    )


def _text(said: Row, full: bool) -> Text:
    messages = said.get("messages")
    if messages:
        text = Text()
        for message in messages:
            text.append(visible(f"{message.get('role', '')}: "), style="bold")
            text.append(visible(shortened(_spoken(message), full)) + "\n")
        text.rstrip()
        return text
    if said.get("text") is None:
        return Text("(lost with a node)", style="dim")
    return Text(visible(shortened(said["text"], full)))


def _spoken(message: Row) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    calls = [json.dumps(call.get("function", call)) for call in message.get("tool_calls") or []]
    return "\n".join(part for part in (text, *calls) if part)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
