"""Asserts and calls as tests of a program: what leaves the text, and what a talk counts."""

from __future__ import annotations

import asyncio
import json

import pytest

from aligntune.rewards.code import code_passes
from aligntune.rewards.unit_tests import Exam, asserted

PROGRAM = """
from collections import Counter, namedtuple
from collections import ChainMap, UserList, UserString
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
Point = namedtuple("Point", "x y")
Kind = IntEnum("Kind", "ONE TWO")
class Number:
    __index__ = lambda self: 7
class Vector:
    def __init__(self, *parts):
        self.parts = parts
    def __eq__(self, other):
        return self.parts == tuple(other)
    def __add__(self, other):
        return Vector(*(a + b for a, b in zip(self.parts, other.parts)))
class Less:
    __abs__ = lambda self: self
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__ = lambda *_: True
def same(value):
    return value
"""
HOLDS = [
    "assert same((1, [2.5, {'a': {3}}], 'é\\ud83d')) == (1, [2.5, {'a': {3}}], 'é\\ud83d')",
    "assert same(b'ab') == b'ab' and same(1) == 1",
    "assert same({(1, 2): frozenset('ab'), 3: 1j}) == {(1, 2): frozenset('ab'), 3: 1j}",
    "assert Counter('aab') == {'a': 2, 'b': 1}, 'counted'",
    "assert [Point(1, 2)] == [(1, 2)]",
    "assert 2 == Kind.TWO",
    "assert Fraction(1, 2) == 0.5",
    "assert {'a': 1}.keys() == {'a'}",
    "assert set(same([1, 2, 2])) == set([1, 2])",
    "assert same(10 ** 5000) > 0 < same(10 ** 2000)",
    "assert 'a' < same('b' * 90_000)",
    "assert [] < same([1] * 9000)",
    "assert Decimal(12345678901234567891) == 12345678901234567891",
    "assert [same(Fraction(3 * 10**20 + 1))] == [300000000000000000001]",
    "assert same(Decimal('inf')) == float('inf')",
    "assert [same(UserList([1])), UserString('a'), ChainMap({1: 2})] == [[1], 'a', {1: 2}]",
    "assert same(memoryview(b'ab')) == b'ab'",
    "assert Vector(1, 2) == (1, 2) == Vector(0, 1) + Vector(1, 1)",
    "assert [Vector(1, 2)] == [(1, 2)]",
    "import numpy as np\nassert np.float32(0.1) == 0.1 == np.float32(0.1)",
    "import numpy as np\nassert [same(np.float32(0.1)), same(np.float16(0.1))] == [0.1, 0.1]",
    "import numpy as np\nassert np.float32(0.1) in (1e300, 0.1)\nassert np.bool_(1) == True",
    "import numpy as np\nassert np.zeros(2, int).dtype == 'int64'",
    "assert 0 < same(0.5) <= 1.0 < float('inf')",
    "assert abs(same(0.1 + 0.2) - 0.3) < 1e-9",
    "assert same(None) is None",
    "assert same(3) in (1, 2, 3)",
    "assert 3 in same(range(5))",
    "assert same(Number()) is not None",
    "assert same(Number()) != 3",
    "assert same([1]) == sorted([1])",
    "assert same(same) == same",
    "for n in range(3):\n    assert same(n) == n\n    assert same(True) == True",
    "def check(tried):\n    assert tried(1) == 1\n    assert tried(2) == 2\ncheck(same)",
    "try:\n    assert same(1) == 2\nexcept AssertionError:\n    pass",
    "text = 'a'\nassert text * 3 == 'aaa'\nassert not same(0)",
    f"assert same('x' * 40_000) == {'x' * 40_000!r}",
]
FAILS = [
    "assert same(1) == 2",
    "assert same((1, 2)) == [1, 2]",
    "assert same(Less()) == 1",
    "assert [same(Less())] == [1]",
    "assert abs(same(Less())) < 3",
    "assert same(Less()) in (1, 2)",
    "assert Decimal(12345678901234567890) == 12345678901234567891",
    "import numpy as np\nassert same(np.float32(0.1)) == 0.1001",
    "assert same(1) is None",
    "assert same('1') == 1",
    "assert same(1) < 'a'",
    "assert 1 == same(1)\nassert same(1) == 2",
    "def check(candidate):\n    assert candidate(Less()) == 1\ncheck(same)",
    "assert same('x' * 100_000) == 'x'",
    "assert nothing(1) == 1",
    "assert same(1) ==",
]


@pytest.mark.slow
def test_asserts_mean_what_they_meant_and_no_result_decides_that_it_is_equal() -> None:
    async def score() -> list[float]:
        rows = [[text] for text in HOLDS + FAILS] + [HOLDS + FAILS]
        return await code_passes([PROGRAM] * len(rows), tests=rows, partial=True)

    *shares, together = asyncio.run(score())
    texts = HOLDS + FAILS
    assert [text for text, share in zip(texts, shares, strict=True) if share] == HOLDS
    assert together == len(HOLDS) / len(texts)


