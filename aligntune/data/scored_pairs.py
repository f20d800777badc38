"""Preference pairs from texts that reward functions score: of two completions of one prompt the one
with the higher score is preferred.

Invariant: every row is scored once, alone and with its own columns, and is in a pair with each
completion of its prompt whose score differs; ties are no pairs, and are counted.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.scoring.children import FunctionScorer
from actors.scoring.criteria import RewardCriterion, RewardFailed
from aligntune import loops
from aligntune.algorithms.advantages import weighted_total
from aligntune.data.dropped import Dropped, RowRules, settle_rows
from aligntune.data.errors import DataError, Reason
from aligntune.data.messages import TOOLS, check_unseen
from aligntune.data.sources import Rows, require_column

NO_SCORE = "every reward with a weight other than 0 abstains from it"


@dataclass(frozen=True)
class Ranked:
    """Which rows are preferred to which."""

    pairs: tuple[tuple[int, int], ...]  # (row of the higher score, row of the lower)
    ties: int  # pairs of rows of one prompt with equal scores


def rank(prompts: Sequence[str], scores: Sequence[float]) -> Ranked:
    """Every two rows of one prompt, by their scores; prompts in the order they come. Pure."""
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    pairs, ties = [], 0
    for rows in groups.values():
        for one, other in itertools.combinations(rows, 2):
            if scores[one] == scores[other]:
                ties += 1
            else:
                pairs.append((one, other) if scores[one] > scores[other] else (other, one))
    return Ranked(tuple(pairs), ties)


class ScoredPairs:
    """Rows `prompt`, `chosen` and `rejected`, formed from the rows of a data set of texts."""

    columns: tuple[str, ...] = ("prompt", "chosen", "rejected")

    def __init__(
        self,
        texts: Rows,
        used: Sequence[int],
        ranked: Ranked,
        dropped: Dropped,
        prompt_column: str,
        completion_column: str,
    ) -> None:
        """`ranked` counts in positions of `used`, which are rows of `texts`."""
        self.origin = texts.origin
        self.ties = ranked.ties
        self.dropped = dropped  # of the texts
        self._texts = texts
        self._pairs = [(used[better], used[worse]) for better, worse in ranked.pairs]
        self._prompt, self._completion = prompt_column, completion_column
        if TOOLS in texts.columns:
            self.columns = (*self.columns, TOOLS)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        better, worse = (self._texts[row] for row in self._pairs[index])
        pair = {
            "prompt": better[self._prompt],
            "chosen": better[self._completion],
            "rejected": worse[self._completion],
        }
        return pair | {name: better[name] for name in self.columns if name == TOOLS}

    def describe(self) -> str:
        """What became of the texts, in one line."""
        return (
            f"scored texts: {len(self._texts)}, {self.dropped.count} of them dropped; they make "
            f"{len(self)} pairs; {self.ties} ties left out"
        )

    def where(self, index: int) -> str:
        """As in `texts.jsonl, row 3 (line 4) over texts.jsonl, row 1 (line 2)`."""
        better, worse = self._pairs[index]
        return f"{self._texts.where(better)} over {self._texts.where(worse)}"


def scored_pairs(
    texts: Rows,
    criteria: Sequence[RewardCriterion],
    weights: Sequence[float],
    rules: RowRules,
    *,
    prompt_column: str,
    completion_column: str,
) -> ScoredPairs:
    """Score every row of `texts` with the weighted sum of the criteria and form the pairs.

    The functions run in child processes of this one, as they do in a reward actor.

    Raises:
        DataError: columns that are not there; rows without text or score that the rules refuse, or
            more of them than may be dropped; no two completions of a prompt with different scores.
    """
    require_column(texts, prompt_column, "data.prompt_column")
    require_column(texts, completion_column, "data.completion_column")
    wrong = {
        row: why
        for row in range(len(texts))
        if (why := _wrong(texts[row], prompt_column, completion_column))
    }
    rows = [row for row in range(len(texts)) if row not in wrong]
    sums = loops.run(_score(texts, rows, criteria, weights, prompt_column, completion_column))
    wrong |= {row: DataError(found) for row, found in sums.items() if isinstance(found, str)}
    dropped = settle_rows(texts, wrong, rules)
    used = [row for row in rows if row not in wrong]
    ranked = rank(
        [json.dumps(texts[row][prompt_column], sort_keys=True) for row in used],
        [float(sums[row]) for row in used],
    )
    if not ranked.pairs:
        raise DataError(
            f"{texts.origin}: no prompt has two completions with different scores ({len(used)} "
            f"texts, {ranked.ties} ties), so nothing is preferred to anything; give several "
            "completions a prompt, one a row, and a reward that tells them apart"
        )
    return ScoredPairs(texts, used, ranked, dropped, prompt_column, completion_column)


def _wrong(row: dict[str, Any], prompt_column: str, completion_column: str) -> DataError | None:
    prompt, completion = row[prompt_column], row[completion_column]
    if not isinstance(prompt, str | list) or not prompt:
        return DataError(f"{prompt_column} is empty or neither a string nor messages", Reason.EMPTY)
    if not isinstance(completion, str) or not completion.strip():
        return DataError(f"{completion_column} is empty or not a string", Reason.EMPTY)
    try:
        check_unseen(row, prompt, completion)
    except DataError as error:
        return error
    return None


async def _score(
    texts: Rows,
    rows: Sequence[int],
    criteria: Sequence[RewardCriterion],
    weights: Sequence[float],
    prompt_column: str,
    completion_column: str,
) -> dict[int, float | str]:
    """The weighted sum of each row's scores, or why it has none."""
    scorers = [FunctionScorer(criterion) for criterion in criteria]
    sums: dict[int, float | str] = {}
    try:
        for scorer in scorers:
            try:
                await scorer.start()
            except RewardFailed as error:
                raise DataError(str(error)) from error
        for row in rows:
            values = dict(texts[row])
            source, completion = values.pop(prompt_column), values.pop(completion_column)
            try:
                scores = [
                    (await scorer.call(source, [completion], values))[0] for scorer in scorers
                ]
                total = weighted_total(scores, weights)
                sums[row] = NO_SCORE if total is None else total
            except RewardFailed as error:
                sums[row] = str(error).splitlines()[0]
    finally:
        for scorer in scorers:
            await scorer.close()
    return sums
