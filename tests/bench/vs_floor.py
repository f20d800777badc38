"""A step with the defaults beside bare vLLM and a bare torch update of the same work.

python -m tests.bench vs_floor [--rounds 3] [--steps 2] [--parts 1]
"""

from __future__ import annotations

from tests.bench.end_to_end import parts
from tests.bench.end_to_end.work import SIX_MILLION
from tests.bench.report import Measured, Target


def measure(options: parts.Options) -> Measured:
    """Wall and processor time of a token over the floor's."""
    found = parts.measured(("floor", "ours_0"), options.of(SIX_MILLION), options)
    table = parts.figures(found)
    names = ("ms_a_token", "cpu_ms_a_token")
    for name in names:
        table[f"ours_0/{name}_over_floor"] = table[f"ours_0/{name}"] / table[f"floor/{name}"]
    for name in ("rollout", "update"):
        seconds = [table[f"{s}/part_s/{name}"] / table[f"{s}/tokens_a_sample"] for s in found]
        table[f"ours_0/{name}_a_token_over_floor"] = seconds[1] / seconds[0]
    targets = tuple(Target(f"ours_0/{name}_over_floor", 1.1) for name in names)
    return Measured(table, targets if options.whole else (), parts.more(found))
