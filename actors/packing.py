"""How the completions of an optimiser step are shared out: over ranks, then over micro-batches.

Every row lands in exactly one place, whatever the sizes, and the same rows always land in the same
places. Where a row lands is memory and speed alone; the loss does not depend on it.
docs/benchmarks.md has figures.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import TypeVar

import numpy as np

from actors.messages import GroupWork, Row

T = TypeVar("T")
GROUPS_A_RANK = 4  # from here on whole groups balance within 1 %
EVEN = 0.001  # of the mean; less is no gain
ATTENTION = 24_576  # tokens of a sequence whose attention costs what all the rest of it costs
A_MICROBATCH = 48  # tokens that cost what a micro-batch costs whatever is in it, on a CPU
ON_A_GPU = 256  # the same where a small micro-batch leaves most of the device idle; an estimate


def a_microbatch(device: str) -> int:
    """What a micro-batch costs beyond its tokens on a device of this type, in tokens."""
    return A_MICROBATCH if device == "cpu" else ON_A_GPU


def cost(tokens: int) -> int:
    """What a sequence costs to train on, in tokens of a short one.

    Attention grows with the square. The rest of a layer takes 12 * hidden size times the work of
    attending to one token, for a hidden size of 2,048: near enough to balance by.
    """
    return tokens + tokens * tokens // ATTENTION


def split(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the items that each of `ranks` ranks gets, in order, balanced by cost.

    The costliest goes to the least loaded rank first, and then the most loaded rank swaps items
    with those that have little to do. The loads of two ranks differ by at most the costliest. A
    rank may get none.
    """
    if ranks < 1:
        raise ValueError(f"a step can be split over 1 rank or more, not {ranks}")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, rank = loads[0]
        shares[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], rank))
    _even_out(costs, shares)
    return [sorted(share) for share in shares]


