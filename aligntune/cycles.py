"""How often Python looks for cycles: seldom amid imports, as usual in a run that lasts for days,
and not at the end of a process.
"""

from __future__ import annotations

import gc
import sys

_usual: list[tuple[int, int, int]] = []


def seldom() -> None:
    """Look less often from now on: it is a fifth of the time of an import. All that a dry run
    imports are 370,000 objects."""
    _usual.append(gc.get_threshold())
    gc.set_threshold(500_000, 20, 50)


def as_usual() -> None:
    """Look as often as before `seldom`."""
    if _usual:
        gc.set_threshold(*_usual.pop())


def no_more() -> None:
    """Keep what there is until the process ends: its end would look for cycles in all of it, which
    takes as long as a quarter of the imports.

    Where Triton's library is there, as in a run, its end looks: the library would list all that
    is kept as leaks.
    """
    if "triton._C.libtriton" not in sys.modules:
        gc.freeze()
