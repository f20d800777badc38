"""Whatever comes in, a result or one line comes out: a part of what `make fuzz` tries, the same
each time, and the inputs that once did not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aligntune.errors import UserError, printable
from tests.fuzz.inputs import KINDS
from tests.fuzz.leftovers import copied_run, gone_on_with
from tests.fuzz.trial import NotRight, Refused, kind_of, one_line, outcome

PART = 12  # of each kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_gives_a_result_or_one_line(kind: str, tmp_path: Path) -> None:
    for number in range(PART):
        folder = tmp_path / str(number)
        folder.mkdir()
        line, defect = outcome(KINDS[kind][0], f"{kind} 0 {number}", folder)
        assert defect is None, f"{kind} 0 {number}: {line}\n{defect}"


def test_a_traceback_a_lost_row_and_a_long_message_are_seen(tmp_path: Path) -> None:
    def breaks(dice: random.Random, folder: Path) -> Refused | None:
        raise KeyError("x")

    def says_too_much(dice: random.Random, folder: Path) -> Refused | None:
        return one_line(RuntimeError("a\nb"))

    assert "KeyError" in (outcome(breaks, "s", tmp_path)[1] or "")
    assert "several lines" in (outcome(says_too_much, "s", tmp_path)[1] or "")
    for message in ("", "\x1b[2J", "a" * 2000):
        with pytest.raises(NotRight):
            one_line(RuntimeError(message))


@pytest.mark.slow
def test_a_run_directory_that_nothing_happened_to_comes_to_where_ray_starts(tmp_path: Path) -> None:
    config = copied_run(tmp_path / "run")
    assert gone_on_with(tmp_path / "run", config, "auto") is None


def test_a_message_with_keys_that_no_terminal_shows_is_one_line() -> None:
    odd = "a\nb\x00\ud800\u202e\u2028é😀"
    assert str(UserError(f"{odd}: no key")) == "a\\nb\\x00\\ud800\\u202e\\u2028é😀: no key"
    assert printable("as it is") == "as it is"
    one_line(UserError(odd))


def test_messages_that_differ_by_the_input_are_one() -> None:
    assert kind_of("/a/b.yaml:3: 'x' is 12") == kind_of("/c.yaml:4: 'yy' is -1.5e3")
