"""The reward for code: a completion's Python program against tests, in a sandbox.

Invariant: a program that ends before its tests are through has not passed them, however it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from actors.sandbox import Limits, SandboxBusy, run
from actors.scoring.criteria import Unreached
from actors.scoring.said import Completion, text_of
from aligntune.rewards.fences import last_block
from aligntune.rewards.inputs import column_of
from aligntune.rewards.told import HARNESS
from aligntune.rewards.unit_tests import Exam, UnitTest, asserted, called

_TAGS = ("python", "python3", "py")
_PLACES: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

CALL_IMPORTS = ("typing",)  # as for signatures such as `nums: List[int]`


@dataclass(frozen=True)
class Tests:
    """What a program must do: `asserts` run beside it, or the output for each input."""

    asserts: tuple[UnitTest, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()  # standard input, standard output
    imports: tuple[str, ...] = ()  # modules whose names the program has beside the asserts

    def __len__(self) -> int:
        return len(self.asserts) + len(self.pairs)


async def code_passes(
    completions: list[Completion],
    *,
    column: str = "tests",
    partial: bool = False,
    cpu_seconds: float = 5.0,
    wall_seconds: float = 30.0,
    memory_mib: int = 1024,
    **columns: Any,
) -> list[float]:
    """1 where the completion's program passes every test, else 0; `partial`: the share it passes.

    Range: 0 or 1; with `partial` 0 to 1.
    Formula: tests passed / tests, 1 or 0 unless `partial`.
    Source: unit tests as in APPS (arXiv:2105.09938) and MBPP (arXiv:2108.07732), run in a sandbox.

    The program is the last fenced block that is tagged as Python, else the last without a tag, else
    the whole text. A row of the column holds asserts (a text, or a list), or inputs and outputs:
    [{input, output}, ...] or {inputs: [...], outputs: [...]}, also as JSON text. Outputs are
    compared line by line without white space at line ends. With `fn_name` beside them each input is
    the arguments of a call, and the output what it returns, as in APPS and TACO. Limits are of one
    run of a program.

    Raises:
        ValueError: there is no such column, or a row holds no tests.
        SandboxMissing: `reward.sandbox` is required, and there is none.
        SandboxFailed: a program could not be run, which says nothing of it.
        Unreached: nor can it be now, for the machine is short of something; it is waited for.
    """
    tests = [read_tests(value, column) for value in column_of(columns, column)]
    limits = Limits(cpu_s=cpu_seconds, wall_s=wall_seconds, memory_mib=memory_mib)
    programs = [program_of(text_of(completion)) for completion in completions]
    try:
        shares = await asyncio.gather(
            *(
                _share(program, of, limits, partial)
                for program, of in zip(programs, tests, strict=True)
            )
        )
    except SandboxBusy as busy:
        raise Unreached(str(busy)) from busy
    return list(shares)


def program_of(text: str) -> str:
    """The last fenced block that is tagged as Python, else the last without a tag, else the whole
    text."""
    block = last_block(text, _TAGS)
    return text if block is None else block


def read_tests(value: Any, column: str) -> Tests:
    """The tests that a row's value means. Raises ValueError."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):  # asserts may begin with a bracket
            value = json.loads(value)
    found = Tests()
    if isinstance(value, str) and value.strip():
        found = Tests(asserts=(asserted(value),))
    elif isinstance(value, Mapping) and {"inputs", "outputs"} <= value.keys():
        inputs, outputs = list(value["inputs"]), list(value["outputs"])
        if value.get("fn_name"):
            found = _calls(str(value["fn_name"]), inputs, outputs)
        elif len(inputs) == len(outputs):
            found = Tests(pairs=tuple(zip(map(_lines, inputs), map(_lines, outputs), strict=True)))
    elif isinstance(value, Sequence) and value:
        if all(isinstance(item, str) and item.strip() for item in value):
            found = Tests(asserts=tuple(map(asserted, value)))
        elif all(
            isinstance(item, Mapping) and {"input", "output"} <= item.keys() for item in value
        ):
            found = Tests(pairs=tuple((_lines(i["input"]), _lines(i["output"])) for i in value))
    if not found:
        raise ValueError(
            f"a row of the data has no tests in column {column!r}: asserts as text, or inputs and "
            "outputs as [{input, output}, ...] or {inputs: [...], outputs: [...]}, with fn_name "
            "where each input is the list of a call's arguments"
        )
    return found


def _calls(name: str, inputs: list[Any], outputs: list[Any]) -> Tests:
    """Calls of a function by name; none where a row has another form."""
    asserts = []
    try:
        for given, wanted in zip(inputs, outputs, strict=True):
            if isinstance(given, str):  # the arguments as JSON, one a line
                given = [json.loads(line) for line in given.splitlines()]
                wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
            if not isinstance(given, list | tuple):
                return Tests()
            asserts.append(called(name, list(given), wanted))
    except (ValueError, TypeError, RecursionError):
        return Tests()
    return Tests(asserts=tuple(asserts), imports=CALL_IMPORTS)


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


async def _share(program: str, tests: Tests, limits: Limits, partial: bool) -> float:
    """The share of the tests that a program passes; without `partial` 0 from its first failure."""
    if partial:
        parts: list[Any] = [_output_is(program, *pair, limits) for pair in tests.pairs]
        verdicts = list(await asyncio.gather(*parts))
    else:
        verdicts = []
        for pair in tests.pairs:
            if not await _output_is(program, *pair, limits):
                return 0.0
            verdicts.append(True)
    if tests.asserts:
        verdicts += await _asserted(program, tests, limits)
    return sum(verdicts) / len(tests) if partial else float(all(verdicts))


def _place() -> asyncio.Semaphore:
    """Of as many programs at once as this machine has processors, in this process."""
    places = asyncio.Semaphore(max(2, os.cpu_count() or 1))
    return _PLACES.setdefault(asyncio.get_running_loop(), places)


async def _asserted(program: str, tests: Tests, limits: Limits) -> list[bool]:
    exam = Exam(tests.asserts)
    output_kib = limits.output_kib + exam.most // 1024
    async with _place():
        ran = await run(
            [sys.executable, "-I", "harness.py", *tests.imports],
            files={"solution.py": program, "harness.py": HARNESS},
            answer=exam.answer,
            limits=replace(limits, output_kib=output_kib),
        )
    return exam.verdicts if ran.well else [False] * len(tests.asserts)


async def _output_is(program: str, given: str, wanted: str, limits: Limits) -> bool:
    async with _place():
        ran = await run(
            [sys.executable, "-I", "solution.py"],
            files={"solution.py": program},
            stdin=given.encode(),
            limits=limits,
        )
    return ran.well and _normal(ran.stdout.decode(errors="replace")) == _normal(wanted)


def _normal(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
