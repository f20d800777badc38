"""trace.json has the fields of the trace event format, and its events nest as it demands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actors.timeline import Span, Timeline
from aligntune.tracking.trace import Trace


def checked(text: str) -> list[dict[str, Any]]:
    """The complete events of a trace, all fields as the format has them.

    The format: an array of objects with `ph`, `name`, `pid` and `tid`; complete events have `ts`
    and `dur` in microseconds, and those of one thread nest; metadata events name pid and tid.
    """
    events = json.loads(text)
    calls = [event for event in events if event["ph"] == "X"]
    named = {
        kind: {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == kind}
        for kind in ("process_name", "thread_name")
    }
    assert len(calls) + sum(map(len, named.values())) == len(events)
    for event in calls:
        assert isinstance(event["name"], str)
        assert isinstance(event["cat"], str)
        assert (event["pid"], 0) in named["process_name"]
        assert (event["pid"], event["tid"]) in named["thread_name"]
        assert event["dur"] >= 0
        assert isinstance(event["args"]["for"], str)
    for thread in {event["tid"] for event in calls}:
        ends: list[float] = []
        of_thread = (event for event in calls if event["tid"] == thread)
        for event in sorted(of_thread, key=lambda e: (e["ts"], -e["dur"])):
            end = event["ts"] + event["dur"]
            while ends and ends[-1] <= event["ts"]:
                ends.pop()
            assert not ends or end <= ends[-1] + 1e-3, f"{event} does not nest"
            ends.append(end)
    return calls


def test_calls_become_events_that_a_viewer_reads(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    now = [100.0]
    timeline = Timeline(trace.add, lambda: now[0])
    first = timeline.begin("rollout-0.0", "generate", "group 1")
    now[0] = 100.5
    second = timeline.begin("rollout-0.0", "generate", "group 2")
    now[0] = 102.0
    first.inside = {"queue": 0.25, "decode": 1.5}
    timeline.end(first)
    now[0] = 103.0
    timeline.end(second, failed=True)
    third = timeline.begin("policy-1", "update", "step 1")
    now[0] = 104.0
    third.inside = {"in the actor": 5.0}  # longer than the call itself, by another clock
    timeline.end(third)
    trace.close()

    calls = checked((tmp_path / "trace.json").read_text())
    assert [(call["name"], call["args"]["for"]) for call in calls] == [
        ("generate", "group 1"),
        ("decode", "group 1"),
        ("queue", "group 1"),
        ("generate", "group 2"),
        ("update", "step 1"),
        ("in the actor", "step 1"),
    ]
    assert calls[0]["ts"] == 100.0e6
    assert calls[0]["dur"] == 2.0e6
    assert (calls[1]["ts"], calls[2]["ts"]) == (100.5e6, 100.25e6)
    assert calls[0]["tid"] != calls[3]["tid"], "they overlap"
    assert calls[3]["args"]["failed"]
    assert calls[0]["pid"] == calls[3]["pid"] != calls[4]["pid"]


def test_a_trace_that_was_broken_off_lacks_its_end_alone(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    trace.add(Span("reward-0", "score", "group 1", 1.0, end=2.0))
    trace._file.flush()
    assert len(checked((tmp_path / "trace.json").read_text() + "]")) == 1
