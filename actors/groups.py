"""A group from its rollouts: what the controller learns of it, and what stays in the object store.

Whoever makes rollouts, by one turn of text or by many with an environment, makes groups here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.messages import (
    Completion,
    FinishReason,
    GroupRecord,
    GroupTensors,
    ReplicaLoad,
    Segment,
)

Group = tuple[GroupRecord, GroupTensors]


def pack_group(
    group_id: int,
    prompt_ids: np.ndarray,
    rollouts: Sequence[Sequence[Completion]],
    seconds: float,
    replica: str,
    load: ReplicaLoad | None = None,
) -> Group:
    """The two halves of a group from the rows of each rollout, of which most have one.

    Where an environment wrote, the mask is False and the log-prob 0. A rollout ended as its last
    row did.

    Raises:
        RuntimeError: a rollout without a row, a segment whose log-probs or version spans do not
            cover its tokens, or a group without a token of the policy's.
    """
    reasons, turns, owners = [], [], []
    rows: list[tuple[Segment, ...]] = []
    for index, completions in enumerate(rollouts):
        if not completions:
            raise RuntimeError(f"group {group_id}: rollout {index} has no tokens")
        own = [completion.segments for completion in completions]
        reasons.append(FinishReason(completions[-1].finish_reason))
        turns.append(sum(segment.logprobs is not None for row in own for segment in row))
        owners += [index] * len(own)
        rows += own
    segments = [segment for row in rows for segment in row]
    for segment in segments:
        _check(group_id, segment)
    record = GroupRecord(
        group_id=group_id,
        prompt_tokens=len(prompt_ids),
        lengths=tuple(sum(len(segment.token_ids) for segment in row) for row in rows),
        finish_reasons=tuple(reasons),
        version_spans=tuple(tuple(s for segment in row for s in segment.spans) for row in rows),
        seconds=seconds,
        replica=replica,
        load=load,
        sampled=tuple(sum(span.tokens for s in row for span in s.spans) for row in rows),
        turns=tuple(turns),
        rollouts=tuple(owners),
    )
    if not any(record.sampled):
        raise RuntimeError(f"group {group_id}: the policy wrote none of its tokens")
    tensors = GroupTensors(
        group_id=group_id,
        prompt_ids=np.asarray(prompt_ids, dtype=np.int32),
        lengths=record.lengths,
        token_ids=np.concatenate([np.asarray(s.token_ids, dtype=np.int32) for s in segments]),
        logprobs=np.concatenate([_logprobs(segment) for segment in segments]),
        mask=np.concatenate([np.full(len(s.token_ids), s.logprobs is not None) for s in segments]),
    )
    return record, tensors


def _check(group_id: int, segment: Segment) -> None:
    length = len(segment.token_ids)
    covered = sum(span.tokens for span in segment.spans)
    if segment.logprobs is None:
        if covered:
            raise RuntimeError(
                f"group {group_id}: an environment's {length} tokens have version labels"
            )
    elif covered != length or len(segment.logprobs) != length:
        raise RuntimeError(
            f"group {group_id}: {length} sampled tokens have version labels for {covered} and "
            f"log-probs for {len(segment.logprobs)} of them"
        )


def _logprobs(segment: Segment) -> np.ndarray:
    if segment.logprobs is None:
        return np.zeros(len(segment.token_ids), dtype=np.float32)
    return np.asarray(segment.logprobs, dtype=np.float32)
