"""Asserts and calls as tests of a program, and the talk about them with the program's process.

Invariant: where an assert compares one value with literals, and for every call, the process tells
the value, and what is wanted never enters it. All else runs beside the program, which may deceive
it: what the process says of a test counts once it has been given that test, and not before.
"""

from __future__ import annotations

import ast
import json
import operator
import secrets
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from aligntune.rewards.told import LAST, TELL, value_of

# A call of a function, or of a method of `Solution`, as APPS and TACO have it: what JSON makes of a
# result counts (lists for tuples, keys as text), and an output may stand in a list of its own.
_CALL = """
import json as _json
_name = {name!r}
_owner = globals().get("Solution")
_call = getattr(_owner(), _name) if hasattr(_owner, _name) else globals()[_name]
{last} = _json.loads(_json.dumps(_call(*_json.loads({given!r}))))
"""

_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.Is: operator.is_,
    ast.In: lambda one, many: one in many,
}  # what has no plain value meets none of them; it may well be unequal, or not None
_ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}  # of an `abs`: one that is too long to be told meets neither, as a long value may any other order
_MAKES: dict[str, Callable[..., Any]] = {
    kind.__name__: kind for kind in (dict, float, frozenset, list, set, sorted, tuple)
}
_LINE = 128  # bytes of a line beside the value in it
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
_NO_LITERAL = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Check:
    """Whether a value that is told is the one that is wanted."""

    holds: Callable[[Any], bool]
    most: int  # characters of JSON that such a value may take


@dataclass(frozen=True)
class UnitTest:
    """Python that is run beside the program, and what must be true of the values that it tells."""

    text: str
    checks: tuple[Check, ...] = ()
    needed: int = 0  # as many of the checks, from the first, must have held
    ends: bool = False  # the last of these is of the value that is told with the verdict

    @property
    def most(self) -> int:
        """Characters of JSON that its longest value may take."""
        return max((check.most for check in self.checks), default=0)


@lru_cache(maxsize=1024)  # the completions of a group have the same
def asserted(text: str) -> UnitTest:
    """The test that runs `text`, and passes where that raises nothing."""
    try:
        tree = ast.parse(text)
        taken = _Taken(_made(tree))
        tree.body = [
            taken.visit_Assert(one) if isinstance(one, ast.Assert) else one for one in tree.body
        ]
        needed, ends = len(taken.checks), False
        match tree.body[-1:]:
            case [ast.Expr(ast.Call(ast.Name(id=name), [_, value]))] if name == TELL:
                # Nothing comes after it that it must keep from running: one line tells all.
                tree.body[-1], ends = ast.Assign([ast.Name(LAST, ast.Store())], value), True
        # In a loop each value would be told on its own, which may take long.
        if not any(isinstance(one, _LOOPS) for one in ast.walk(tree)):
            tree = taken.visit(tree)
        changed = ast.unparse(ast.fix_missing_locations(tree)) if taken.checks else text
    except _NO_LITERAL:  # it fails where it runs, if at all
        return UnitTest(text)
    return UnitTest(changed, tuple(taken.checks), needed, ends)


def called(name: str, given: list[Any], wanted: Any) -> UnitTest:
    """The test that calls function `name` with arguments `given`, as JSON has them.

    Raises TypeError and ValueError for what JSON has no word for."""
    said = json.dumps(wanted)
    wanted = json.loads(said)

    def holds(got: Any) -> bool:
        return bool(got == wanted or (isinstance(wanted, list) and [got] == wanted))

    text = _CALL.format(name=name, last=LAST, given=json.dumps(given))
    return UnitTest(text, (Check(holds, _room(len(said))),), needed=1, ends=True)


