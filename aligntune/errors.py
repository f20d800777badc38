"""Errors written for the person who meets them, and the nearest valid name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's input is wrong. One line: what, where, what to do. The CLI exits 2 with it."""

    def __init__(self, message: str, below: str = "") -> None:
        """Characters that no terminal shows, of keys and paths of the user's, are escaped. The
        lines of `below` stay lines, such as those of the user's own code that failed."""
        super().__init__("\n".join(map(printable, (message, *below.splitlines()))))


class RunFailed(RuntimeError):
    """The run cannot go on. The CLI exits 1 with it and the command that resumes."""


class Interrupted(RuntimeError):
    """The run was asked to stop; its checkpoint has what was trained. Exit code: 128 + signal."""

    def __init__(self, signal: int, reason: str | None = None) -> None:
        super().__init__(f"stopped by signal {signal}" if reason is None else f"stopped: {reason}")
        self.signal = signal


def printable(text: str) -> str:
    """`text` on one line, with what is no character to see as Python escapes it."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


def shown(value: object) -> str:
    """A value for a message: its repr on one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - a repr of the user's own, or an integer of 5,000 digits
        return f"a value of {type(value).__name__} that cannot be shown"
    return text if len(text) <= 120 else f"{text[:117]}..."


def closest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that is meant most likely; None where none is near. Swapped letters are the
    slip of the fingers, so the same letters in another order come first."""
    by_key = {known.lower(): known for known in sorted(valid)}
    key = name.lower()
    close = difflib.get_close_matches(key, by_key, n=len(by_key) or 1, cutoff=0.6)
    close.sort(key=lambda known: sorted(known) != sorted(key))
    return by_key[close[0]] if close else None


def nearest(name: str, valid: Iterable[str], where: str = "") -> str:
    """'did you mean 'X'?' for a name close to a valid one, else the valid names; each with `where`
    before it, as in 'train.'."""
    names = sorted(valid)
    meant = closest(name, names)
    if meant is not None:
        return f"did you mean {where + meant!r}?"
    return f"valid are: {', '.join(where + known for known in names)}"
