"""What a run shows while it starts and trains: a few live lines on a terminal, plain lines
elsewhere.

The words are in `lines`; `Progress` alone writes, and never raises where nothing takes it. On a
terminal a step's line stays on the screen every so often, so that the trend is seen; elsewhere each
step is a line. Whoever waits for long is told for whom.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from aligntune.tracking import lines
from aligntune.tracking.output import Shown

WINDOW = 20  # steps that the time left is worked out from
STAYS_SECONDS = 20.0  # between two steps whose lines stay on a terminal
QUIET_SECONDS = (30.0, 300.0)  # without a line elsewhere: while it starts, and afterwards
NARROWEST = 20  # columns; what is narrower is written as if it were as wide

Activity = Callable[[], Mapping[str, str]]


def _unheard(**fields: str) -> None: ...


class _Screen(Live):
    """The live lines. They are not drawn where the terminal is held up: only lines that stay are
    kept for it."""

    def refresh(self) -> None:
        """Draw them."""
        if not getattr(self.console.file, "behind", False):
            super().refresh()


class Progress:
    """Shows the stages of a start, the steps of a run, and what happens between them."""

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
        since: float | None = None,
        lost: Callable[..., None] = _unheard,
    ) -> None:
        """`stream` is where to write; default: standard output, as it is now. `since` is when the
        run began, by the clock `now`; default: now. `lost(reason=...)` hears that nothing is shown
        any more."""
        self._stream = Shown(stream if stream is not None else sys.stdout, lost)
        self._total = total
        self._now = now
        self._since = now() if since is None else since
        self._activity: Activity = dict
        self._stage = "starting"
        self._waiting: dict[str, str] = {}  # roles that have not started, and what they do
        self._evaluation: dict[str, float] = {}
        self._busy: dict[str, float] = {}  # share of the last step, by role
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._last: float | None = None  # when the last step ended
        self._said = now()  # when a line was written last
        self._stayed = float("-inf")  # when a step's line stayed last
        self._step = 0
        self._shown: dict[str, str] = {}
        self._pending: str | None = None  # the last step's line, where it has not stayed
        self._ended = threading.Event()
        self._lock = threading.RLock()
        self._live: Live | None = None
        console = Console(file=cast(TextIO, self._stream))
        if self._stream.isatty() and not console.is_dumb_terminal:
            self._live = _Screen(
                get_renderable=self._screen,
                console=console,
                refresh_per_second=4,
                transient=True,
                # Other writers to this terminal, Ray's workers among them, stay as they are.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    # A start

    def stage(self, text: str) -> None:
        """Something of the start is done: it is told with the time, and stays."""
        self.note(f"{lines.clock(self._now() - self._since)} {text}")

    def starting(self, waiting: Mapping[str, str]) -> None:
        """Roles start now: each with what it does until it is ready, or nothing."""
        self._waiting, self._stage = dict(waiting), "step 1 is under way"
        if self._live is None:
            threading.Thread(target=self._tick, name="progress", daemon=True).start()

    def ready(self, role: str, said: str = "") -> None:
        """A role has started, `said` in a few words how."""
        if role not in self._waiting:
            return
        waiting = {who: does for who, does in self._waiting.items() if who != role}
        self._waiting = waiting
        rest = ""
        if self._live is None:  # else it stands in the live line
            rest = f"; waiting for: {lines.waits(waiting)}" if waiting else "; all are"
        self.stage(f"{role} ready{f' ({said})' if said else ''}{rest}")

    def watch(self, activity: Activity) -> None:
        """`activity()` says what each role does now, whenever it is asked."""
        self._activity = activity

    # Steps

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step. After a rebuild the step number falls back."""
        now = self._now()
        # The first step's wait holds the start-up, so its own figure stands for it.
        self._seconds.append(
            metrics.get("time/step", 0.0) if self._last is None else now - self._last
        )
        self._last = now
        self._waiting = {}
        self.evaluation(metrics)
        self._busy = _busy(metrics)
        self._step, self._shown = step, lines.figures(metrics, self._evaluation)
        left = lines.seconds_left(self._seconds, step, self._total)
        if self._live is None:
            self._write(lines.line(step, self._total, self._shown, left))
            return
        self._pending = lines.line(step, self._total, self._shown, left, self.width)
        if now - self._stayed >= STAYS_SECONDS or step == self._total:
            self._stay()

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Remember the `eval/*` figures among `metrics` for the steps that follow."""
        self._evaluation |= {k: v for k, v in metrics.items() if k.startswith("eval/")}

    def last_evaluated(self, metrics: Mapping[str, float]) -> None:
        """Show the `eval/*` figures among `metrics`, and no others, with the steps that follow."""
        self._evaluation = {}
        self.evaluation(metrics)

    def note(self, text: str) -> None:
        """Show a message that stays."""
        self._write(text)

    def close(self) -> None:
        """Leave the last step's line standing and give the terminal back."""
        self._ended.set()
        self._stay()
        if self._live is not None:
            self._live.stop()
        self._stream.end()

    @property
    def width(self) -> int:
        """Columns of the terminal; elsewhere as many as are usual."""
        if self._live is not None:
            return max(NARROWEST, self._live.console.width)
        return max(NARROWEST, shutil.get_terminal_size((100, 24)).columns)

    def _stay(self) -> None:
        if self._pending is not None:
            self._write(self._pending)
            self._pending, self._stayed = None, self._now()

    def _write(self, text: str) -> None:
        with self._lock:
            self._said = self._now()
            if self._live is None:
                print(text, file=self._stream, flush=True)
            else:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # Between lines

    def _tick(self) -> None:
        """Elsewhere than on a terminal: say what is waited for, where nothing is said for long."""
        while not self._ended.wait(1.0):
            self.tick()

    def tick(self) -> None:
        """Write what is waited for, if it is time to."""
        with self._lock:
            quiet = QUIET_SECONDS[0] if self._waiting else QUIET_SECONDS[1]
            if self._now() - self._said >= quiet and (text := self._what()):
                self.stage(text)

    def _what(self) -> str:
        """What is waited for now; nothing where that is not known."""
        if self._waiting:
            return f"waiting for: {lines.waits(self._waiting)}"
        does = {role: what for role, what in self._activity().items() if what}
        return f"step {self._step + 1}: {lines.waits(does)}" if does else ""

    def _screen(self) -> Group:
        """The live lines: how far, the figures, and what each role does."""
        width = self.width
        if self._step == 0:
            passed = lines.clock(self._now() - self._since)
            told = [f"{passed} {self._what() or self._stage}"]
        else:
            told = [self._how_far(width), lines.fitted(self._shown, width)]
        if not self._waiting:
            activity = self._activity()
            column = max((len(role) for role in activity), default=0)
            for role, what in activity.items():
                busy = f"{self._busy[role]:4.0%} busy" if role in self._busy else ""
                told.append(f"  {role:{column}}  {busy:9}  {what or 'waits'}")
        return Group(*(Text(lines.cut(one, width), no_wrap=True) for one in told if one))

    def _how_far(self, width: int) -> str:
        begin = f"step {self._step}/{self._total}"
        left = lines.seconds_left(self._seconds, self._step, self._total)
        end = f"{lines.duration(left)} left" if left and self._step < self._total else ""
        room = min(30, width - len(begin) - len(end) - 2 * len(lines.GAP))
        middle = lines.bar(self._step, self._total, room) if room >= 4 else ""
        return lines.GAP.join(part for part in (begin, middle, end) if part)


def _busy(metrics: Mapping[str, float]) -> dict[str, float]:
    """The share of a step in which each role worked."""
    step = metrics.get("time/step")
    of = {
        "rollout": ("time/rollout",),
        "reward": ("time/reward",),
        "reference": ("time/reference",),
        "policy": ("time/prepare", "time/update"),
    }
    if not step:
        return {}
    return {
        role: min(1.0, sum(metrics.get(name, 0.0) for name in names) / step)
        for role, names in of.items()
        if any(name in metrics for name in names)
    }
