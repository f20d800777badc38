"""Messages come out of a pickle as they went in, and take little in it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle

from actors.messages import (
    EpisodesRecord,
    FinishReason,
    GroupRecord,
    GroupSampling,
    GroupWork,
    Prompt,
    ReplicaLoad,
    Sampling,
    Scores,
    VersionSpan,
)
from actors.transcript import Transcript


def crossed(thing: Any) -> Any:
    return pickle.loads(cloudpickle.dumps(thing))


def record(**changes: Any) -> GroupRecord:
    plain: dict[str, Any] = {
        "group_id": 4,
        "prompt_tokens": 5,
        "lengths": tuple(range(100, 108)),
        "finish_reasons": (FinishReason.STOP, FinishReason.LENGTH) * 4,
        "version_spans": tuple((VersionSpan(3, 100 + i),) for i in range(8)),
        "seconds": 1.25,
        "replica": "rollout-0",
        "load": ReplicaLoad(1234.5, 8.0, 0.0, None),
    }
    return GroupRecord(**(plain | changes))


@pytest.mark.parametrize(
    "message",
    [
        record(),
        record(load=None, lengths=(5, 6), sampled=(4, 6), turns=(2,), rollouts=(0, 0)),
        record(episodes=EpisodesRecord({"a": (1.0, None)}, {"turns": 2.0}, (None, 0.5))),
        Sampling(7, 0.5),
        GroupSampling(7, 0.5, 8, 1, 2),
        Scores(4, ("a",), ((None,), (0.5,)), 0.1),
        GroupWork(1, 2, (3,), (True,), (False,), (0.5,), (1.0,), "tensors", turn_weight=0.25),
    ],
)
def test_a_message_comes_out_as_it_went_in(message: Any) -> None:
    assert crossed(message) == message
    assert vars(crossed(message)) == vars(message)


@pytest.mark.slow
@given(
    ids=st.lists(st.integers(0, 2**31 - 1), max_size=9),
    dtype=st.sampled_from([np.int32, np.int64]),
    source=st.one_of(st.text(), st.just([{"role": "user", "content": "Hi"}])),
)
def test_a_prompt_comes_out_as_it_went_in(ids: list[int], dtype: Any, source: Any) -> None:
    rest = np.array(ids, dtype), {"answer": 1}, ({"name": "tool"},), Transcript([], "")
    sent = Prompt(3, source, "text", *rest)
    came = crossed(sent)
    assert came.token_ids.dtype == dtype
    assert came.token_ids.tolist() == ids
    assert came.token_ids.flags.writeable
    assert vars(came) | {"token_ids": 0} == vars(sent) | {"token_ids": 0}


def test_what_crosses_the_driver_for_a_group_of_eight_is_small() -> None:
    prompt = Prompt(3, "10+0", "10+0", np.arange(5, dtype=np.int32), {"answer": "10"})
    sampling = GroupSampling(200, 1.0, 8, 1, 4)
    scores = Scores(4, ("digits",), tuple((i / 7,) for i in range(8)), 0.1)
    sent = [(prompt, sampling), (prompt,)]
    answered = [record(), scores]
    assert sum(len(cloudpickle.dumps(each)) for each in (*sent, *answered)) < 900
