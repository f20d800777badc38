"""A wrong option or argument as one line: which, what was meant, and where the help is."""

from __future__ import annotations

import re
from typing import Any

from aligntune.errors import closest


def told(error: Any) -> str:
    """The line for an error of typer about how a command was called."""
    said = str(error.format_message()).rstrip(".").replace("Value error, ", "")
    said = said.replace(". Did you mean", "; did you mean")  # as typer says it of commands
    said = re.sub(r" \(Possible options: .*\)$", "", said)
    said = re.sub(r"^Invalid value for '(\S+)': ", r"\1: ", said)
    near = closest(*_wrong(error, said))
    meant = f"; did you mean {near!r}?" if near else ""
    return f"{said}{meant}; see `{_command(error)} --help`"


def _wrong(error: Any, said: str) -> tuple[str, list[str]]:
    """The wrong word, and the valid ones in its place."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    if option := getattr(error, "option_name", None):
        valid = [name for param in command.params for name in param.opts] if command else []
        return option, [name for name in valid if name.startswith("--")]
    if choice := re.match(r"\S+: '(.*?)' is not one of (.*)$", said):
        return choice[1], re.findall(r"'(.*?)'", choice[2])
    return "", []


def _command(error: Any) -> str:
    """`aligntune` and the command that was called."""
    names: list[str] = []
    context = getattr(error, "ctx", None)
    while context is not None and context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    return " ".join(["aligntune", *names])
