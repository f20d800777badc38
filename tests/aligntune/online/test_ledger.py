"""The ledger: exactly once, and the log alone proves it."""

import errno
import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.online.ledger import (
    Ledger,
    LedgerError,
    LedgerLog,
    State,
    adopt,
    audit,
    take_up,
)
from aligntune.runs import writer
from aligntune.runs.books import ENDS, MOVES


def to_trained(ledger: Ledger, group: int, step: int = 1) -> None:
    for state in (State.ROLLING, State.SCORING, State.READY, State.TRAINING):
        ledger.move([group], state)
    ledger.move([group], State.TRAINED, step=step)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_a_group_cannot_be_trained_twice(path: Path) -> None:
    ledger = Ledger(LedgerLog(path))
    group = ledger.admit(0)
    to_trained(ledger, group)
    with pytest.raises(LedgerError, match=r"group 0 is not open"):
        ledger.move([group], State.TRAINED)


def test_a_group_cannot_skip_its_scores(path: Path) -> None:
    ledger = Ledger(LedgerLog(path))
    group = ledger.admit(0)
    ledger.move([group], State.ROLLING)
    with pytest.raises(LedgerError, match="ROLLING and cannot become READY"):
        ledger.move([group], State.READY)


def test_a_move_of_many_is_all_or_none(path: Path) -> None:
    ledger = Ledger(LedgerLog(path))
    first, second = ledger.admit(0), ledger.admit(0)
    ledger.move([first], State.ROLLING)
    with pytest.raises(LedgerError):
        ledger.move([first, second], State.SCORING)
    assert ledger.state(first) is State.ROLLING
    assert audit(path).open == 2


def test_restore_undoes_what_came_after_the_checkpoint(path: Path) -> None:
    ledger = Ledger(LedgerLog(path))
    ledger.restore(Ledger.beginning(), step=0, version=0)
    kept, lost = ledger.admit(0), ledger.admit(0)
    to_trained(ledger, kept)
    snapshot = ledger.snapshot(1)
    to_trained(ledger, lost)
    ledger.admit(1)
    assert ledger.restore(snapshot, step=1, version=1) == [lost]
    to_trained(ledger, lost, step=2)
    books = audit(path)
    assert books == ledger.books
    assert (books.admitted, books.trained, books.open) == (2, 2, 0)
    assert books.balanced


def test_a_torn_last_line_is_cut_and_the_log_goes_on(path: Path) -> None:
    log = LedgerLog(path)
    ledger = Ledger(log)
    ledger.admit(0)
    log.close()
    with path.open("a") as file:
        file.write('{"seq": 1, "event": "adm')
    assert audit(path).admitted == 1
    again = Ledger(LedgerLog(path))
    again.restore(Ledger.beginning(), step=0, version=0)
    again.admit(0)
    assert audit(path).admitted == 1


def test_the_books_of_a_run_that_goes_on_from_another_s_checkpoint_balance(
    path: Path, tmp_path: Path
) -> None:
    first = Ledger(LedgerLog(path))
    for _ in range(4):
        first.admit(0)
    for state in (State.ROLLING, State.SCORING):
        first.move([0, 1, 2], state)
    first.move([0], State.FILTERED)
    first.move([1], State.READY)
    first.move([1], State.TRAINING)
    first.move([1], State.TRAINED)
    snapshot = first.snapshot(step=1)

    elsewhere = tmp_path / "elsewhere.jsonl"
    adopt(elsewhere, snapshot, step=1)
    second = Ledger(LedgerLog(elsewhere))
    assert second.restore(snapshot, step=1, version=1) == [2, 3]
    second.move([3], State.QUARANTINED)
    second.admit(1)
    books = audit(elsewhere)
    assert books == second.books
    assert (books.admitted, books.trained, books.filtered) == (5, 1, 1)
    assert (books.quarantined, books.open, books.balanced) == (1, 2, True)
    second.restore(snapshot, step=1, version=1)
    assert audit(elsewhere) == second.books
    second.restore(snapshot, step=2, version=1)
    with pytest.raises(LedgerError, match="no checkpoint in this log"):
        audit(elsewhere)


