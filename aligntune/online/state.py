"""Where a run is: the controller writes it, every other part only reads it."""

from __future__ import annotations

from dataclasses import dataclass

from aligntune.algorithms.base import Algorithm


@dataclass
class RunState:
    """The one copy of what a run's parts must agree on."""

    algorithm: Algorithm  # as the steps so far have adapted it
    version: int = 0  # of the policy: the number of steps trained
    served: int = 0  # the version whose weights every rollout replica has at least
    signal: int = 0  # that asked the run to stop; 0: none has
