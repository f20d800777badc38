"""Rewards for mathematical answers, checked by math-verify.

math-verify limits its own time by an alarm signal, so this runs in a main thread only; the child
process of a reward actor calls it there.
"""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

from aligntune.rewards.inputs import Completion, column_of, text_of

_DELIMITED = re.compile(r"\\boxed|\\\(|\\\[|\$[^$]+\$")
_WORD = re.compile(r"[A-Za-z]{2,}")
_NUMBER = re.compile(r"[-+]?\s*\$?\s*[-+]?\d[\d,]*(\.\d+)?(\s*/\s*\d+)?\s*\\?%?")


def math_equal(
    completions: list[Completion], *, column: str = "answer", **columns: Any
) -> list[float]:
    r"""1 where the completion's final answer equals the column's mathematically; else 0.

    The answer of a completion is its `\boxed{...}`, else what follows its last `####` on that line,
    else the last formula or number. The column may hold a bare answer (number, LaTeX, expression),
    a solution that ends in `\boxed{...}`, or one that ends in `#### 42` as in GSM8K. A completion
    without a readable answer scores 0.

    Raises:
        ValueError: there is no such column, or its value has no readable answer.
        TimeoutError: reading or comparing an answer took math-verify over 5 s: not known to be
            wrong, so not scored.
    """
    values = [str(value) for value in column_of(columns, column)]
    expected = {value: _expected_answer(value, column) for value in set(values)}
    return [
        float(_equal(expected[value], _parse(_final_part(text_of(completion)))))
        for completion, value in zip(completions, values, strict=True)
    ]


def _final_part(text: str) -> str:
    """What follows the last `####` on its line; the whole text where a box or no such mark is."""
    if "\\boxed" in text or "####" not in text:
        return text
    return text.rpartition("####")[2].strip().partition("\n")[0]


def _expected_answer(value: str, column: str) -> list[Any]:
    text = _final_part(value).strip()
    plain = _NUMBER.fullmatch(text) or ("\\" not in text and _WORD.search(text))
    # Bare LaTeX has to be marked as such: of an undelimited 3\sqrt{2} only the 3 would be read.
    forms = [text] if plain or _DELIMITED.search(text) else []
    for form in (*forms, f"\\boxed{{{text}}}"):
        answer = _parse(form) if text else []
        if answer:
            return answer
    raise ValueError(f"column {column!r} holds {value!r}, in which math-verify finds no answer")


def _parse(text: str) -> list[Any]:
    """The answer in `text` as math-verify has it: expression and string; empty if there is none."""
    try:
        answer: list[Any] = parse(text, raise_on_error=True)
        return answer
    except TimeoutException as error:
        raise TimeoutError(f"math-verify could not read {text[-200:]!r} in time") from error
    except Exception:  # noqa: BLE001 - sympy raises anything on what a model writes: no answer there
        return []


def _equal(expected: list[Any], answer: list[Any]) -> bool:
    return any(_pair_equal(left, right) for left in expected for right in answer)


def _pair_equal(expected: Any, answer: Any) -> bool:
    try:
        return bool(verify(expected, answer, raise_on_error=True))
    except TimeoutException as error:
        # Neither side is printed: writing out a huge expression could take for ever.
        raise TimeoutError("math-verify could not compare an answer in time") from error
    except Exception:  # noqa: BLE001 - as above: not shown to be equal
        return False
