"""What a soak calls flat."""

from __future__ import annotations

import pytest

from tests.chaos.soak import Look, by_minute, grown, lived

MIB = 2**20


def looks(first: float, last: float, files: int = 20, until: int = 400) -> list[Look]:
    """Of a life that grows for 100 s from `first` to `last` MiB after it is warm."""
    rise = (last - first) / 100
    return [
        Look(age, int(MIB * (first + rise * min(max(age - 150, 0), 100))), files)
        for age in range(0, until, 5)
    ]


@pytest.mark.parametrize(
    ("last", "told"), [(104.9, []), (105.2, ["policy in 395 s: 100.0 to 105.2 MiB"])]
)
def test_a_twentieth_more_memory_is_too_much(last: float, told: list[str]) -> None:
    life = lived("policy", looks(100, last))
    assert life is not None
    assert [line.partition(",")[0] for line in grown([life])] == told


def test_a_start_may_take_what_it_needs_and_a_short_life_says_nothing() -> None:
    start = [Look(age, MIB * (1 + age), 5 + age) for age in range(60)]
    life = lived("policy", start + looks(100, 100)[18:])
    assert life is not None
    assert grown([life]) == []
    assert lived("policy", looks(100, 200, until=200)) is None


def test_a_role_must_not_grow_from_process_to_process() -> None:
    lives = [lived("reward", looks(size, size)) for size in (100, 103, 106)]
    (told,) = grown([life for life in lives if life is not None])
    assert told.startswith("reward from its first process to its last: 100.0 to 106.0 MiB")


def test_open_files_are_counted() -> None:
    before, after = looks(100, 100)[:60], looks(100, 100, files=23)[60:]
    life = lived("reward", before + after)
    assert life is not None
    assert len(grown([life])) == 1


def test_a_drivers_memory_is_told_minute_by_minute() -> None:
    assert by_minute(looks(100, 150)) == [100, 100, 100, 115, 145, 150, 150]
    assert lived("driver", looks(100, 150)) is None  # it is not warm yet
