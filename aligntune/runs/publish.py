"""What becomes of a trained model at the end of a run: its card, and a copy on the hub if that was
asked for.

Invariant: neither fails a run. What fails is one line and an event. A signal during the push
interrupts the run, which has not ended then: called again it pushes again.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Protocol

from aligntune.config.records import HubSpec
from aligntune.loops import SIGNAL_SECONDS
from aligntune.runs.deadline import asked
from aligntune.runs.hub import pushed_to, why_not
from aligntune.runs.reading import open_run
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind

CARD_SECONDS = 60.0


class Records(Protocol):
    """Who hears what became of it."""

    def wait(self) -> None:
        """Until all that was recorded is on disk."""

    def event(self, kind: EventKind, **fields: str) -> None:
        """Write an event."""

    def note(self, text: str) -> None:
        """Show something to the person who watches."""


def write_card_of(rundir: RunDir, step: int, records: Records) -> None:
    """Write the card of the run's model, or say why not. A folder without a config is no run."""
    if not rundir.config.is_file():
        return

    def write() -> Path:
        from aligntune.report.card import write_card

        records.wait()
        return write_card(open_run(rundir.path), rundir.model, step)

    answer = asked(write)
    try:
        answer.result(CARD_SECONDS)
    except Exception as error:  # noqa: BLE001 - of a file beside a model that is whole
        late = f"no end within {CARD_SECONDS:g} s"
        reason = f"{type(error).__name__}: {error}" if answer.done() else late
        records.event(EventKind.CARD_FAILED, reason=" ".join(reason.split()))


def push(rundir: RunDir, spec: HubSpec, records: Records) -> None:
    """Copy the run's model to the hub where the config says so, or say why not."""
    name = spec.push_to
    if name is None:
        return
    records.note(f"the model goes to the hub as {name}")
    answer = asked(lambda: pushed_to(rundir.model, name, spec.private))
    _wait(answer, spec.timeout_s)
    try:
        url = answer.result(0)
    except Exception as error:  # noqa: BLE001 - of a client, for a run that is over
        late = TimeoutError(f"it was not done within hub.timeout_s={spec.timeout_s:g}")
        reason = why_not(error if answer.done() else late, spec, rundir.model)
        records.event(EventKind.NOT_PUSHED, name=name, reason=reason)
        return
    records.event(EventKind.PUSHED, name=name, url=url)
    records.note(f"the model is on the hub: {url}")


def _wait(answer: Future[str], seconds: float) -> None:
    """Until it is there, or `seconds` are over. Python looks for signals between waits only."""
    end = time.monotonic() + seconds
    while not answer.done() and (left := end - time.monotonic()) > 0:
        wait({answer}, timeout=min(left, SIGNAL_SECONDS))
