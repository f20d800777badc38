"""The statistics of every step of vLLM's, as it tells its loggers of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def stat_logger(observe: Callable[[Any, Any], None]) -> Any:
    """A factory of vLLM's that hands `observe` the statistics of every step, and does no more.

    It is a Prometheus logger by name alone: without one vLLM makes its own, whose hundreds of
    figures nobody reads here.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class StepLogger(PrometheusStatLogger):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            """Nothing of the base class's is made."""

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
        ) -> None:
            observe(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

        def record_sleep_state(self, *args: Any, **kwargs: Any) -> None:
            """Nobody asks."""

        def record_admission_rejection(self, reason: str) -> None:
            """Nothing is rejected: there is no limit."""

    return StepLogger
