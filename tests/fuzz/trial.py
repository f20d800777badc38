"""What is right of whatever comes in: a result, or one line. What an input is and what it is given
to, `inputs` says."""

from __future__ import annotations

import faulthandler
import random
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LONGEST_S = 60.0  # of this machine, for one input; then where it stands is shown and all ends
LONGEST_CPU_S = 5.0  # of this process
LONGEST_LINE = 1500

TOOK = "took it"


class NotRight(AssertionError):
    """What came out is wrong: a lost row, a message of many lines, a wrong value."""


@dataclass(frozen=True)
class Refused:
    """The line that an input was refused with."""

    line: str


Try = Callable[[random.Random, Path], Refused | None]
"""Makes one input in an empty folder and gives it in. Raises NotRight, or what a defect raises."""


def one_line(error: BaseException) -> Refused:
    """The message of an expected error. Raises NotRight where a person could not read it."""
    line = str(error)
    if not line.strip():
        raise NotRight(f"{type(error).__name__} without a message")
    if len(line.splitlines()) > 1:
        raise NotRight(f"a message of several lines: {line!r}")
    if len(line) > LONGEST_LINE:
        raise NotRight(f"a message of {len(line)} characters: {line[:300]!r}")
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 or ord(c) == 127 for c in line):
        raise NotRight(f"a message that no terminal shows: {line[:300]!r}")
    return Refused(line)


def outcome(one: Try, seed: str, folder: Path) -> tuple[str, str | None]:
    """(what came of it, the defect if it shows one) of the input that `seed` makes."""
    faulthandler.dump_traceback_later(LONGEST_S, exit=True)
    began = time.process_time()
    try:
        refused = one(random.Random(seed), folder)
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        frames = traceback.extract_tb(error.__traceback__)[-5:]
        where = "".join(f"  {f.filename}:{f.lineno} {f.name}\n    {f.line}\n" for f in frames)
        return "defect", f"{type(error).__name__}: {str(error)[:400]}\n{where}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    if (took := time.process_time() - began) > LONGEST_CPU_S:
        return "defect", f"it took {took:.1f} s"
    return (TOOK if refused is None else refused.line), None


def kind_of(line: str) -> str:
    """A message without what is of one input: quoted texts, numbers, paths."""
    for pattern in (r"'(?:[^'\\]|\\.)*'", r'"[^"]*"', r"b'[^']*'", r"/[\w./-]+", r"-?\d[\d.e+-]*"):
        line = re.sub(pattern, "*", line)
    return line[:160]