@pytest.mark.parametrize(
    ("text", "left", "needed"),
    [
        ("assert f(1) == 417", 1, 1),
        ("assert 417 == f(1), f(2)", 1, 1),
        ("assert f(1) == (417, -1)\nassert abs(f(2) - 1) < float(417)", 2, 2),
        ("def check():\n    assert f(1) == 417\nassert f(2) == 417\ncheck()", 2, 1),
        ("assert f(1)", 0, 0),
        ("assert f(1) == g(1)", 0, 0),
        ("assert f(1) != 4", 0, 0),
        ("assert 0 <= f(1) < 4", 0, 0),
        ("assert abs(f(1)) > 4", 0, 0),
        ("assert 4 < abs(f(1))", 0, 0),
        ("assert -V(1) == 4", 0, 0),
        ("assert [m.V(1) + f(1)] == [4]", 0, 0),
        ("assert f(1).dtype == 'int8'", 0, 0),
        ("assert f(1).dtypes['a'] == 'int8'", 0, 0),
        ("v = V(1)\nw = v + f(1)\nassert v == 4\nassert w == 4", 0, 0),
        ("assert V(1).f(2) == 417", 1, 1),
        ("s = Solution()\nassert s.f(2) == 417", 1, 1),
        ("assert 4 in f(1)", 0, 0),
        ("assert f(1) is 'a'", 0, 0),
        ("assert 1 == 1", 0, 0),
        ("for n in (1, 2):\n    assert f(n) == 1", 0, 0),
        ("assert f(1) ==", 0, 0),
        ("assert f(" + "(" * 500, 0, 0),
    ],
)
def test_literals_that_one_value_is_compared_with_leave_the_text(
    text: str, left: int, needed: int
) -> None:
    test = asserted(text)
    assert "417" not in test.text
    assert (len(test.checks), test.needed) == (left, needed)
    assert (test.text == text) == (left == 0)


def talk(
    *said: object, tests: tuple[str, ...] = ("assert f() == 1\npass", "assert f()")
) -> list[bool]:
    """The verdicts after `said`; WORD stands for that of the test that was given last."""
    exam, word = Exam([asserted(text) for text in tests]), ""
    for one in said:
        line = one if isinstance(one, bytes) else json.dumps(one).replace("WORD", word).encode()
        answer = exam.answer(line)
        if answer is None:
            break
        if isinstance(given := json.loads(answer), list):
            word = given[0]
    return exam.verdicts


ONE, PASSED = ["value", 0, "1"], ["WORD", True, ""]


@pytest.mark.parametrize(
    ("said", "verdicts"),
    [
        ([["ran"], ONE, PASSED, PASSED], [True, True]),
        ([["ran"], ONE, ["WORD", False, "1"], PASSED], [False, True]),
        ([["ran"], PASSED, PASSED], [False, True]),
        ([["ran"], ["WORD", True, "1"], ["WORD", True, "1"]], [False, True]),
        ([["ran"], ONE, ["WORD", True], PASSED], [False, False]),
        ([["ran"], ["value", 0, "2"], PASSED, PASSED], [False, True]),
        ([["ran"], ["value", 1, "1"], PASSED, PASSED], [False, True]),
        ([["ran"], ["value", -1, "1"], PASSED, PASSED], [False, True]),
        *(
            ([["ran"], ["value", 0, text], PASSED, PASSED], [False, True])
            for text in ("", "{}", '{"set": [[]]}', '{"tuple": 5}', '{"bytes": "x"}', '{"x": 1}',
                         '{"complex": ["1+"]}', f'{{"complex": [{10**400}, 0]}}',
                         "[" * 9000, "9" * 1050, '{"bytes": 1}', '{"ratio": [1, 0]}',
                         '{"ratio": ["1e999999999"]}', '{"float": [3, 1]}')
        ),
        ([["ran"], ONE, PASSED], [False, False]),
        ([["ran"], ONE, PASSED, ["", True, ""]], [False, False]),
        ([["ran"], ONE, ["word", True, ""], PASSED, PASSED], [False, False]),
        ([["ran"], ["ran"], ONE, PASSED, PASSED], [False, False]),
        ([["", True, ""], ["", True, ""]], [False, False]),
        ([PASSED, PASSED], [False, False]),
        ([ONE, ["ran"], PASSED, PASSED], [False, False]),
        ([["ran"], ONE, b"no JSON", PASSED, PASSED], [False, False]),
        ([["ran"], ONE, b"[" * 9000, PASSED, PASSED], [False, False]),
        ([["ran"], ["value", "0", 1], PASSED, PASSED], [False, False]),
        ([["ran"], None, PASSED, PASSED], [False, False]),
    ],
)  # fmt: skip
def test_a_verdict_counts_for_a_test_that_was_given_and_whose_values_hold(
    said: list[object], verdicts: list[bool]
) -> None:
    assert talk(*said) == verdicts


@pytest.mark.parametrize(
    ("said", "verdicts"),
    [
        ([["WORD", True, "1"], ["WORD", True, "3"]], [True, False]),
        ([["WORD", False, "1"], ["value", 0, "2"], ["WORD", True, "3"]], [False, True]),
        ([["WORD", True, ""], ["value", 1, "3"], ["WORD", True, "2"]], [False, False]),
    ],
)
def test_the_value_that_a_test_ends_with_comes_with_its_verdict(
    said: list[object], verdicts: list[bool]
) -> None:
    tests = ("assert f() == 1", "assert f() == 2\nassert f() == 3")
    assert talk(["ran"], *said, tests=tests) == verdicts


@pytest.mark.slow
def test_each_assert_takes_one_line_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[bytes] = []
    answer = Exam.answer
    monkeypatch.setattr(Exam, "answer", lambda exam, line: lines.append(line) or answer(exam, line))
    tests = [f"assert same({n}) == {n}" for n in range(20)]
    calls = {"fn_name": "same", "inputs": [[1], [2]], "outputs": [1, 2]}
    together = "\n".join(tests)
    rows = [tests, calls, [together]]
    assert asyncio.run(code_passes([PROGRAM] * 3, tests=rows)) == [1.0] * 3
    assert len(lines) == 3 + 20 + 2 + 20
