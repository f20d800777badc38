"""The process of a program that is tested, and the values that it tells as JSON.

Invariant: what is told has the equality of a plain type, whatever the program's own says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

TELL = "__tell__"  # (number of a check, value), in a test's text; it raises where that fails
LAST = "__told__"  # a value that the test ends with, which is told with the verdict

# In the sandbox, between the program and `unit_tests.Exam`: a line of JSON each way. It holds what
# it needs from before the program runs, for that may put something else in its place.
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
    def told(value, most):
        try:
            text = encode(plain(value))
        except BaseException:
            return ""
        return text if len(text) <= most else ""
    space = {{"__name__": "solution"}}
    for module in sys.argv[1:]:
        run(f"from {{module}} import *", space)
    del sys.argv[1:]
    with open("solution.py", encoding="utf-8") as file:
        if not passes(file.read(), "solution.py", space):
            leave(1)
    word, test, most = asked("ran")
    def tell(number, value):
        if asked("value", number, told(value, most)) is not True:
            raise AssertionError
    while True:
        own = {{**space, {TELL!r}: tell}}
        passed = passes(test, "test", own)
        last = told(own[{LAST!r}], most) if {LAST!r} in own else ""
        word, test, most = asked(word, passed, last)
main()
"""


def value_of(said: Any) -> Any:
    """The value that `plain` of `HARNESS` has told.

    Raises ValueError, TypeError, KeyError and ArithmeticError."""
    if isinstance(said, list):
        return [value_of(one) for one in said]
    if not isinstance(said, dict):
        return said
    ((kind, of),) = said.items()
    return _KINDS[kind](of)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda of: {value_of(key): value_of(one) for key, one in of},
    "tuple": lambda of: tuple(map(value_of, of)),
    "set": lambda of: set(map(value_of, of)),
    "frozenset": lambda of: frozenset(map(value_of, of)),
    "bytes": bytes.fromhex,
    "complex": lambda of: complex(*of),
    "ratio": lambda of: _ratio(*of),
    "float": lambda of: _Short(*of),
}


def _ratio(above: Any, below: Any) -> Fraction:
    return Fraction(int(above), int(below))  # a text such as 1e999999999 must not become a number


class _Short(float):
    """A float of 2 or 4 bytes, as numpy has them: it equals a number that is rounded to it."""

    _form: str

    def __new__(cls, size: int, value: float) -> _Short:
        made = super().__new__(cls, value)
        made._form = {2: "e", 4: "f"}[size]
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int | float):
            return float.__eq__(self, other)
        try:
            (rounded,) = struct.unpack(self._form, struct.pack(self._form, other))
        except (OverflowError, struct.error):
            return False
        return float.__eq__(self, rounded)

    __hash__ = float.__hash__
