"""Rewards for mathematical answers, read and compared by math-verify.

Invariant: what stands in the answer's place counts, never a number of the thinking, and what cannot
be read or compared within its processor time scores 0, whatever else runs on the machine.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import cache
from typing import Any

from math_verify import parse, verify

from actors.scoring.said import Completion, text_of, without_thoughts
from aligntune.rewards.inputs import column_of
from aligntune.rewards.limited import TooSlow, judged

ANCHOR_CHARACTERS = 50  # between the word answer and the number that it announces
ANSWER_SECONDS = 1.0  # of processor time, to read a completion's answer and compare it
EXPECTED_SECONDS = 10.0  # to read the column's

_DELIMITED = re.compile(r"\\boxed|\\\(|\\\[|\$[^$]+\$")
_WORD = re.compile(r"[A-Za-z]{2,}")
_SPACED_DIGITS = re.compile(r"(?<=\d)(?:\\[,! ]|\{,\})(?=\d{3}(?!\d))")  # 12\,345 and 1{,}234
_EMPHASIS = re.compile(
    r"(?<![\w*])(?:(\*{2,3})(?=\S)([^*\n]*?\S)\1(?!\*)|\*(?=\S)([^*\n]*?\S)\*(?![\w*]))"
)
_TIGHT_COLON = re.compile(r"(?<=[A-Za-z]:)(?=[-+$(\\]*\d)")  # Answer:12
_ANSWER_WORD = re.compile(r"(?i)\banswers?\b")
_INTEGER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
_NUMBER = rf"(?:[-+]\s?)?\$?(?:(?:{_INTEGER})(?:\.\d+)?(?:\s?/\s?\d+)?|\.\d+)"
_PLAIN = re.compile(rf"{_NUMBER}\s*\\?%?")
_ITEM = re.compile(rf"\s*({_NUMBER})\s*")
# Numbers with commas between. In prose, "in 2023, 5" is none. A group of thousands is a part like
# others: a choice of readings would double the steps with each group of a list that ends in a word.
_PART = r"(?:[-+]\s?)?\$?(?:\d+(?:\.\d+)?(?:\s?/\s?\d+)?|\.\d+)"
_TIGHT_LIST = re.compile(rf"(?<![\w.,/])({_PART}(?:,{_PART})+)(?![\w/]|\.\d|,\d)")
_LIST = re.compile(rf"(?<![\w.,/])({_PART}(?:\s?,\s?(?:and\s)?{_PART})+)(?![\w/]|\.\d|,\d)")
_ANY_NUMBER = re.compile(r"\d+")
_ALONE_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}")
_FORMULA = re.compile(r"\$[^$]+\$")
# A number with nothing near that could make it a part of an expression, a unit or a share.
_ALONE = re.compile(
    rf"(?<![^\s])(?<![-+*/^\u00d7\u00f7(]\s)[-+]?\$?(?:{_INTEGER})(?:\.\d+)?"
    r"(?=[.,;:!?]?(?:\s+[A-Za-z]{2,}|\s*$|\s*\n))"
)
_JOINED = re.compile(r"[\d)]\s+$")  # "5 -3": what stands before makes the sign an operator
_PRICE = re.compile(r"(?<!\\)\\\$(?=\s?\.?\d)")  # \$12
# After an operator or a number, brackets are of a product or of a footnote.
_BRACKETED = re.compile(
    rf"(^|[A-Za-z]{{2}}\s|[:=]\s?|\n)[(\[{{]\s?((?:[-+]\s?)?{_NUMBER})\s?[)\]}}](?=[.,;:!?]*(?:\s|$))"
)
_QUOTED = re.compile(
    rf"(?<![^\s(:=])[`'\"\u2018\u201c]+({_NUMBER}\s?%?)([.,]?)[`'\"\u2019\u201d]+"
    r"(?=[.,;:!?)]*(?:\s|$))"
)
_SENTENCE_END = re.compile(r"(?<=\d)\.(?=\s|$)")  # math-verify reads "5/3." as 5/3.0, no fraction
_HEADING = re.compile(r"[*_`\s]*(?:\d+[.):]\s+)?[*_`]*[A-Za-z]{2,}")
_NUMBERED_HEADING = re.compile(r"[*_`\s]*\d+[.):]\s+[*_`]*[A-Za-z]{2,}")


def math_equal(
    completions: list[Completion], *, column: str = "answer", **columns: Any
) -> list[float]:
    r"""1 where the completion's final answer equals the column's mathematically; else 0.

    Range: 0 or 1.
    Formula: math-verify's `verify` of the two answers, within a second of processor time.
    Source: math-verify.

    What stands before the last `</think>` and after an open `<think>` is no answer. The answer of
    a completion is in its last `<answer>...</answer>`, else its `\boxed{...}`, else it is what
    follows its last `####` on that line (none that begins a heading, as `#### Step 1: add`), else
    what follows the word answer, else the last formula or number. Numbers with commas between are a
    list, whose order is free, unless the commas separate thousands. The column may hold a bare
    answer (number, list, LaTeX, expression), a solution that ends in `\boxed{...}`, or one that
    ends in `#### 42` as in GSM8K. A completion without a readable answer scores 0, as does one that
    takes over a second of processor time.

    Raises:
        ValueError: there is no such column, or its value has no readable answer.
    """
    values = [str(value) for value in column_of(columns, column)]
    scores = [0.0] * len(completions)
    for value in dict.fromkeys(values):
        rows = [row for row, own in enumerate(values) if own == value]
        places = [answer_place(text_of(completions[row])) for row in rows]
        for row, score in zip(rows, _score(value, places, column), strict=True):
            scores[row] = score
    return scores


def answer_place(text: str) -> str:
    """The part of a completion that its answer is read from, lists marked as such."""
    written = without_thoughts(text)
    if "<answer>" in written:
        written = written.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return _marked(_final_part(written))


def answer_of(text: str) -> str:
    r"""The answer of a completion as text, to count equal ones: numbers in lowest terms (0.5 and
    1/2 are one), else the last `\boxed{...}` or formula, else the last number. Empty: none."""
    place = answer_place(text)
    numbers = plain_numbers(place)
    if numbers is None:
        boxed, last = place.rpartition("\\boxed{")[1:]
        marks = [_last(_FORMULA, place), _last(_ALONE_NUMBER, place)]
        there = max(filter(None, marks), key=re.Match.end, default=None)
        found = _balanced(last) if boxed else there[0] if there else ""
        numbers = plain_numbers(found.strip("$ "))
        if numbers is None:
            return " ".join(found.split())
    return ", ".join(map(str, sorted(numbers)))


def _balanced(text: str) -> str:
    """`text` up to the brace that closes one that was open before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return text


