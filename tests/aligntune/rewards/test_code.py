"""The code reward: what passes, what does not, and tricks that must not."""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import pytest

from actors.sandbox import Ran, SandboxFailed, SandboxMissing, bubblewrap
from actors.scoring.criteria import Unreached
from aligntune.rewards.code import code_passes, program_of, read_tests

ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
ECHO = [{"input": "1 2\n", "output": "3"}, {"input": "5 5", "output": "10\n"}]


def score(completions: list[str], tests: Any, **options: Any) -> list[float]:
    rows = [tests] * len(completions)
    return asyncio.run(code_passes(list(completions), tests=rows, **options))


@pytest.mark.slow
def test_programs_are_scored_by_their_tests_many_at_once() -> None:
    fenced = f"I think:\n```python\nnonsense(\n```\nno, rather\n```python\n{ADD}```\nDone."
    wrong = ADD.replace("+", "-")
    assert score([ADD, fenced, wrong, "", "I do not know"], ASSERTS) == [1, 1, 0, 0, 0]
    assert score([ADD], "\n".join(ASSERTS)) == [1]


@pytest.mark.slow
def test_programs_are_scored_by_what_they_print_for_their_input() -> None:
    good = "print(sum(map(int, input().split())))"
    assert score([good, "print(3)", "print(4)"], ECHO) == [1, 0, 0]
    assert score(["print(3)"], ECHO, partial=True) == [0.5]
    inputs = {"inputs": ["1 2\n", ["5 5"]], "outputs": ["3", ["10"]]}
    assert score([good], inputs) == [1]
    assert score([good], json.dumps(inputs)) == [1]


@pytest.mark.slow
def test_a_share_of_the_asserts_counts_where_that_is_asked_for() -> None:
    half = "def add(a, b):\n    return 3\n"
    assert score([half], ASSERTS) == [0]
    assert score([half], ASSERTS, partial=True) == [0.5]


@pytest.mark.parametrize("place", ["create_subprocess_exec", "to_thread"])
@pytest.mark.parametrize(
    "trouble", [BlockingIOError(errno.EAGAIN, "no process"), RuntimeError("can't start new thread")]
)
def test_a_machine_without_room_for_a_program_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception, place: str
) -> None:
    async def no_room(*_: Any, **__: Any) -> Any:
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, place, no_room)
        with pytest.raises(Unreached, match="no process could be started"):
            score([ADD], ASSERTS)


@pytest.mark.parametrize(("partial", "runs"), [(False, 2), (True, 10)])
def test_no_input_is_given_to_a_program_that_has_failed_unless_a_share_counts(
    monkeypatch: pytest.MonkeyPatch, partial: bool, runs: int
) -> None:
    given = []

    async def counted(*command: Any, **options: Any) -> Ran:
        given.append(options["stdin"])
        return Ran(0, b"0", b"")

    monkeypatch.setattr("aligntune.rewards.code.run", counted)
    pairs = [{"input": str(n), "output": str(n)} for n in range(10)]
    assert score(["print(0)"], pairs, partial=partial) == [0.1 if partial else 0.0]
    assert len(given) == runs


