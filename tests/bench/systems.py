"""One small work, done by every system that has an adapter: a table of all. See docs/benchmarks.md.

python -m tests.bench systems [--rounds 1] [--steps 2] [--parts 1]
"""

from __future__ import annotations

from tests.bench.end_to_end import parts
from tests.bench.end_to_end.work import SMALL
from tests.bench.report import Measured

SYSTEMS = ("trl", "ours_0", "floor")


def measure(options: parts.Options) -> Measured:
    """The small work; nothing to reach, for it is made of start-up and calls."""
    found = parts.measured(SYSTEMS, options.of(SMALL), options)
    return Measured(parts.figures(found), (), parts.more(found))
