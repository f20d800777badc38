"""From the model calls of episodes to the rows of a group that is trained on. Pure.

The calls of an episode form a tree: a call goes on from the longest earlier one whose prompt and
answer its own prompt begins with. Each leaf is a row: what the model saw for its last call, and
what it sampled. Invariant: a sampled token is trained exactly once, in the first row that holds it
(later ones give it as the environment's), and a token that nobody sampled never is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.environments.base import ModelCall
from actors.messages import Completion, FinishReason, Segment


def rows_of(calls: Sequence[ModelCall], finish_reason: FinishReason) -> list[Completion]:
    """The rows of one episode, in the order of their last calls, each from its first token on.

    The last row ends as the episode did, an earlier one as its last call.

    Raises:
        ValueError: there is no call, or one that sampled nothing.
    """
    rows: list[Completion] = []
    trained: set[int] = set()
    for path in paths_of(calls):
        leaf = calls[path[-1]]
        tokens = _tokens(leaf)
        segments: list[Segment] = []
        done = 0
        for index in path:
            if index in trained:
                continue
            trained.add(index)
            start = len(calls[index].prompt_ids)
            if start > done:
                segments.append(Segment(tokens[done:start]))
            segments.append(calls[index].sampled)
            done = start + len(calls[index].sampled.token_ids)
        rows.append(Completion(tuple(segments), leaf.finish_reason))
    return [*rows[:-1], Completion(rows[-1].segments, finish_reason)]


def paths_of(calls: Sequence[ModelCall]) -> list[list[int]]:
    """The calls that each row holds, from its first to its last, as indices of `calls`.

    Of several calls that end alike a later one goes on from the latest. Raises ValueError as
    `rows_of`.
    """
    if not calls:
        raise ValueError("an episode without a call of the model has no tokens")
    whole = [_tokens(call) for call in calls]
    parents: list[int | None] = []
    for index, call in enumerate(calls):
        if not len(call.sampled.token_ids):
            raise ValueError(f"call {index} of the model sampled no token")
        begun = [
            earlier
            for earlier in range(index)
            if len(whole[earlier]) <= len(call.prompt_ids)
            and np.array_equal(whole[earlier], call.prompt_ids[: len(whole[earlier])])
        ]
        parents.append(max(begun, key=lambda i: (len(whole[i]), i), default=None))
    paths = []
    for leaf in range(len(calls)):
        if leaf not in parents:
            path, above = [leaf], parents[leaf]
            while above is not None:
                path.append(above)
                above = parents[above]
            paths.append(path[::-1])
    return paths


def common_prompt(
    rollouts: Sequence[Sequence[Completion]],
) -> tuple[np.ndarray, list[list[Completion]]]:
    """What all rows of a group begin with, up to the first sampled token of any; and the rows
    without it, ready for `pack_group`.

    Returns the prompt [P] int32, P of 1 or more, and the rows of each rollout as `rows_of` has
    ordered them.

    Raises:
        ValueError: the rows have no first token in common that nobody sampled.
    """
    rows = [row for completions in rollouts for row in completions]
    heads = [_unsampled_head(row) for row in rows]
    length = min(map(len, heads))
    for head in heads:
        differ = np.flatnonzero(head[:length] != heads[0][:length])
        length = int(differ[0]) if len(differ) else length
    if not length:
        raise ValueError(
            "the conversations of a group begin with different tokens, so they have no prompt in "
            "common; begin them alike, such as with one system message"
        )
    cut = [[_without(row, length) for row in completions] for completions in rollouts]
    return heads[0][:length], cut


def turn_ends(rollouts: Sequence[Sequence[ModelCall]], prompt_tokens: int) -> list[list[int]]:
    """Where the last sampled token of each call lies in the flat arrays [N] of the group that
    `rows_of`, `common_prompt` and `pack_group` make of the calls of its rollouts: [G][calls]."""
    ends = []
    start = 0
    for calls in rollouts:
        own = [-1] * len(calls)
        for path in paths_of(calls):
            for index in path:
                if own[index] < 0:
                    own[index] = start - prompt_tokens + len(_tokens(calls[index])) - 1
            start += len(_tokens(calls[path[-1]])) - prompt_tokens
        ends.append(own)
    return ends


def _tokens(call: ModelCall) -> np.ndarray:
    """Prompt and answer of a call."""
    return np.concatenate([call.prompt_ids, call.sampled.token_ids]).astype(np.int32)


def _unsampled_head(row: Completion) -> np.ndarray:
    first = row.segments[0]
    return np.asarray(() if first.logprobs is not None else first.token_ids, dtype=np.int32)


def _without(row: Completion, prompt_tokens: int) -> Completion:
    rest = Segment(row.segments[0].token_ids[prompt_tokens:])
    segments = (rest, *row.segments[1:]) if len(rest.token_ids) else row.segments[1:]
    return Completion(segments, row.finish_reason)