class Exam:
    """The talk with the process of one program, which `told.HARNESS` is."""

    def __init__(self, tests: Sequence[UnitTest]) -> None:
        self._tests = tests
        self._verdicts: list[bool] = []
        self._held: set[int] = set()  # checks of the test that was given last
        self._word = ""  # what its verdict must begin with

    @property
    def verdicts(self) -> list[bool]:
        """Of each test; none has passed where the program ended before."""
        through = len(self._verdicts) == len(self._tests)
        return self._verdicts if through else [False] * len(self._tests)

    @property
    def most(self) -> int:
        """Bytes that the process may have to say."""
        values = (2 * check.most + _LINE for test in self._tests for check in test.checks)
        return sum(values) + _LINE * (1 + len(self._tests))

    def answer(self, line: bytes) -> bytes | None:
        """What the process is told for a line of its own; None ends the talk."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return None
        match said:
            case ["ran"] if not self._word:
                return self._next()
            case ["value", int(number), str(text)] if self._word:
                return _line(self._hears(number, text))
            case [str(word), bool(passed), str(text)] if self._word and word == self._word:
                test = self._tests[len(self._verdicts)]
                if test.ends:
                    self._hears(test.needed - 1, text)
                self._verdicts.append(passed and self._held.issuperset(range(test.needed)))
                return self._next()
        return None

    def _hears(self, number: int, text: str) -> bool:
        """Whether a check of the test that was given last holds for what is told."""
        checks = self._tests[len(self._verdicts)].checks
        held = 0 <= number < len(checks) and _holds(checks[number], text)
        if held:
            self._held.add(number)
        return held

    def _next(self) -> bytes | None:
        self._held, self._word = set(), ""
        if len(self._verdicts) == len(self._tests):
            return None
        test, self._word = self._tests[len(self._verdicts)], secrets.token_hex(16)
        return _line([self._word, test.text, test.most])


class _Taken(ast.NodeTransformer):
    """Puts values that are told in the place of asserts that compare them with literals."""

    def __init__(self, made: Set[str]) -> None:
        self.checks: list[Check] = []
        self._made = made

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        if (found := _compared(node.test, self._made)) is None:
            return node
        value, check = found
        self.checks.append(check)
        told = [ast.Constant(len(self.checks) - 1), value]
        return ast.copy_location(ast.Expr(ast.Call(ast.Name(TELL, ast.Load()), told, [])), node)


def _compared(test: ast.expr, made: Set[str]) -> tuple[ast.expr, Check] | None:
    """The one value that a comparison has beside literals, and whether it holds for it."""
    if not isinstance(test, ast.Compare):
        return None
    sides = [test.left, *test.comparators]
    literals = [_literal(side) for side in sides]
    places = [place for place, literal in enumerate(literals) if not literal]
    if len(places) != 1:
        return None
    place = places[0]
    if _own(sides[place], made):
        return None
    if len(sides) == 2 and place == 0 and _is_abs(sides[0]):
        operators = _OPERATORS | _ORDERS
    else:
        operators = _OPERATORS
    for left, one in enumerate(test.ops):
        other = literals[left + 1 if left == place else left]
        many = isinstance(one, ast.In) and place == left + 1  # such as a range
        same = isinstance(one, ast.Is) and other and not isinstance(other[0], bool | None)
        if type(one) not in operators or many or same:
            return None
    compare = [operators[type(one)] for one in test.ops]

    def holds(value: Any) -> bool:
        values = [literal[0] if literal else value for literal in literals]
        pairs = zip(compare, pairwise(values), strict=True)
        return all(compared(*pair) for compared, pair in pairs)

    written = sum(len(ast.unparse(side)) for at, side in enumerate(sides) if at != place)
    return sides[place], Check(holds, _room(written))


def _is_abs(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "abs"


def _made(tree: ast.AST) -> set[str]:
    """Variables that hold an object which is made there by the name of its class."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _own(node.value, found):
            found.update(one.id for one in node.targets if isinstance(one, ast.Name))
    return found


def _own(node: ast.expr, made: Set[str]) -> bool:
    """Whether the equality is the value's own: of an object that is made there by the name of its
    class, or is in a variable of `made`, of what such objects are added up to or stand in, or of a
    `dtype`."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name[:1].isupper()
        case ast.Name(id=name):
            return name in made
        case ast.BinOp(left=one, right=other):
            return _own(one, made) or _own(other, made)
        case ast.UnaryOp(operand=one) | ast.Subscript(value=ast.Attribute(attr="dtypes") as one):
            return _own(one, made)
        case ast.List(elts=many) | ast.Tuple(elts=many):
            return any(_own(one, made) for one in many)
        case ast.Attribute(attr=name):
            return name in ("dtype", "dtypes")
    return False


def _literal(node: ast.expr) -> tuple[Any, ...]:
    """What a literal means, or a plain type called with literals; nothing for anything else."""
    try:
        if not isinstance(node, ast.Call):
            return (ast.literal_eval(node),)
        makes = _MAKES.get(node.func.id) if isinstance(node.func, ast.Name) else None
        given = [_literal(one) for one in node.args]
        if makes is None or node.keywords or not all(given):
            return ()
        return (makes(*(one[0] for one in given)),)
    except _NO_LITERAL:
        return ()


def _room(written: int) -> int:
    """Characters of JSON for a value that takes `written` as a literal."""
    return 1024 + 32 * written


def _holds(check: Check, text: str) -> bool:
    if len(text) > check.most:
        return False
    try:
        return bool(check.holds(value_of(json.loads(text))))
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return False


def _line(said: Any) -> bytes:
    return json.dumps(said).encode() + b"\n"
