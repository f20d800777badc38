"""How often Python looks for cycles: seldom amid imports, as usual in a run that lasts for days."""

from __future__ import annotations

import gc

_usual: list[tuple[int, int, int]] = []


def seldom() -> None:
    """Look less often from now on: it is a fifth of the time of an import."""
    _usual.append(gc.get_threshold())
    gc.set_threshold(100_000, 20, 50)


def as_usual() -> None:
    """Look as often as before `seldom`."""
    if _usual:
        gc.set_threshold(*_usual.pop())