@pytest.mark.parametrize("damaged", [b"", b"{damaged\n", b"7\n", b'{"seq": null}\n'])
def test_a_log_goes_on_by_its_last_record_and_only_its_end_is_read(
    path: Path, damaged: bytes
) -> None:
    ledger = Ledger(LedgerLog(path))
    for _ in range(9):
        ledger.admit(0)
    with path.open("ab") as file:
        file.write(damaged + b'{"seq": 1')
    log = LedgerLog(path)
    log({"event": "checkpoint", "step": 1})
    assert lines_after(path, 9 + bool(damaged)) == [
        {"seq": 9 + bool(damaged), "event": "checkpoint", "step": 1}
    ]


def lines_after(path: Path, number: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[number:]]


class Ticks:
    """An event loop's turns, made by hand."""

    def __init__(self) -> None:
        self._due: list[Callable[[], None]] = []

    def __call__(self, flush: Callable[[], None]) -> None:
        self._due.append(flush)

    def turn(self) -> int:
        due, self._due = self._due, []
        for flush in due:
            flush()
        return len(due)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_moves_of_one_turn_are_written_together_and_in_order(path: Path) -> None:
    ticks = Ticks()
    ledger = Ledger(LedgerLog(path, ticks))
    groups = [ledger.admit(0) for _ in range(50)]
    for group in groups:
        ledger.move([group], State.ROLLING)
    assert lines(path) == []
    assert ticks.turn() == 1
    assert [record["seq"] for record in lines(path)] == list(range(100))
    ledger.move([groups[0]], State.SCORING)
    assert ticks.turn() == 1
    assert audit(path) == ledger.books


@pytest.mark.parametrize("what", ["trained", "checkpoint", "restore", "sync"])
def test_what_others_build_on_is_written_before_the_call_returns(path: Path, what: str) -> None:
    log = LedgerLog(path, Ticks())
    ledger = Ledger(log)
    first, second = ledger.admit(0), ledger.admit(0)
    for state in (State.ROLLING, State.SCORING, State.READY, State.TRAINING):
        ledger.move([first], state)
    assert lines(path) == []
    if what == "trained":
        ledger.move([first], State.TRAINED, step=1)
    elif what == "checkpoint":
        ledger.snapshot(1)
    elif what == "restore":
        ledger.restore(Ledger.beginning(), step=0, version=0)
    else:
        log.sync()
    assert [record["seq"] for record in lines(path)] == list(range(len(lines(path))))
    assert audit(path) == ledger.books
    ledger.move([second], State.ROLLING) if what != "restore" else ledger.admit(0)
    log.close()
    assert audit(path) == ledger.books


