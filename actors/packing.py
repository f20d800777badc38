"""How the completions of an optimiser step are shared out: over ranks, then over micro-batches.

Every row lands in exactly one place, whatever the sizes, and the same rows always land in the same
places. Where a row lands is memory and speed alone; the loss does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.messages import Row


def split_rows(rows: Sequence[Row], ranks: int) -> tuple[tuple[Row, ...], ...]:
    """The rows of one optimiser step for each of `ranks` ranks, balanced by tokens.

    The longest row goes to the least loaded rank first, so the loads of two ranks differ by at most
    the longest row. A rank may get none.
    """
    if ranks < 1:
        raise ValueError(f"rows can be split over 1 rank or more, not {ranks}")
    shares: list[list[Row]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in sorted(rows, key=_longest_first):
        rank = loads.index(min(loads))
        shares[rank].append(row)
        loads[rank] += row.tokens
    return tuple(tuple(sorted(share, key=_natural)) for share in shares)


def microbatches(
    rows: Sequence[Row], tokens_per_microbatch: int, packed: bool
) -> tuple[tuple[Row, ...], ...]:
    """Rows cut into micro-batches of at most `tokens_per_microbatch` tokens, longest first.

    A padded micro-batch costs its rows times the longest of them, a packed one the sum of its rows.
    A row longer than the budget is a micro-batch of its own.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch must be positive, not {tokens_per_microbatch}")
    batches: list[list[Row]] = []
    for row in sorted(rows, key=_longest_first):
        # Lengths fall, so the first row of a batch is its width.
        for batch in batches if packed else batches[-1:]:
            cost = (
                sum(other.tokens for other in batch) + row.tokens
                if packed
                else (len(batch) + 1) * batch[0].tokens
            )
            if cost <= tokens_per_microbatch:
                batch.append(row)
                break
        else:
            batches.append([row])
    return tuple(tuple(batch) for batch in batches)


def _longest_first(row: Row) -> tuple[int, int, int]:
    return (-row.tokens, row.work, row.completion)


def _natural(row: Row) -> tuple[int, int]:
    return (row.work, row.completion)
