"""TRL's GRPOTrainer, with its defaults for generation, beside us with ours, on the same work.

python -m tests.bench vs_trl [--rounds 3] [--steps 2] [--parts 1]
"""

from __future__ import annotations

from tests.bench.end_to_end import parts
from tests.bench.end_to_end.work import SIX_MILLION
from tests.bench.report import Measured, Target

OURS = ("ours_0", "ours_1")


def measure(options: parts.Options) -> Measured:
    """Samples, tokens and processor seconds of ours over TRL's."""
    found = parts.measured(("trl", *OURS), options.of(SIX_MILLION), options)
    table = parts.figures(found)
    for system in OURS:
        for name in ("samples_a_s", "tokens_a_s"):
            table[f"{system}/{name}_over_trl"] = table[f"{system}/{name}"] / table[f"trl/{name}"]
        cpu = "cpu_ms_a_token"
        table[f"{system}/tokens_a_cpu_s_over_trl"] = table[f"trl/{cpu}"] / table[f"{system}/{cpu}"]
    targets = (
        Target("ours_0/samples_a_s_over_trl", 7, least=True),
        Target("ours_1/samples_a_s_over_trl", 8, least=True),
    )
    return Measured(table, targets if options.whole else (), parts.more(found))
