"""What a run shows while it trains: a live line on a terminal, one plain line a step elsewhere.

The formatting is pure; `Progress` alone writes.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

WINDOW = 20  # steps that the time left is worked out from


def figures(metrics: Mapping[str, float], evaluation: Mapping[str, float]) -> str:
    """The figures that matter, in reading order; those a run does not have are left out.

    `evaluation` holds the latest `eval/*` figures, which most steps have none of.
    """
    shown = [
        ("loss", metrics.get("loss"), "{:.4f}"),  # of preference jobs
        ("accuracy", metrics.get("reward/accuracy"), "{:.3f}"),
        ("margin", metrics.get("reward/margin"), "{:.3f}"),
        ("reward", metrics.get("reward/mean"), "{:.3f}"),
        ("eval", _evaluated(evaluation), "{:.3f}"),
        ("KL", metrics.get("kl/reference"), "{:.4f}"),
        ("length", metrics.get("completions/length_mean"), "{:.0f}"),
        ("tokens/s", metrics.get("throughput/tokens_per_s"), "{:,.0f}"),
        ("staleness", metrics.get("staleness/max"), "{:.0f}"),
    ]
    return "  ".join(
        f"{name} {form.format(value)}" for name, value, form in shown if value is not None
    )


def _evaluated(evaluation: Mapping[str, float]) -> float | None:
    """The one figure that says how good the model is."""
    names = ("eval/accuracy", "eval/reward/accuracy", "eval/reward/mean")
    return next((evaluation[name] for name in names if name in evaluation), None)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def seconds_left(step_seconds: Sequence[float], step: int, total: int) -> float | None:
    """Time for the steps after `step`, at the mean pace of the steps given; None without any."""
    if not step_seconds:
        return None
    return sum(step_seconds) / len(step_seconds) * (total - step)


def line(
    step: int,
    total: int,
    metrics: Mapping[str, float],
    evaluation: Mapping[str, float],
    left: float | None,
) -> str:
    """One step as one plain line."""
    parts = [f"step {step}/{total}", figures(metrics, evaluation)]
    if left is not None and step < total:
        parts.append(f"{duration(left)} left")
    return "  ".join(part for part in parts if part)


class Progress:
    """Shows the steps of a run and what happens between them."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        """`stream` is where to write; default: standard output, as it is now."""
        self._stream = stream if stream is not None else sys.stdout
        self._total = total
        self._evaluation: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._last: float | None = None
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        if self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[figures]}"),
                console=Console(file=self._stream),
                # Other writers to this terminal, Ray's workers among them, stay as they are.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=total, figures="starting")
            self._bar.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step. After a rebuild the step number falls back."""
        now = time.monotonic()
        # The first step's wait holds the start-up, so its own figure stands for it.
        self._seconds.append(
            metrics.get("time/step", 0.0) if self._last is None else now - self._last
        )
        self._last = now
        self.evaluation(metrics)
        left = seconds_left(self._seconds, step, self._total)
        if self._bar is None:
            self._print(line(step, self._total, metrics, self._evaluation, left))
            return
        text = figures(metrics, self._evaluation)
        if left is not None and step < self._total:
            text += f"  {duration(left)} left"
        self._bar.update(self._task, completed=step, figures=text)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Remember the `eval/*` figures among `metrics` for the steps that follow."""
        self._evaluation |= {k: v for k, v in metrics.items() if k.startswith("eval/")}

    def note(self, text: str) -> None:
        """Show a message that stays."""
        if self._bar is None:
            self._print(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the last state standing and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
