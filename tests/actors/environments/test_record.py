"""Rows from the calls of an episode: what is trained is what was sampled, once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.environments.base import ModelCall
from actors.environments.record import common_prompt, paths_of, rows_of, turn_ends
from actors.groups import pack_group
from actors.messages import Completion, FinishReason, Segment, VersionSpan


def call(
    prompt: list[int],
    sampled: list[int],
    name: int = 0,
    reason: FinishReason = FinishReason.STOP,
    first_version: int = 1,
) -> ModelCall:
    """A call whose log-probs say which token of which call they are of."""
    logprobs = [-(name + index / 100) for index in range(len(sampled))]
    spans = [VersionSpan(first_version, 1)]
    if len(sampled) > 1:
        spans.append(VersionSpan(first_version + 1, len(sampled) - 1))
    segment = Segment(np.array(sampled, dtype=np.int32), logprobs, tuple(spans))
    return ModelCall(np.array(prompt, dtype=np.int32), segment, reason)


def whole(of: ModelCall) -> list[int]:
    return [*of.prompt_ids.tolist(), *map(int, of.sampled.token_ids)]


def ids(row: Completion) -> list[int]:
    return [int(token) for segment in row.segments for token in segment.token_ids]


def trained(row: Completion) -> list[Segment]:
    return [segment for segment in row.segments if segment.logprobs is not None]


def shape(rows: list[Completion]) -> list[list[tuple[str, list[int]]]]:
    return [
        [
            ("policy" if s.logprobs is not None else "given", [int(t) for t in s.token_ids])
            for s in row.segments
        ]
        for row in rows
    ]


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=3)  # few, so that calls meet by chance


@st.composite
def episodes(draw: st.DrawFn, first: int = 0) -> list[ModelCall]:
    """Calls that extend, cut short, rewrite or repeat what earlier ones have seen."""
    calls: list[ModelCall] = []
    for index in range(draw(st.integers(1, 7))):
        prompt = [7, *draw(TOKENS)]
        if calls and draw(st.booleans()):
            earlier = whole(draw(st.sampled_from(calls)))
            kept = draw(st.sampled_from([len(earlier), len(earlier), len(earlier) - 1, 1]))
            prompt = earlier[:kept] + draw(st.one_of(st.just([]), TOKENS))
        reason = draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
        calls.append(call(prompt, draw(TOKENS), first + index + 1, reason))
    return calls


@pytest.mark.slow
@given(episodes())
def test_every_sampled_token_is_trained_once_with_its_own_log_prob_and_version(
    calls: list[ModelCall],
) -> None:
    found = [segment for row in rows_of(calls, FinishReason.STOP) for segment in trained(row)]
    assert sorted(map(id, found)) == sorted(id(call.sampled) for call in calls)


@pytest.mark.slow
@given(episodes())
def test_a_row_is_what_the_model_saw_for_its_last_call_and_what_it_sampled(
    calls: list[ModelCall],
) -> None:
    by_segment = {id(call.sampled): call for call in calls}
    rows = rows_of(calls, FinishReason.TURNS)
    for row in rows:
        own = [by_segment[id(segment)] for segment in trained(row)]
        assert ids(row) == whole(own[-1])
        done = 0
        for segment in row.segments:  # each answer stands after the prompt it was sampled for
            if segment.logprobs is not None:
                assert ids(row)[:done] == by_segment[id(segment)].prompt_ids.tolist()
            done += len(segment.token_ids)
    assert [row.finish_reason for row in rows[:-1]] == [
        calls[path[-1]].finish_reason for path in paths_of(calls)[:-1]
    ]
    assert rows[-1].finish_reason == FinishReason.TURNS


@pytest.mark.slow
@given(st.lists(episodes(), min_size=1, max_size=4))
def test_the_rows_of_a_group_go_on_from_one_prompt_as_long_as_can_be(
    group: list[list[ModelCall]],
) -> None:
    rollouts = [rows_of(calls, FinishReason.STOP) for calls in group]
    rows = [row for own in rollouts for row in own]
    prompt, cut = common_prompt(rollouts)
    rest = [row for own in cut for row in own]
    assert [len(own) for own in cut] == [len(own) for own in rollouts]
    assert [prompt.tolist() + ids(row) for row in rest] == [ids(row) for row in rows]
    assert [trained(row) for row in rest] == [trained(row) for row in rows]
    nexts = {ids(row)[0] for row in rest}
    assert len(nexts) > 1 or any(row.segments[0].logprobs is not None for row in rest)
    assert all(len(segment.token_ids) for row in rest for segment in row.segments)


@pytest.mark.slow
@given(st.lists(episodes(), min_size=1, max_size=4))
def test_the_last_token_of_a_turn_is_found_in_the_groups_arrays(
    group: list[list[ModelCall]],
) -> None:
    prompt, rollouts = common_prompt([rows_of(calls, FinishReason.STOP) for calls in group])
    record, tensors = pack_group(3, prompt, rollouts, 0.1, "rollout-0")
    ends = turn_ends(group, len(prompt))
    assert record.turns == tuple(len(calls) for calls in group)
    for rollout, (calls, own) in enumerate(zip(group, ends, strict=True)):
        for of, end in zip(calls, own, strict=True):
            assert tensors.mask[end]
            assert tensors.token_ids[end] == of.sampled.token_ids[-1]
            assert tensors.logprobs[end] == np.float32(of.sampled.logprobs[-1])
            rows = [i for i, owner in enumerate(record.rollouts) if owner == rollout]
            inside = [tensors.completion(row) for row in rows]
            assert any(row.start <= end < row.stop for row in inside)
    places = [end for own in ends for end in own]
    assert len(set(places)) == len(places)


def test_a_conversation_that_only_grows_is_one_row() -> None:
    calls = [call([7, 1], [2, 3]), call([7, 1, 2, 3, 9], [4])]
    assert shape(rows_of(calls, FinishReason.STOP)) == [
        [("given", [7, 1]), ("policy", [2, 3]), ("given", [9]), ("policy", [4])]
    ]


def test_a_history_that_is_rendered_anew_is_a_second_row_that_trains_the_new_turn_alone() -> None:
    """The thinking (2) of the first turn is left out of the second's prompt."""
    calls = [call([7, 1], [2, 3]), call([7, 1, 3, 9], [4])]
    assert shape(rows_of(calls, FinishReason.STOP)) == [
        [("given", [7, 1]), ("policy", [2, 3])],
        [("given", [7, 1, 3, 9]), ("policy", [4])],
    ]


