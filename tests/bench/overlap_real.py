"""Rollouts beside updates on real engines, a core each: tokens a second over staleness 0.

python -m tests.bench overlap_real [--rounds 3] [--steps 2] [--parts 1]
"""

from __future__ import annotations

from tests.bench.end_to_end import parts
from tests.bench.end_to_end.work import SIX_MILLION
from tests.bench.report import Measured, Target

STALENESS = (0, 1, 2)


def measure(options: parts.Options) -> Measured:
    """One thread for the policy and one for vLLM at every staleness."""
    found = parts.measured(
        [f"core_{bound}" for bound in STALENESS], options.of(SIX_MILLION), options
    )
    table = parts.figures(found)
    for bound in STALENESS[1:]:
        ratio = table[f"core_{bound}/tokens_a_s"] / table["core_0/tokens_a_s"]
        table[f"core_{bound}/tokens_a_s_over_staleness_0"] = ratio
        step = table[f"core_{bound}/part_s/step"]
        longer = max(table[f"core_{bound}/part_s/{side}"] for side in ("rollout", "update"))
        table[f"core_{bound}/step_over_longer_side"] = step / longer
    target = Target("core_1/tokens_a_s_over_staleness_0", 1.5, least=True)
    return Measured(table, (target,) if options.whole else (), parts.more(found))
