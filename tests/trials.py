"""Trials of rewards in dry runs, of which equal ones are made once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from aligntune.online import first_prompt


@contextmanager
def equal_trials_once() -> Iterator[None]:
    """In here a dry run that tries rewards on what an earlier one tried them on is told the same:
    each trial is a process, and for some rewards it imports sympy."""
    called_once = first_prompt.called_once
    answers: dict[str, dict[str, Any]] = {}

    def once(*asked: Any) -> dict[str, Any]:
        key = repr(asked)  # all of it is plain data: a function of the user's is pickled
        if key not in answers:
            answers[key] = called_once(*asked)
        return answers[key]

    with patch.object(first_prompt, "called_once", once):
        yield
