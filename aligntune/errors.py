"""Errors written for the person who meets them, and the nearest valid name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input is wrong. One line: what, where, what to do. The CLI exits 2 with it."""


class RunFailed(RuntimeError):
    """The run cannot go on. The CLI exits 1 with it and the command that resumes."""


class Interrupted(RuntimeError):
    """The run was asked to stop; its checkpoint has what was trained. Exit code: 128 + signal."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def nearest(name: str, valid: Iterable[str]) -> str:
    """' Did you mean X?' for a name close to a valid one, else the valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.6)
    if close:
        return f"did you mean {next(n for n in names if n.lower() == close[0])!r}?"
    return f"valid are: {', '.join(names)}"
