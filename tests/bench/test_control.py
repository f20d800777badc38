"""The driver's work for a group is the same however many groups a step has: counted, not timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aligntune.online.ledger import LedgerLog, audit
from tests.bench import report
from tests.bench.__main__ import main
from tests.bench.control import calls_a_group, ready
from tests.bench.report import Measured, Target


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_function_calls_a_group_do_not_grow_with_the_groups_of_a_step(max_staleness: int) -> None:
    few, many = calls_a_group(64, 2, max_staleness), calls_a_group(384, 1, max_staleness)
    assert many <= 1.1 * few


@pytest.mark.slow
def test_a_step_wakes_one_waiter_a_slot_and_writes_the_ledger_once_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    flush = LedgerLog.flush

    def watched(log: LedgerLog) -> None:
        if log._lines:
            written.append(len(log._lines))
        flush(log)

    monkeypatch.setattr(LedgerLog, "flush", watched)
    with ready(256, 1, 0) as run:
        run.go()
        books = audit(Path(run.controller.config.output_dir) / "ledger.jsonl")
    assert (books.trained, books.open) == (256, 0)
    slots = {"rollout": 32, "reward": 16}
    for replicas in run.sets:
        calls, role = 256, replicas.role
        assert calls - slots[role] <= replicas.replicas.woken + slots[role] <= calls
    assert sum(written) > 4 * 256, "admitted and moved"
    assert len(written) < sum(written) / 8


def test_a_bench_writes_what_it_found_on_what_and_whether_that_is_enough(tmp_path: Path) -> None:
    measured = Measured({"a": 1.2, "b": 3.0}, (Target("a", 1.3), Target("b", 2.0)))
    written = json.loads(report.write("some", measured, tmp_path).read_text())
    assert {"name", "machine", "commit", "figures", "targets", "met"} <= written.keys()
    assert written["met"] == {"a": True, "b": False}


def test_benches_are_listed_and_an_unknown_one_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    assert "control" in capsys.readouterr().out
    assert main(["other"]) == 2
