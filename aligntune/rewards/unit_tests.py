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
import struct
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

_TELL = "__tell__"  # (number of a check, value), in a test's text

# In the sandbox, between the program and `Exam`: a line of JSON each way. It holds what it needs
# from before the program runs, for that may put something else in its place.
HARNESS = f"""
import io, json, operator, os, sys
from collections import UserList, UserString
from collections.abc import Mapping, Set
def main():
    hear = os.fdopen(os.dup(0), encoding="utf-8").readline
    out = os.fdopen(os.dup(1), "wb")
    write, flush = out.write, out.flush
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0); os.dup2(nothing, 1)
    sys.stdin = io.StringIO("")
    run, compiled, leave, index = exec, compile, os._exit, operator.index
    encode, decode = json.JSONEncoder().encode, json.JSONDecoder().decode
    def plain(value):
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, (dict, Mapping)):
            return {{"dict": [[plain(key), plain(of)] for key, of in value.items()]}}
        for name, kinds in (("tuple", tuple), ("frozenset", frozenset), ("set", Set)):
            if isinstance(value, kinds):
                return {{name: [plain(one) for one in value]}}
        if isinstance(value, (bytes, bytearray, memoryview)):
            return {{"bytes": value.hex()}}
        if isinstance(value, complex):
            return {{"complex": [value.real, value.imag]}}
        if isinstance(value, (UserList, UserString)):
            return plain(value.data)
        try:
            return index(value)
        except TypeError:
            pass
        if getattr(value, "itemsize", 8) in (2, 4):
            return {{"float": [value.itemsize, type(value).__float__(value)]}}
        try:
            return {{"ratio": type(value).as_integer_ratio(value)}}
        except (AttributeError, ValueError, OverflowError):
            return type(value).__float__(value)
    def asked(*said):
        write(encode(said).encode() + b"\\n"); flush()
        answer = hear()
        if not answer:
            leave(0)
        return decode(answer)
    def passes(text, name, space):
        try:
            run(compiled(text, name, "exec"), space)
            return True
        except BaseException:
            return False
    space = {{"__name__": "solution"}}
    for module in sys.argv[1:]:
        run(f"from {{module}} import *", space)
    del sys.argv[1:]
    with open("solution.py", encoding="utf-8") as file:
        if not passes(file.read(), "solution.py", space):
            leave(1)
    word, test, most = asked("ran")
    def tell(number, value):
        try:
            text = encode(plain(value))
        except BaseException:
            text = ""
        if asked("value", number, text if len(text) <= most else "") is not True:
            raise AssertionError
    while True:
        word, test, most = asked(word, passes(test, "test", {{**space, {_TELL!r}: tell}}))
main()
"""

# A call of a function, or of a method of `Solution`, as APPS and TACO have it: what JSON makes of a
# result counts (lists for tuples, keys as text), and an output may stand in a list of its own.
_CALL = """
import json as _json
_name = {name!r}
_owner = globals().get("Solution")
_call = getattr(_owner(), _name) if hasattr(_owner, _name) else globals()[_name]
{tell}(0, _json.loads(_json.dumps(_call(*_json.loads({given!r})))))
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
        needed = len(taken.checks)
        # In a loop each value would be told on its own, which may take long.
        if not any(isinstance(one, _LOOPS) for one in ast.walk(tree)):
            tree = taken.visit(tree)
        changed = ast.unparse(ast.fix_missing_locations(tree)) if taken.checks else text
    except _NO_LITERAL:  # it fails where it runs, if at all
        return UnitTest(text)
    return UnitTest(changed, tuple(taken.checks), needed)


def called(name: str, given: list[Any], wanted: Any) -> UnitTest:
    """The test that calls function `name` with arguments `given`, as JSON has them.

    Raises TypeError and ValueError for what JSON has no word for."""
    said = json.dumps(wanted)
    wanted = json.loads(said)

    def holds(got: Any) -> bool:
        return bool(got == wanted or (isinstance(wanted, list) and [got] == wanted))

    text = _CALL.format(name=name, tell=_TELL, given=json.dumps(given))
    return UnitTest(text, (Check(holds, _room(len(said))),), needed=1)


class Exam:
    """The talk with the process of one program, which `HARNESS` is."""

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
                checks = self._tests[len(self._verdicts)].checks
                held = 0 <= number < len(checks) and _holds(checks[number], text)
                if held:
                    self._held.add(number)
                return _line(held)
            case [str(word), bool(passed)] if self._word and word == self._word:
                needed = range(self._tests[len(self._verdicts)].needed)
                self._verdicts.append(passed and self._held.issuperset(needed))
                return self._next()
        return None

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
        return ast.copy_location(ast.Expr(ast.Call(ast.Name(_TELL, ast.Load()), told, [])), node)


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
        return bool(check.holds(_value(json.loads(text))))
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return False


def _ratio(above: Any, below: Any) -> Fraction:
    return Fraction(int(above), int(below))  # a text such as 1e999999999 must not become a number


class _Short(float):
    """A float of 2 or 4 bytes, as numpy has them: it equals a number that is rounded to it."""

    def __new__(cls, size: int, value: float) -> _Short:
        made = super().__new__(cls, value)
        made._form = {2: "e", 4: "f"}[size]
        return made

    _form: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int | float):
            return float.__eq__(self, other)
        try:
            (rounded,) = struct.unpack(self._form, struct.pack(self._form, other))
        except (OverflowError, struct.error):
            return False
        return float.__eq__(self, rounded)

    __hash__ = float.__hash__


def _value(said: Any) -> Any:
    """The value that `plain` of the harness has told.

    Raises ValueError, TypeError, KeyError and ArithmeticError."""
    if isinstance(said, list):
        return [_value(one) for one in said]
    if not isinstance(said, dict):
        return said
    ((kind, of),) = said.items()
    return _KINDS[kind](of)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda of: {_value(key): _value(one) for key, one in of},
    "tuple": lambda of: tuple(map(_value, of)),
    "set": lambda of: set(map(_value, of)),
    "frozenset": lambda of: frozenset(map(_value, of)),
    "bytes": bytes.fromhex,
    "complex": lambda of: complex(*of),
    "ratio": lambda of: _ratio(*of),
    "float": lambda of: _Short(*of),
}


def _line(said: Any) -> bytes:
    return json.dumps(said).encode() + b"\n"
