"""Sharing rows out: each exactly once, within the budget, and evenly."""

from __future__ import annotations

import cProfile
import random
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import Row
from actors.packing import (
    A_MICROBATCH,
    GROUPS_A_RANK,
    ON_A_GPU,
    cost,
    cut,
    microbatches,
    share_out,
    split,
    widest,
)

rows_of_any_length = st.builds(
    lambda lengths, size: [Row(i // size, i % size, tokens) for i, tokens in enumerate(lengths)],
    st.lists(st.integers(1, 60), max_size=30),
    st.integers(1, 4),
)


def alone(rows: list[Row]) -> list[list[Row]]:
    """Rollouts of one row each."""
    return [[row] for row in rows]


def keys(parts: object) -> list[tuple[int, int]]:
    return sorted((row.work, row.completion) for part in parts for row in part)  # type: ignore[attr-defined]


@pytest.mark.slow
@given(rows=rows_of_any_length, ranks=st.integers(1, 5))
def test_every_row_goes_to_one_rank_and_loads_differ_by_at_most_the_costliest_part(
    rows: list[Row], ranks: int
) -> None:
    shares = share_out(alone(rows), ranks)
    assert len(shares) == ranks
    assert keys(shares) == keys([rows])
    groups = {row.work for row in rows}
    whole = len(groups) >= GROUPS_A_RANK * ranks
    parts: dict[object, int] = {}
    for row in rows:
        key = row.work if whole else row
        parts[key] = parts.get(key, 0) + cost(row.tokens)
    loads = [sum(cost(row.tokens) for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(parts.values(), default=0)
    if whole:
        assert sum(len({row.work for row in share}) for share in shares) == len(groups)


@pytest.mark.slow
@given(rows=rows_of_any_length, ranks=st.integers(1, 5), data=st.data())
def test_a_share_does_not_depend_on_the_order_the_rows_come_in(
    rows: list[Row], ranks: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(rows))
    assert share_out(alone(shuffled), ranks) == share_out(alone(rows), ranks)


@pytest.mark.slow
@given(costs=st.lists(st.integers(0, 60), max_size=30), ranks=st.integers(1, 5))
def test_a_split_has_every_item_once(costs: list[int], ranks: int) -> None:
    shares = split(costs, ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_groups_stay_whole_where_there_are_enough_of_them_for_every_rank() -> None:
    rows = [Row(work, completion, 5) for work in range(8) for completion in range(2)]
    for share in share_out(alone(rows), 2):
        assert [row.completion for row in share] == [0, 1] * 4
    two, other = share_out(alone([Row(0, 0, 9), Row(0, 1, 9)]), 2)
    assert (len(two), len(other)) == (1, 1), "one group alone would leave a rank without work"


def test_the_rows_of_a_rollout_stay_together() -> None:
    rollouts = [[Row(0, 0, 9), Row(0, 1, 9)], [Row(0, 2, 1)], [Row(0, 3, 1), Row(0, 4, 1)]]
    first, second = share_out(rollouts, 2)
    assert first == (Row(0, 0, 9), Row(0, 1, 9))
    assert second == (Row(0, 2, 1), Row(0, 3, 1), Row(0, 4, 1))


def test_a_long_sequence_costs_more_than_as_many_tokens_of_short_ones() -> None:
    assert cost(100) == 100
    assert cost(32_768) > 2 * cost(16_384)
    long, short = share_out(alone([Row(0, 0, 30_000), *(Row(1, i, 300) for i in range(150))]), 2)
    assert sum(row.tokens for row in long) < sum(row.tokens for row in short)


@pytest.mark.slow
@given(rows=rows_of_any_length, budget=st.integers(1, 200), packed=st.booleans())
def test_microbatches_hold_every_row_once_within_the_budget(
    rows: list[Row], budget: int, packed: bool
) -> None:
    batches = microbatches(rows, budget, packed)
    assert keys(batches) == keys([rows])
    for batch in batches:
        widest = max(row.tokens for row in batch)
        cost = sum(row.tokens for row in batch) if packed else len(batch) * widest
        assert cost <= budget or len(batch) == 1


@given(rows=rows_of_any_length, budget=st.integers(1, 200))
def test_packed_microbatches_waste_less_than_half_of_the_budget(
    rows: list[Row], budget: int
) -> None:
    """Two neighbours never fit into one: else the count, and with it the time, could double."""
    batches = microbatches(rows, budget, packed=True)
    for first, second in pairwise(batches):
        assert sum(row.tokens for row in [*first, second[0]]) > budget


def filled(widths: list[int], budget: int) -> list[int]:
    """Where micro-batches end that are filled one after the other: as few as can be."""
    ends, start = [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - start) * widths[start] > budget:
            ends.append(end)
            start = end
    return ends


def padded(widths: list[int], ends: list[int]) -> int:
    return sum((end - start) * widths[start] for start, end in pairwise([0, *ends]))


falling = st.lists(st.integers(1, 2000), max_size=40).map(lambda w: sorted(w, reverse=True))
budgets = st.integers(1, 20_000)


@pytest.mark.slow
@given(widths=falling, budget=budgets)
def test_a_cut_pads_no_more_than_filling_one_after_the_other(
    widths: list[int], budget: int
) -> None:
    greedy = filled(widths, budget)
    assert padded(widths, cut(widths, budget)) <= padded(widths, greedy)
    assert len(cut(widths, budget)) >= len(greedy)


@given(
    widths=st.lists(st.integers(1, 900), max_size=9),
    budget=budgets,
    each=st.sampled_from([A_MICROBATCH, ON_A_GPU]),
)
def test_no_other_cut_within_the_budget_costs_less(
    widths: list[int], budget: int, each: int
) -> None:
    widths.sort(reverse=True)

    def price(ends: list[int]) -> int:
        return padded(widths, ends) + each * len(ends)

    def fits(ends: list[int]) -> bool:
        parts = pairwise([0, *ends])
        return all(e - s == 1 or (e - s) * widths[s] <= budget for s, e in parts)

    last = [len(widths)] if widths else []
    inner = range(1, len(widths))
    possible = [
        [*ends, *last] for count in range(len(widths) + 1) for ends in combinations(inner, count)
    ]
    chosen = cut(widths, budget, each)
    assert fits(chosen)
    assert price(chosen) == min(price(ends) for ends in possible if fits(ends))


def test_rows_of_very_different_length_do_not_share_a_width() -> None:
    rows = [Row(0, 0, 4000), *(Row(1, i, 300) for i in range(3))]
    assert microbatches(rows, 16_384, packed=False) == ((rows[0],), tuple(rows[1:]))
    near = [Row(0, 0, 310), *rows[1:]]
    assert microbatches(near, 16_384, packed=False) == (tuple(near),)


@pytest.mark.slow
@given(
    lengths=st.lists(st.lists(st.integers(1, 60), max_size=12), min_size=1, max_size=4),
    budget=st.integers(1, 500),
)
def test_ranks_that_keep_in_step_cut_at_the_same_places(
    lengths: list[list[int]], budget: int
) -> None:
    ranks = [[Row(0, i, tokens) for i, tokens in enumerate(own)] for own in lengths]
    ends = cut(widest(lengths), budget)
    for rows in ranks:
        batches = microbatches(rows, budget, False, widest(lengths))
        assert keys(batches) == keys([rows])
        parts = pairwise([0, *ends])
        sizes = [max(0, min(end, len(rows)) - start) for start, end in parts]
        assert [len(batch) for batch in batches] == [size for size in sizes if size]
        for batch in batches:
            assert len(batch) == 1 or len(batch) * batch[0].tokens <= budget


@pytest.mark.parametrize("packed", [False, True])
def test_cutting_costs_a_row_no_more_where_there_are_many(packed: bool) -> None:
    """Counted in calls of the interpreter, which no other process touches."""

    def calls(count: int) -> float:
        draw = random.Random(0)
        rows = [Row(i, 0, 1 + int(draw.lognormvariate(6.2, 1.0))) for i in range(count)]
        profile = cProfile.Profile()
        profile.runcall(microbatches, rows, 16_384, packed)
        return sum(entry.callcount for entry in profile.getstats()) / count

    assert calls(4096) <= 1.5 * calls(256)


def in_a_pack(rows: Sequence[Row], prompts: dict[int, int]) -> int:
    """Tokens of a pack that holds each prompt once."""
    of_prompts = sum(prompts[work] for work in {row.work for row in rows})
    return of_prompts + sum(row.tokens - prompts[row.work] for row in rows)


@pytest.mark.slow
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 30), max_size=6))),
    budget=st.integers(1, 120),
)
def test_packs_with_shared_prompts_keep_the_budget_and_count_a_prompt_once(
    shapes: list[tuple[int, list[int]]], budget: int
) -> None:
    prompts = {work: prompt for work, (prompt, _) in enumerate(shapes)}
    rows = [
        Row(work, completion, prompt + length)
        for work, (prompt, lengths) in enumerate(shapes)
        for completion, length in enumerate(lengths)
    ]
    batches = microbatches(rows, budget, packed=True, prompts=prompts)
    assert keys(batches) == keys([rows])
    for batch in batches:
        assert batch
        assert len(batch) == 1 or in_a_pack(batch, prompts) <= budget
    for work in prompts:
        own = [row for row in rows if row.work == work]
        if in_a_pack(own, prompts) <= budget:
            assert sum(work in {row.work for row in batch} for batch in batches) <= 1
    assert microbatches(rows[::-1], budget, packed=True, prompts=prompts) == batches


def test_a_row_longer_than_the_budget_is_alone() -> None:
    rows = [Row(0, 0, 50), Row(0, 1, 4), Row(0, 2, 5)]
    assert microbatches(rows, 10, packed=False) == ((rows[0],), (rows[2], rows[1]))


def test_a_rank_may_get_nothing() -> None:
    assert share_out([[Row(0, 0, 7)]], 3) == ((Row(0, 0, 7),), (), ())


def test_sizes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="1 rank or more"):
        share_out([], 0)
    with pytest.raises(ValueError, match="must be positive"):
        microbatches([], 0, packed=False)