def _final_part(text: str) -> str:
    """What follows the last `####` that marks an answer, on its line; the whole text where a box or
    no such mark is. A heading of Markdown marks none, but on the last line: `#### Total: 18`."""
    text = _SPACED_DIGITS.sub("", _PRICE.sub("", text.replace("\u2212", "-")))
    if "\\boxed" in text:
        return text
    for number, part in enumerate(reversed(text.split("####")[1:])):
        line, _, rest = part.lstrip("#").strip().partition("\n")
        last = number == 0 and not rest and not _NUMBERED_HEADING.match(line)
        if last or not _HEADING.match(line):
            return line
    return text


def _marked(text: str) -> str:
    """`text` as math-verify sees the answer in it: no emphasis, a blank before a number, and the
    list that is the answer in a box."""
    if _DELIMITED.search(text):
        return text
    if len(plain_numbers(text) or ()) > 1:
        return f"\\boxed{{{text.strip().rstrip('.')}}}"
    text = _QUOTED.sub(r"\1\2", _EMPHASIS.sub(lambda m: m[2] or m[3], text))
    text = _TIGHT_COLON.sub(" ", _BRACKETED.sub(r"\1\2", text))
    counts, found = _anchored(text) or (_last(_ANY_NUMBER, text), _last(_TIGHT_LIST, text))
    if counts is None:
        return text
    if found and found.start() <= counts.start() < found.end():
        return f"\\boxed{{{found[1].replace('and ', '')}}}"
    for alone in _ALONE.finditer(text):
        if alone.start() <= counts.start() < alone.end():
            signed = not alone[0][0].isdigit() and _JOINED.search(text, 0, alone.start())
            return _sentence(text) if signed else alone[0]
    return _sentence(text)


def _sentence(text: str) -> str:
    """`text` behind a blank, without full stops that would belong to a number."""
    if plain_numbers(text) is not None:
        return f" {text.strip().rstrip('.')}"
    return f" {_SENTENCE_END.sub(',', text)}"


