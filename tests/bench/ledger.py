"""Audit, and restore, of the ledger of a run of a million groups: processor time and memory."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from aligntune.online.ledger import Ledger, LedgerLog, State, audit, take_up
from tests.bench.report import Measured, Target

GROUPS, PER_STEP = 1_000_000, 64
ROUTE = (State.ROLLING, State.SCORING, State.READY)


def write_log(path: Path, groups: int, per_step: int) -> dict[str, Any]:
    """The log of a run that nothing happened to, as `LedgerLog` writes it; the last snapshot."""
    seq = step = 0
    snapshot = Ledger.beginning()
    with path.open("w", encoding="utf-8") as file:

        def add(*records: dict[str, Any]) -> None:
            nonlocal seq
            for record in records:
                file.write(json.dumps({"seq": seq, **record}) + "\n")
                seq += 1

        add({"event": "restore", "step": 0, "version": 0})
        for first in range(0, groups, per_step):
            ids = list(range(first, min(first + per_step, groups)))
            add(*({"event": "admit", "group": group, "version": step} for group in ids))
            for state in ROUTE:
                moves = ({"event": "move", "groups": [group], "to": state.value} for group in ids)
                add(*({**move, "replica": "rollout-0"} for move in moves))
            step += 1
            for state in (State.TRAINING, State.TRAINED):
                add({"event": "move", "groups": ids, "to": state.value, "step": step})
            add({"event": "checkpoint", "step": step})
            ended = {**snapshot["ended"], "TRAINED": ids[-1] + 1}
            snapshot = {"next": ids[-1] + 1, "ended": ended, "lost": 0, "open": [], "step": step}
    return snapshot


def seconds(groups: int, per_step: int) -> tuple[float, float]:
    """Processor time of an audit, and of a restore, of a log of so many groups."""
    with tempfile.TemporaryDirectory(prefix="bench-ledger-") as folder:
        path = Path(folder) / "ledger.jsonl"
        snapshot = write_log(path, groups, per_step)
        began = time.process_time()
        assert audit(path).trained == groups
        audited = time.process_time() - began
        began = time.process_time()
        assert take_up(path, snapshot, snapshot["step"]) is None
        log = LedgerLog(path)
        Ledger(log).restore(snapshot, snapshot["step"], snapshot["step"])
        log.close()
        return audited, time.process_time() - began


def measure() -> Measured:
    """A million groups, once."""
    audited, restored = seconds(GROUPS, PER_STEP)
    figures = {
        "audit_s": audited,
        "restore_s": restored,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }
    return Measured(figures, (Target("audit_s", 10.0), Target("restore_s", 10.0)))
