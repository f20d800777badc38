"""The admission rule and the choice of a batch bound the age of what is trained on."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.online import staleness
from aligntune.online.staleness import Cohort, free_slots


@dataclass(frozen=True)
class OpenGroup:
    group_id: int
    version: int
    ready: bool


def choose_batch(
    groups: Iterable[OpenGroup], version: int, max_staleness: int, groups_per_step: int
) -> list[int] | None:
    """The batch, from groups one by one."""
    of_version: dict[int, list[OpenGroup]] = {}
    for group in groups:
        of_version.setdefault(group.version, []).append(group)
    cohorts = [
        Cohort(admitted, len(own), {group.group_id for group in own if group.ready})
        for admitted, own in of_version.items()
    ]
    return staleness.choose_batch(cohorts, version, max_staleness, groups_per_step)


def by_the_definition(
    groups: Iterable[OpenGroup], version: int, max_staleness: int, groups_per_step: int
) -> list[int] | None:
    """The rule as it is said: group after group, oldest first."""
    oldest_first = sorted(groups, key=lambda g: (g.version, g.group_id))
    batch = [g for g in oldest_first if g.ready][:groups_per_step]
    if len(batch) < groups_per_step:
        return None
    taken = {g.group_id for g in batch}
    left_behind = 0
    for group in oldest_first:
        left_behind += group.group_id not in taken
        if left_behind > (group.version + max_staleness - version) * groups_per_step:
            return None
    return sorted(taken)


@pytest.mark.slow
@given(
    shape=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=24),
    version=st.integers(0, 5),
    staleness=st.integers(0, 4),
    per_step=st.integers(1, 6),
)
def test_counts_of_cohorts_choose_what_the_rule_chooses_group_by_group(
    shape: list[tuple[int, bool]], version: int, staleness: int, per_step: int
) -> None:
    groups = [OpenGroup(i, admitted, ready) for i, (admitted, ready) in enumerate(shape)]
    rule = (version, staleness, per_step)
    assert choose_batch(groups, *rule) == by_the_definition(groups, *rule)


def test_staleness_zero_admits_exactly_one_step() -> None:
    assert free_slots(0, 0, 8, trained=0, in_flight=0) == 8
    assert free_slots(0, 0, 8, trained=0, in_flight=8) == 0
    assert free_slots(3, 0, 8, trained=24, in_flight=0) == 8


def test_a_filtered_group_frees_its_slot() -> None:
    assert free_slots(0, 0, 8, trained=0, in_flight=7) == 1


def test_a_late_group_at_the_age_limit_holds_the_batch_back() -> None:
    groups = [OpenGroup(0, 0, ready=False)] + [OpenGroup(i, 1, ready=True) for i in range(1, 5)]
    assert choose_batch(groups, version=1, max_staleness=1, groups_per_step=4) is None
    ready = [OpenGroup(0, 0, ready=True), *groups[1:]]
    assert choose_batch(ready, version=1, max_staleness=1, groups_per_step=4) == [0, 1, 2, 3]


def test_overtaking_stops_where_those_overtaken_could_no_longer_all_be_trained() -> None:
    late = [OpenGroup(i, 0, ready=False) for i in range(3)]
    newer = OpenGroup(3, 1, ready=True)
    assert choose_batch([*late, newer], version=1, max_staleness=3, groups_per_step=1) is None
    assert choose_batch([*late[1:], newer], version=1, max_staleness=3, groups_per_step=1) == [3]


def test_a_late_group_within_its_age_is_overtaken() -> None:
    groups = [OpenGroup(0, 0, ready=False)] + [OpenGroup(i, 0, ready=True) for i in range(1, 5)]
    assert choose_batch(groups, version=0, max_staleness=1, groups_per_step=4) == [1, 2, 3, 4]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), staleness=st.integers(0, 3), per_step=st.integers(1, 5))
def test_no_group_is_ever_trained_beyond_its_age_and_none_starves(
    seed: int, staleness: int, per_step: int
) -> None:
    """Any order of completion, filtering and steps: age stays bounded and the loop can go on."""
    draw = random.Random(seed)
    groups: dict[int, OpenGroup] = {}
    version = trained = admitted = 0
    for _ in range(60):
        for _ in range(free_slots(version, staleness, per_step, trained, len(groups))):
            groups[admitted] = OpenGroup(admitted, version, ready=False)
            admitted += 1
        batch = choose_batch(groups.values(), version, staleness, per_step)
        if batch is not None and draw.random() < 0.5:
            assert len(batch) == per_step
            assert all(version - groups[g].version <= staleness for g in batch)
            for g in batch:
                del groups[g]
            trained += per_step
            version += 1
            continue
        pending = [g for g in groups.values() if not g.ready]
        if not pending:
            assert batch is not None, "everything is ready and nothing can be trained"
            continue
        group = draw.choice(pending)
        if draw.random() < 0.2:
            del groups[group.group_id]  # filtered or quarantined
        else:
            groups[group.group_id] = OpenGroup(group.group_id, group.version, ready=True)
