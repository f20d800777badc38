"""A group of any shape from its rollouts: masks, labels, counts."""

from __future__ import annotations

import numpy as np
import pytest

from actors.groups import Group, pack_group
from actors.messages import Completion, FinishReason, ReplicaLoad, Segment, VersionSpan

PROMPT = np.array([7, 8], dtype=np.int32)
LOAD = ReplicaLoad(10.0, 2.0, 0.0, None)


def policy(*tokens: int, version: int = 3) -> Segment:
    return Segment(tokens, [-0.5] * len(tokens), (VersionSpan(version, len(tokens)),))


def environment(*tokens: int) -> Segment:
    return Segment(tokens)


def row(*segments: Segment, reason: FinishReason = FinishReason.STOP) -> Completion:
    return Completion(segments, reason)


def packed(*rollouts: list[Completion]) -> Group:
    return pack_group(5, PROMPT, rollouts, 0.5, "rollout-1", LOAD)


def test_one_turn_is_one_row_of_one_segment_all_of_it_trained() -> None:
    record, tensors = packed([row(policy(1, 2))], [row(policy(3), reason=FinishReason.LENGTH)])
    assert (record.lengths, record.sampled, record.sampled_lengths) == ((2, 1), (2, 1), (2, 1))
    assert (record.turns, record.rollouts) == ((1, 1), (0, 1))
    assert record.finish_reasons == (FinishReason.STOP, FinishReason.LENGTH)
    assert (record.group_id, record.prompt_tokens, record.seconds) == (5, 2, 0.5)
    assert (record.replica, record.load) == ("rollout-1", LOAD)
    assert tensors.token_ids.tolist() == [1, 2, 3]
    assert tensors.mask.tolist() == [True] * 3
    assert tensors.logprobs.tolist() == [-0.5] * 3
    assert tensors.prompt_ids.tolist() == [7, 8]


def test_what_an_environment_wrote_is_masked_and_counts_nowhere() -> None:
    record, tensors = packed(
        [row(policy(1, version=2), environment(9, 9), policy(4, 5))], [row(policy(6))]
    )
    assert (record.lengths, record.sampled, record.turns) == ((5, 1), (3, 1), (2, 1))
    assert tensors.mask.tolist() == [True, False, False, True, True, True]
    assert tensors.logprobs.tolist() == [-0.5, 0.0, 0.0, -0.5, -0.5, -0.5]
    assert record.version_spans[0] == (VersionSpan(2, 1), VersionSpan(3, 2))
    assert record.oldest_version == 2


def test_a_rollout_of_several_rows_is_one_rollout() -> None:
    """Its history was rendered anew: the second row repeats what the first one trains."""
    record, tensors = packed(
        [row(policy(6))],
        [row(policy(1)), row(environment(1, 9), policy(2, 3), reason=FinishReason.TURNS)],
    )
    assert record.rollouts == (0, 1, 1)
    assert record.lengths == tensors.lengths == (1, 1, 4)
    assert (record.sampled, record.sampled_lengths, record.turns) == ((1, 1, 2), (1, 3), (1, 2))
    assert record.finish_reasons == (FinishReason.STOP, FinishReason.TURNS)
    assert tensors.token_ids[tensors.completion(2)].tolist() == [1, 9, 2, 3]
    assert tensors.mask[tensors.completion(2)].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        ([[]], "rollout 0 has no tokens"),
        ([[row(Segment((1, 2), [-1.0], (VersionSpan(0, 2),)))]], "log-probs for 1"),
        ([[row(Segment((1, 2), [-1.0] * 2, (VersionSpan(0, 1),)))]], "version labels for 1"),
        ([[row(Segment((1,), None, (VersionSpan(0, 1),)))]], "environment's 1 tokens have"),
        ([[row(environment(1))]], "wrote none of its tokens"),
    ],
)
def test_what_does_not_fit_is_refused(rollouts: list[list[Completion]], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"group 5: .*{message}"):
        packed(*rollouts)


def test_what_a_limit_cut_is_truncated() -> None:
    cut = {reason for reason in FinishReason if reason.truncated}
    assert cut == set(FinishReason) - {FinishReason.STOP, FinishReason.ERROR}
