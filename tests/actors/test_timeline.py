"""Spans of calls on one clock: their sums, their lanes, and what they are for."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import timeline as timelines
from actors.messages import UpdateResult
from actors.timeline import Span, Timeline, spanned, union


class Clock:
    """A time that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


INTERVALS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)), max_size=12)


@given(INTERVALS)
def test_a_union_counts_each_moment_once(spans: list[tuple[int, int]]) -> None:
    intervals = [(float(start), float(start + length)) for start, length in spans]
    moments = {m for start, length in spans for m in range(start, start + length)}
    assert union(iter(intervals)) == len(moments)


@pytest.mark.slow
@given(INTERVALS, st.lists(st.integers(1, 45), max_size=4))
def test_what_is_taken_between_adds_up_and_calls_that_overlap_share_no_lane(
    calls: list[tuple[int, int]], takes: list[int]
) -> None:
    clock, ended = Clock(), list[Span]()
    timeline = Timeline(ended.append, clock)
    open_spans: dict[int, Span] = {}
    total, moments = 0.0, set[int]()
    for time in range(50):
        clock.now = float(time)
        for index, (start, length) in enumerate(calls):
            if start + length == time and index in open_spans:
                timeline.end(open_spans.pop(index))
            if start == time and length:
                open_spans[index] = timeline.begin("rollout-0", "generate", f"group {index}")
        lanes = [span.lane for span in open_spans.values()]
        assert len(lanes) == len({*lanes})
        if time in takes:
            total += timeline.take({"rollout": ("generate",)})["rollout"]
    total += timeline.take({"rollout": ("generate",)})["rollout"]
    for start, length in calls:
        moments |= {*range(start, start + length)}
    assert total == len(moments)
    assert len(ended) == sum(length > 0 for _, length in calls)
    assert timeline.take({"rollout": ("generate",), "update": ("update",)}) == {
        "rollout": 0.0,
        "update": 0.0,
    }


def test_a_call_knows_what_it_is_for_however_many_run_beside_it() -> None:
    ended = list[Span]()

    async def call(group: int) -> None:
        timelines.about.set(f"group {group}")
        await asyncio.sleep(0)
        with spanned(f"rollout-{group % 2}", "generate") as heard:
            await asyncio.sleep(0)
            heard(UpdateResult(metrics={}, seconds=0.5))

    async def main() -> None:
        timelines.current.set(Timeline(ended.append))
        await asyncio.gather(*(call(group) for group in range(8)))

    asyncio.run(main())
    assert {(span.about, span.replica) for span in ended} == {
        (f"group {group}", f"rollout-{group % 2}") for group in range(8)
    }
    assert all(span.inside == {"in the actor": 0.5} and not span.failed for span in ended)


def test_a_call_that_raises_is_over_and_failed() -> None:
    ended = list[Span]()
    timelines.current.set(Timeline(ended.append))
    with pytest.raises(ValueError, match="broken"), spanned("reward-0", "score"):
        raise ValueError("broken")
    (span,) = ended
    assert span.failed
    timelines.current.set(None)


def test_without_a_timeline_nothing_is_kept() -> None:
    with spanned("reward-0", "score") as heard:
        heard(1)