def test_a_log_that_cannot_be_written_is_heard_of_at_the_next_move(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks()
    log = LedgerLog(path, ticks)
    ledger = Ledger(log)
    ledger.admit(0)

    class Broken:
        def write(self, data: bytes) -> None:
            raise OSError(errno.EIO, "Input/output error")

    whole = log._file
    monkeypatch.setattr(log, "_file", Broken())
    ticks.turn()
    monkeypatch.setattr(log, "_file", whole)
    with pytest.raises(OSError, match="Input/output"):
        ledger.move([0], State.ROLLING)
    with pytest.raises(OSError, match="Input/output"):
        log.sync()


def test_records_wait_for_room_on_a_full_disk_and_not_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = Ticks()
    log = LedgerLog(path, ticks)
    ledger = Ledger(log)

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    whole = log._file
    monkeypatch.setattr(log, "_file", Full())
    ledger.admit(0)
    ticks.turn()
    to_trained(ledger, 0)
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    monkeypatch.setattr(log, "_file", whole)
    ledger.admit(0)
    assert ticks.turn() == 1
    assert audit(path) == ledger.books
    monkeypatch.setattr(log, "_file", Full())
    monkeypatch.setattr(writer, "SECONDS", -1.0)
    ledger.admit(0)
    ticks.turn()
    with pytest.raises(OSError, match="No space left"):
        ledger.admit(0)


@pytest.mark.parametrize("left", [None, b""])
def test_a_log_that_was_lost_begins_again_with_the_checkpoint(
    path: Path, left: bytes | None
) -> None:
    first = Ledger(LedgerLog(path))
    for _ in range(3):
        first.admit(0)
    to_trained(first, 0)
    snapshot = first.snapshot(step=1)
    assert take_up(path, snapshot, step=1) is None
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    assert "its books begin with the checkpoint of step 1" in str(take_up(path, snapshot, step=1))
    second = Ledger(LedgerLog(path))
    assert second.restore(snapshot, step=1, version=1) == [1, 2]
    to_trained(second, 1, step=2)
    assert audit(path) == second.books


def test_audit_refuses_a_log_with_a_gap(path: Path) -> None:
    ledger = Ledger(LedgerLog(path))
    for _ in range(3):
        ledger.admit(0)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    with pytest.raises(LedgerError, match=":2: record 2 where 1 is due"):
        audit(path)


def test_audit_refuses_a_group_that_ends_twice(path: Path) -> None:
    ledger = Ledger(LedgerLog(path))
    ledger.admit(0)
    ledger.move([0], State.QUARANTINED, reason="test")
    lines = path.read_text().splitlines()
    again = json.dumps({**json.loads(lines[1]), "seq": 2})
    path.write_text("\n".join([*lines, again]) + "\n")
    with pytest.raises(LedgerError, match="not open"):
        audit(path)


@pytest.mark.slow
def test_the_books_of_every_past_step_take_little_memory(path: Path) -> None:
    """With 4,096 groups open, 33 KB a step would be 3 GB after 100,000 steps."""
    chosen, steps, per_step = random.Random(0), 100, 16
    still: dict[int, list[int]] = {}
    open_groups = list(range(4096))
    admitted = len(open_groups)
    records: list[dict[str, Any]] = [{"event": "admit", "group": group} for group in open_groups]
    for step in range(1, steps + 1):
        ended = set(chosen.sample(open_groups, per_step))
        records.append({"event": "move", "groups": sorted(ended), "to": "QUARANTINED"})
        new = range(admitted, admitted + per_step)
        records += ({"event": "admit", "group": group} for group in new)
        open_groups = [group for group in open_groups if group not in ended] + [*new]
        admitted += per_step
        records.append({"event": "checkpoint", "step": step})
        still[step] = open_groups
    records.append({"event": "restore", "step": 50})
    records.append({"event": "move", "groups": still[50], "to": "QUARANTINED"})
    lines = (json.dumps({"seq": seq, **record}) for seq, record in enumerate(records))
    path.write_text("".join(line + "\n" for line in lines))
    tracemalloc.start()
    try:
        books = audit(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (books.admitted, books.open) == (4096 + 50 * per_step, 0)
    assert books.balanced
    assert most < 2 * 2**20


def counted(ledger: Ledger) -> dict[int, tuple[int, set[int]]]:
    """What the ledger's cohorts say, by version: how many groups, which of them are ready."""
    return {each.version: (each.size, set(each.ready)) for each in ledger.cohorts() if each.size}


def recounted(ledger: Ledger, version_of: dict[int, int]) -> dict[int, tuple[int, set[int]]]:
    """The same, group by group."""
    found: dict[int, tuple[int, set[int]]] = {}
    for group, version in version_of.items():
        state = ledger.state(group)
        if state in (None, State.WAITING, State.TRAINING):
            continue
        size, ready = found.get(version, (0, set()))
        found[version] = (size + 1, ready | ({group} if state is State.READY else set()))
    return found


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_log_agrees_with_the_ledger_under_any_history(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(LedgerLog(path))
    ledger.restore(Ledger.beginning(), step=0, version=0)
    saved: list[tuple[int, dict[str, Any]]] = [(0, Ledger.beginning())]
    step = 0
    version_of: dict[int, int] = {}  # of open groups
    for _ in range(data.draw(st.integers(1, 60))):
        open_ids = [g for g in range(ledger.books.admitted) if ledger.state(g) is not None]
        action = data.draw(st.sampled_from(["admit", "move", "move", "move", "save", "restore"]))
        if action == "admit" or (action == "move" and not open_ids):
            version_of[ledger.admit(step)] = step
        elif action == "move":
            group = data.draw(st.sampled_from(open_ids))
            current = ledger.state(group)
            assert current is not None
            to = data.draw(st.sampled_from(sorted(MOVES[current])))
            if to is State.ROLLING and data.draw(st.booleans()):
                version_of[group] = step
                ledger.move([group], to, version=step)
            else:
                ledger.move([group], to)
        elif action == "save":
            step += 1
            saved.append((step, ledger.snapshot(step)))
        else:
            index = data.draw(st.integers(0, len(saved) - 1))
            saved = saved[: index + 1]
            step, snapshot = saved[-1]
            version_of = dict.fromkeys(ledger.restore(snapshot, step=step, version=step), step)
        assert ledger.books.balanced
        assert counted(ledger) == recounted(ledger, version_of)
    assert audit(path) == ledger.books


def test_every_state_but_the_ends_can_be_left() -> None:
    assert set(MOVES) | ENDS == set(State)
    assert not set(MOVES) & ENDS
