"""Values, texts and bytes that nobody expects, drawn with a dice."""

from __future__ import annotations

import math
import random
from typing import Any

WORDS = (
    "",
    " ",
    "a",
    "null",
    "auto",
    "true",
    "nan",
    "-1",
    "0",
    "1e999",
    "grpo",
    "ppo",
    "dpo",
    "math",
    "a.b",
    "../x",
    "/dev/null",
    "s3://b/k",
    "file:///",
    "http://x:y@z",
    "model",
    "name",
    "é",
    "\u2028",
    "\ud800",
    "\x00",
    "\x1b[31m",
    "a\nb",
    "x" * 300,
    "😀" * 5,
    "\ufeff",
    "١٢",
    "²",
    "{}",
    "[]",
    "%s",
    "{0}",
    "train[:10%]",
    "train[5:",
    "module:thing",
    "os:system",
    ":",
    "=",
    "a=b",
    "~",
    "'",
    '"',
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    64,
    10**6,
    2**31,
    2**63,
    -(2**63) - 1,
    10**30,
    10**400,
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    -1.5,
    1e-30,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
)


def value(dice: random.Random, depth: int = 3) -> Any:
    """Anything that JSON or YAML may hold, and more."""
    kind = dice.random()
    if depth and kind < 0.15:
        return [value(dice, depth - 1) for _ in range(dice.choice((0, 1, 2, 3)))]
    if depth and kind < 0.3:
        keys = [key(dice) for _ in range(dice.choice((0, 1, 2)))]
        return {name: value(dice, depth - 1) for name in keys}
    if kind < 0.55:
        return dice.choice(NUMBERS)
    if kind < 0.7:
        return dice.choice((None, True, False))
    return text(dice)


def key(dice: random.Random) -> Any:
    """A key: most often a text."""
    return dice.choice((*WORDS, 1, None, True, 1.5)) if dice.random() < 0.5 else text(dice)


def text(dice: random.Random) -> str:
    """A text, most often short."""
    if dice.random() < 0.7:
        return dice.choice(WORDS)
    letters = "abcxyz019 .:=-_[]{}\"'\\\n\t#&*!|>%@`é\u0000\ud83d\u202e"
    return "".join(dice.choice(letters) for _ in range(dice.randint(0, 30)))


def paths(tree: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a tree."""
    found = [before] if before else []
    if isinstance(tree, dict):
        for name, inner in tree.items():
            found += paths(inner, (*before, name))
    elif isinstance(tree, list):
        for index, inner in enumerate(tree):
            found += paths(inner, (*before, index))
    return found


def mutate(dice: random.Random, tree: Any) -> Any:
    """Change one thing in a tree, in place: a value, a key, or something that was not there."""
    places = paths(tree)
    if not places:
        return value(dice)
    *above, last = dice.choice(places)
    node = tree
    for step in above:
        node = node[step]
    change = dice.choice(("value", "value", "remove", "add", "rename", "wrap"))
    if change == "remove":
        del node[last]
    elif change == "add" and isinstance(node, dict):
        node[key(dice)] = value(dice)
    elif change == "rename" and isinstance(node, dict):
        node[misspelt(dice, str(last))] = node.pop(last)
    elif change == "wrap":
        node[last] = dice.choice(([node[last]], {"name": node[last]}, {"value": node[last]}))
    else:
        node[last] = value(dice)
    return tree


def misspelt(dice: random.Random, word: str) -> str:
    """A word with one slip of the fingers."""
    if not word:
        return "x"
    at = dice.randrange(len(word))
    return dice.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + "x" + word[at:],
            word.upper(),
            word + " ",
            word[::-1],
        )
    )


def spoil(dice: random.Random, raw: bytes) -> bytes:
    """Change some bytes: flipped, cut, doubled, put in, or all gone."""
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(raw) + 1)
        end = min(len(raw), at + dice.choice((1, 1, 3, 20, 200)))
        match dice.choice(("flip", "cut", "drop", "double", "insert", "swap", "empty", "line")):
            case "flip" if at < len(raw):
                raw = raw[:at] + bytes([raw[at] ^ (1 << dice.randrange(8))]) + raw[at + 1 :]
            case "cut":
                raw = raw[:at]
            case "drop":
                raw = raw[:at] + raw[end:]
            case "double":
                raw = raw[:end] + raw[at:end] + raw[end:]
            case "insert":
                raw = raw[:at] + dice.choice(SPLICES) + raw[at:]
            case "swap":
                raw = raw[end:] + raw[:at]
            case "empty" if dice.random() < 0.2:
                raw = b""
            case "line":
                lines = raw.splitlines(keepends=True)
                dice.shuffle(lines)
                raw = b"".join(lines)
    return raw


SPLICES = (
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\n",
    b"\r\n",
    b"\r",
    b"\t",
    b",",
    b'"',
    b"'",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b": ",
    b"- ",
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b"[" * 3000,
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"&a ",
    b"*a",
    b"!!python/object:x ",
    b"<<: ",
    b"---\n",
    b"...\n",
    "\u2028".encode(),
    "😀".encode(),
    b"true",
    b"\x1b[2J",
    b"%",
    b"#",
)