def test_two_ways_on_from_one_turn_train_it_in_the_first_row() -> None:
    calls = [call([7], [1]), call([7, 1, 8], [2]), call([7, 1, 9], [3])]
    assert shape(rows_of(calls, FinishReason.STOP)) == [
        [("given", [7]), ("policy", [1]), ("given", [8]), ("policy", [2])],
        [("given", [7, 1, 9]), ("policy", [3])],
    ]


def test_two_answers_alike_to_one_prompt_are_two_rows() -> None:
    calls = [call([7], [1], 1), call([7], [1], 2), call([7, 1, 8], [2], 3)]
    assert paths_of(calls) == [[0], [1, 2]]


def test_a_call_for_a_title_is_a_row_of_its_own() -> None:
    calls = [call([7, 1], [2]), call([7, 5, 5], [6]), call([7, 1, 2, 9], [3])]
    rows = rows_of(calls, FinishReason.STOP)
    assert shape(rows) == [
        [("given", [7, 5, 5]), ("policy", [6])],
        [("given", [7, 1]), ("policy", [2]), ("given", [9]), ("policy", [3])],
    ]
    assert common_prompt([rows])[0].tolist() == [7]


def test_rows_without_a_first_token_in_common_are_refused() -> None:
    rows = [rows_of([call([first, 1], [2])], FinishReason.STOP) for first in (7, 8)]
    with pytest.raises(ValueError, match="begin with different tokens"):
        common_prompt(rows)


def test_no_call_and_an_empty_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="without a call"):
        rows_of([], FinishReason.STOP)
    with pytest.raises(ValueError, match="call 0 of the model sampled no token"):
        rows_of([call([7], [])], FinishReason.STOP)