def _anchored(text: str) -> tuple[re.Match[str], re.Match[str] | None] | None:
    """The first number after the last word "answer" that has one near, and the list there."""
    for word in reversed(list(_ANSWER_WORD.finditer(text))):
        line = text.find("\n", word.end())
        end = word.end() + ANCHOR_CHARACTERS
        number = _ANY_NUMBER.search(text, word.end(), end if line < 0 else min(end, line))
        if number:
            return number, _LIST.search(text, word.end())
    return None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return max(pattern.finditer(text), key=re.Match.start, default=None)


def _score(value: str, places: list[str], column: str) -> list[float]:
    """The scores of completions whose answers are in `places`, for one value of the column."""
    expected = _expected_forms(value)
    plain = plain_numbers(expected[-1]) if expected else None
    scores: list[float | None] = [_plainly(plain, plain_numbers(place)) for place in places]
    rest = [place for place, score in zip(places, scores, strict=True) if score is None]
    if not rest:
        return [float(score or 0.0) for score in scores]
    _warm()
    try:
        verdicts = judged(
            lambda: _read_expected(expected),
            lambda answer, place: _equal(answer, _parse(place)),
            rest,
            EXPECTED_SECONDS,
            ANSWER_SECONDS,
        )
    except TooSlow as error:
        raise ValueError(f"column {column!r} holds {value!r}: {error}") from error
    if verdicts is None:
        raise ValueError(f"column {column!r} holds {value!r}, in which math-verify finds no answer")
    found = iter(verdicts)
    return [float(next(found)) if score is None else score for score in scores]


def _plainly(
    expected: tuple[Fraction, ...] | None, got: tuple[Fraction, ...] | None
) -> float | None:
    """The score where both sides are nothing but numbers and leave no doubt; else None."""
    if expected is None or got is None:
        return None
    if sorted(expected) == sorted(got):
        return 1.0
    exact = all(number.denominator == 1 for number in (*expected, *got))
    return 0.0 if exact or len(expected) != len(got) else None  # 0.333333 equals 1/3 to 6 digits


def plain_numbers(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of a text that is one number or a list of them, in a box or not; else None."""
    text = text.strip().rstrip(".")
    if text.startswith("\\boxed{") and text.endswith("}"):
        text = text.removeprefix("\\boxed{")[:-1]
    numbers, start = [], 0
    if len(text) > 1000:
        return None
    while match := _ITEM.match(text, start):
        digits = re.sub(r"[\s,$]", "", match[1])
        try:
            numbers.append(Fraction(digits))
        except (ValueError, ZeroDivisionError):
            return None
        if match.end() == len(text):
            return tuple(numbers)
        if text[match.end()] != ",":
            return None
        start = match.end() + 1
    return None


def _expected_forms(value: str) -> list[str]:
    """The forms in which the column's value may be read, the first that can be counts."""
    text = _final_part(value).strip()
    if not text:
        return []
    boxed = text if "\\boxed" in text else f"\\boxed{{{text}}}"
    numbers = plain_numbers(text)
    one = _PLAIN.fullmatch(text) and (numbers is None or len(numbers) == 1)
    plain = one or ("\\" not in text and _WORD.search(text))
    # Bare LaTeX has to be marked as such: of an undelimited 3\sqrt{2} only the 3 would be read.
    return [text, boxed] if plain or _DELIMITED.search(text) else [boxed]


def _read_expected(forms: list[str]) -> list[Any] | None:
    """The column's value, compared once, so that it is not what makes a comparison slow."""
    answer = next((answer for form in forms if (answer := _parse(form))), None)
    if answer is not None:
        _equal(answer, _parse("\\boxed{1}"))
    return answer


@cache
def _warm() -> None:
    """Have math-verify load what it loads at its first use, so that no completion pays for it."""
    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.ERROR)  # it warns that it has no time limit
    _equal(_parse("\\boxed{\\frac{1}{2}}"), _parse("it is $x^2+\\sqrt{3}$ or 0.5"))


def _parse(text: str) -> list[Any]:
    """The answer in `text` as math-verify has it: expression and string; empty if there is none."""
    try:
        answer: list[Any] = parse(text, parsing_timeout=0, raise_on_error=True)
        return answer
    except Exception:  # noqa: BLE001 - sympy raises anything on what a model writes: no answer there
        return []


def _equal(expected: list[Any], answer: list[Any]) -> bool:
    return any(_pair_equal(left, right) for left in expected for right in answer)


def _pair_equal(expected: Any, answer: Any) -> bool:
    try:
        return bool(verify(expected, answer, timeout_seconds=None, raise_on_error=True))
    except Exception:  # noqa: BLE001 - as above: not shown to be equal
        return False