READ = """
import json, os
word, tests = json.loads(os.read(3, 10**6))
os.write(4, (word + json.dumps([True] * len(tests))).encode())
os._exit(0)
"""
LOADED = """
import json
load = json.load
json.load = lambda file: (lambda word, tests: (word, ["pass"] * len(tests)))(*load(file))
"""
READ_ON = """
import json, os
def say(said):
    for fd in range(3, 10):
        try: os.write(fd, json.dumps(said).encode() + b"\\n")
        except OSError: pass
def hear():
    for fd in range(3, 10):
        try: return json.loads(os.read(fd, 10**6))
        except OSError: pass
say(["ran"])
"""
PASSED = """
while True:
    say([hear()[0], True, ""])
"""
SAID = """
while True:
    word = hear()[0]
    for number in range(9):
        say(["value", number, "null"]); hear()
    say([word, True, "null"])
"""
SAME = "class Same:\n    __eq__ = lambda *_: True\ndef add(a, b):\n    return Same()"
PATCHED = """
import builtins, json, operator
json.loads = json.load = lambda *_: ["word", ["pass"] * 9]
json.dumps = json.JSONEncoder.encode = lambda *_: '["ran"]'
builtins.exec = builtins.compile = operator.index = lambda *_: 3
import __main__
for name in dir(__main__):
    setattr(__main__, name, lambda *_: True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tests", ["ASSERTS", "CALLS"])
@pytest.mark.parametrize("trick", [READ, LOADED, READ_ON + PASSED, READ_ON + SAID, SAME, PATCHED])
def test_a_program_without_a_solution_does_not_pass(trick: str, tests: str) -> None:
    """However it talks in place of the harness: what is wanted is not in its process."""
    assert score([trick], globals()[tests], cpu_seconds=1.0, wall_seconds=5.0) == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "trick",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def add(a, b):\n    import os; os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
        "print('[true, true]')",
        "import os\nfor fd in range(3, 10):\n    try: os.write(fd, b'[true, true]')\n"
        "    except OSError: pass\nos._exit(0)",
        "import os; os.kill(os.getppid(), 9)",
        "def add(a, b):\n    while True: pass",
        "def add(a, b):\n    return add(a, b)",
        "import builtins; builtins.AssertionError = 1 / 0",
    ],
)
def test_a_program_that_ends_before_its_tests_has_not_passed_them(trick: str) -> None:
    assert score([trick], ASSERTS, cpu_seconds=1.0) == [0]


CALLS = {"fn_name": "add", "inputs": [[1, 2], [-1, 1]], "outputs": [3, [0]]}
METHOD = "class Solution:\n    def add(self, a: List[int], b: int):\n        return a + b\n"
BOTH = "def add(a, b):\n    return (a, {b: b})\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "tests", "share"),
    [
        (ADD, CALLS, 1),
        (ADD, json.dumps(CALLS), 1),
        (METHOD, CALLS, 1),
        (ADD.replace("+", "-"), CALLS, 0),
        ("def add(a, b):\n    return 3\n", CALLS, 0.5),
        ("print(3)", CALLS, 0),
        ("class Same:\n    __eq__ = lambda *_: True\ndef add(a, b):\n    return Same()", CALLS, 0),
        (BOTH, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[1, {"2": 2}]]}, 1),
        (BOTH, {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[[1, {"2": 2}]]]}, 1),
        ("def add(a, b):\n    return a", {**CALLS, "outputs": [[1, 2], [-1]]}, 0.5),
        (
            ADD,
            {"fn_name": "add", "inputs": ['"a"\n"b"', "[1]\n[2]"], "outputs": ['"ab"', "[1, 2]"]},
            1,
        ),
        (ADD, {"fn_name": "add", "inputs": [["{x}'", '"\\n']], "outputs": ["{x}'\"\\n"]}, 1),
    ],
)
def test_programs_are_scored_by_what_a_function_returns_as_apps_has_it(
    program: str, tests: Any, share: float
) -> None:
    assert score([program], tests, partial=True) == [share]


@pytest.mark.parametrize(
    "tests",
    ["", [], {}, {"inputs": ["1"], "outputs": []}, [1], 5, ["", "x"]]
    + [{**CALLS, "inputs": inputs} for inputs in ([], [[1, 2]], [1, 2], ["a", "b"])],
)
def test_a_row_without_tests_is_refused_with_the_column(tests: Any) -> None:
    with pytest.raises(ValueError, match="no tests in column 'tests'"):
        read_tests(tests, "tests")


def test_the_program_is_the_last_fenced_block_or_the_whole_text() -> None:
    assert program_of("x = 1") == "x = 1"
    assert program_of("```\nx\n```") == "x\n"
    assert program_of("```py\nx = 1\n```\n```python\ny = 2\n```") == "y = 2\n"
    assert program_of("```python\nx = 1") == "x = 1"


PYTHON, BASH, OUTPUT = "```python\nx = 1\n```", "```bash\npython x.py\n```", "```\n3\n```"


@pytest.mark.parametrize(
    "text",
    [
        f"{PYTHON}\n{BASH}\nIt prints 3.",
        f"{BASH}\nwhere\n{PYTHON}\nis x.py.",
        f"{PYTHON}\nIt prints\n{OUTPUT}\nDone.",
        f"```text\nfirst a plan\n```\n{PYTHON}\nDone.",
        f"{PYTHON}\n```c++ title=x\nint x;\n```\nDone.",
        f"Use ```x``` or ```y``` here:\n{PYTHON}",
        f"1. {PYTHON}\n2. {BASH}",
        "```` python\nx = 1\n````\n```bash\nls\n```\nDone.",
        PYTHON.replace("\n```", "```") + f"\n{BASH}",
        f"{PYTHON} Done.\n{BASH}\nDone.",
        f"  {PYTHON}\n{BASH}".replace("\n```", "\n  ```"),
    ],
)
def test_blocks_of_other_languages_and_prose_are_no_program(text: str) -> None:
    assert program_of(text).strip() == "x = 1"
    assert program_of(text.replace("\n", "\r\n")).strip() == "x = 1"


def test_a_mark_within_a_line_of_the_program_does_not_end_it() -> None:
    inside = 'x = "```python"  # or ``` and\n'
    assert program_of(f"```python\n{inside}```") == inside
    assert program_of("```bash\nls\n```\nnothing") == "```bash\nls\n```\nnothing"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    ["`" * 400_000, "``` " * 100_000, "```" + " " * 400_000 + "`", "```\n" + "```` x" * 100_000,
     "```\n" + " " * 400_000, "```\n" * 100_000, "```x\n" + ("``` " + " " * 99 + "x") * 9000],
    ids=["marks", "spaced", "blank", "inside", "open", "pairs", "blanks behind"],
)  # fmt: skip
def test_a_degenerate_completion_is_read_at_once(text: str) -> None:
    program_of(text)


def test_a_sandbox_that_is_required_and_missing_is_a_failure_and_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ALIGNTUNE_SANDBOX", "required")
    monkeypatch.setattr("actors.sandbox.bubblewrap", lambda: (None, "bwrap is not installed"))
    with pytest.raises(SandboxMissing):
        score([ADD], ASSERTS)


def test_a_sandbox_that_fails_is_a_failure_and_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    program = bubblewrap()[0]
    if program is None:
        pytest.skip(bubblewrap()[1])
    broken = [program, "--ro-bind", "/no/such", "/x", "--"]
    monkeypatch.setattr("actors.wrapping.wrapped", lambda *_, **__: broken)
    for tests in (ASSERTS, ECHO):
        with pytest.raises(SandboxFailed, match="Can't find source path /no/such"):
            score([ADD], tests)
