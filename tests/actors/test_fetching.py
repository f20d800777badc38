"""Arrays that are gone: all ranks hear of it before one of them begins."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from actors import fetching
from actors.fetching import ArraysLost, fetch_or_lost
from actors.messages import GroupWork
from actors.ranks import TrainedRank


def work(group_id: int, tensors: Any) -> GroupWork:
    return GroupWork(
        group_id=group_id,
        prompt_tokens=1,
        lengths=(1,),
        trained=(True,),
        truncated=(False,),
        advantages=(0.0,),
        scores=(0.0,),
        tensors=tensors,
        reference=None,
        rollouts=(0,),
    )


@pytest.mark.parametrize("of_others", [(), (9,)])
def test_where_one_rank_has_lost_arrays_all_say_so_before_they_begin(
    of_others: tuple[int, ...],
) -> None:
    rank = TrainedRank.__new__(TrainedRank)
    rank._strategy = SimpleNamespace(gather=lambda own: [own, of_others])  # type: ignore[assignment]
    if not of_others:
        assert set(rank._fetch([work(1, "arrays"), work(2, "arrays")])) == {0, 1}
        return
    with pytest.raises(ArraysLost, match="groups 9 are lost") as lost:
        rank._fetch([work(1, "arrays")])
    again = pickle.loads(pickle.dumps(lost.value))
    assert again.groups == (9,)


def test_groups_are_told_apart_by_what_is_left_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def objects(values: Sequence[Any]) -> list[Any]:
        if "gone" in values:
            raise ObjectLostError("0" * 56, None, "")
        return list(values)

    monkeypatch.setattr(fetching, "objects", objects)
    found, lost = fetch_or_lost([work(4, "there"), work(5, "gone"), work(6, "there")])
    assert lost == (5,)
    assert [each.work.group_id for each in found.values()] == [4, 6]