def _even_out(costs: Sequence[int], shares: list[list[int]]) -> None:
    """Swap items of the costliest share with cheaper ones of the cheapest shares, up to a few times
    a share, until it is within `EVEN` of the mean. No swap makes two shares differ more."""
    if not costs:
        return
    key = costs.__getitem__
    for share in shares:
        share.sort(key=key)
    loads = [sum(map(key, share)) for share in shares]
    enough = sum(costs) / len(shares) * (1 + EVEN)
    for _ in range(4 * len(shares)):
        high = max(range(len(shares)), key=loads.__getitem__)
        if loads[high] <= enough:
            return
        swaps = (
            (max(loads[high] - less, loads[low] + less), low, item, other)
            for low in heapq.nsmallest(4, range(len(shares)), key=loads.__getitem__)
            for item in shares[high]
            for other in _near(shares[low], key, costs[item] - (loads[high] - loads[low]) // 2)
            if 0 < (less := costs[item] - costs[other]) < loads[high] - loads[low]
        )
        best = min(swaps, default=None)
        if best is None:
            return
        _, low, item, other = best
        for rank, gone, new in ((high, item, other), (low, other, item)):
            shares[rank].remove(gone)
            insort(shares[rank], new, key=key)
            loads[rank] += costs[new] - costs[gone]


def _near(share: Sequence[int], key: Callable[[int], int], wanted: int) -> Sequence[int]:
    """The items of a share, cheapest first, that cost just less and just more than `wanted`."""
    place = bisect_left(share, wanted, key=key)
    return share[max(0, place - 1) : place + 1]


def share_out(rollouts: Sequence[Sequence[Row]], ranks: int) -> tuple[tuple[Row, ...], ...]:
    """The rows of one optimiser step, given by rollout, for each of `ranks` ranks, balanced by
    cost.

    Whole groups, so that one rank reads a group's arrays; whole rollouts where there are fewer than
    `GROUPS_A_RANK` groups a rank.
    """
    units = sorted(rollouts, key=lambda rows: _natural(rows[0]))
    groups = groupby(units, key=lambda rows: rows[0].work)
    parts = [[row for unit in group for row in unit] for _, group in groups]
    if len(parts) < GROUPS_A_RANK * ranks:
        parts = [list(unit) for unit in units]
    shares = split([sum(cost(row.tokens) for row in part) for part in parts], ranks)
    return tuple(tuple(row for index in share for row in parts[index]) for share in shares)


def only_its_own(
    groups: Sequence[GroupWork], minibatches: Sequence[Sequence[Row]]
) -> tuple[tuple[GroupWork, ...], tuple[tuple[Row, ...], ...]]:
    """The groups that one rank's rows come from, and its rows with `work` indexing those alone."""
    needed = sorted({row.work for rows in minibatches for row in rows})
    place = {work: index for index, work in enumerate(needed)}
    own = tuple(
        tuple(Row(place[row.work], row.completion, row.tokens) for row in rows)
        for rows in minibatches
    )
    return tuple(groups[work] for work in needed), own


def longest(chunks: Sequence[Sequence[int]]) -> list[int]:
    """Elementwise maximum of lists of unequal length: what every rank has to keep up with."""
    return [
        max(part[index] for part in chunks if index < len(part))
        for index in range(max(map(len, chunks)))
    ]


def microbatches(
    rows: Sequence[Row],
    tokens_per_microbatch: int,
    packed: bool,
    widths: Sequence[int] | None = None,
    each: int = A_MICROBATCH,
    prompts: Mapping[int, int] | None = None,
) -> tuple[tuple[Row, ...], ...]:
    """Rows cut into micro-batches of at most `tokens_per_microbatch` tokens, longest first.

    A padded micro-batch costs its rows times the longest of them, a packed one the sum of its rows.
    A row longer than the budget is a micro-batch of its own. `widths` are those of `widest`, where
    ranks keep in step: padded rows are cut at the same places on all of them. `each` is what a
    micro-batch costs beyond its tokens, in tokens (`a_microbatch`). `prompts` are the tokens of the
    groups' prompts, by `Row.work`, where a pack holds a prompt once.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch must be positive, not {tokens_per_microbatch}")
    ordered = sorted(rows, key=_longest_first)
    if prompts is not None:
        return _by_prompt(ordered, tokens_per_microbatch, prompts)
    if packed:
        return _fill([(row.tokens, row) for row in ordered], tokens_per_microbatch)
    ends = cut(widths or [row.tokens for row in ordered], tokens_per_microbatch, each)
    batches = (tuple(ordered[start:end]) for start, end in pairwise([0, *ends]))
    return tuple(batch for batch in batches if batch)


def widest(lengths: Sequence[Sequence[int]]) -> list[int]:
    """The longest of all ranks' first rows, of their second rows and so on, each rank's longest
    first: a round of micro-batches takes as long as its slowest."""
    return longest([sorted(own, reverse=True) for own in lengths])


def cut(widths: Sequence[int], tokens_per_microbatch: int, each: int = A_MICROBATCH) -> list[int]:
    """Where micro-batches end, for rows of falling `widths`: those cuts within the budget whose
    padded tokens are fewest, with `each` tokens for each micro-batch.

    The best of all cuts, in time that grows with the rows and what a micro-batch can hold: best(j)
    = min over i of best(i) + (j - i) * widths[i] + each.
    """
    width = np.asarray(widths, dtype=np.int64)
    reach = np.arange(len(width)) + np.maximum(1, tokens_per_microbatch // width)
    best = np.zeros(len(width) + 1, dtype=np.int64)
    begins = np.zeros(len(width) + 1, dtype=np.int64)
    first = 0  # the earliest row that may share a micro-batch with the latest; it never goes back
    for end in range(1, len(width) + 1):
        while reach[first] < end:
            first += 1
        begin = np.arange(first, end)
        costs = best[begin] + (end - begin) * width[begin]
        begins[end] = first + costs.argmin()
        best[end] = costs.min() + each
    ends = [len(width)]
    while ends[-1] > 0:
        ends.append(int(begins[ends[-1]]))
    return ends[-2::-1]


def _by_prompt(
    rows: Sequence[Row], room: int, prompts: Mapping[int, int]
) -> tuple[tuple[Row, ...], ...]:
    """Rows, longest first, in packs that hold a prompt once: a group stays whole where it fits,
    else it is cut into parts that each have the prompt."""
    parts: list[tuple[int, tuple[Row, ...]]] = []
    for work, group in groupby(sorted(rows, key=lambda row: row.work), key=lambda row: row.work):
        prompt = prompts[work]
        responses = [(row.tokens - prompt, row) for row in group]
        for part in _fill(responses, room - prompt):
            parts.append((prompt + sum(row.tokens - prompt for row in part), part))
    parts.sort(key=lambda part: -part[0])
    return tuple(tuple(row for part in pack for row in part) for pack in _fill(parts, room))


def _fill(items: Sequence[tuple[int, T]], room: int) -> tuple[tuple[T, ...], ...]:
    """(tokens, item) pairs, longest first, each into the fullest batch that has room for it, else a
    new one."""
    batches: list[list[T]] = []
    free: list[tuple[int, int]] = []  # (tokens left, batch), ascending
    for tokens, item in items:
        place = bisect_left(free, (tokens, -1))
        if place < len(free):
            left, batch = free.pop(place)
            batches[batch].append(item)
        else:
            left, batch = room, len(batches)
            batches.append([item])
        insort(free, (left - tokens, batch))
    return tuple(tuple(batch) for batch in batches)


def _longest_first(row: Row) -> tuple[int, int, int]:
    return (-row.tokens, row.work, row.completion)


def _natural(row: Row) -> tuple[int, int]:
    return (row.work, row.completion)
