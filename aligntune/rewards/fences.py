"""Fenced blocks of a completion's Markdown. Pure.

Invariant: marks are read in pairs from the text's beginning, each with its tag, so that what stands
between two blocks is never taken for one. The time is linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# A mark whose line holds its like again is code within a line, and opens nothing. A block ends at a
# mark that begins a line or ends one, or with the text.
_BLOCK = re.compile(
    r"""
    (?<!`)(`{3,}+)
    (?: [^\n`]*+ \1 (?!`)
      | [ \t]*+ (\w*+) [^\n`]*+ \n
        (.*?)
        (?: ^[ \t]*+ \1 `*+ (?=\s) | (?<!`) \1 `*+ [ \t\r]*+ $ | \Z )
    )
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def last_block(text: str, tags: Collection[str]) -> str | None:
    """The last fenced block with one of `tags` (lower case), else the last without a tag; None
    where there is neither."""
    found: dict[bool, str] = {}
    for block in _BLOCK.finditer(text):
        tag, inside = block[2], block[3]
        if inside is not None and (not tag or tag.lower() in tags):
            found[bool(tag)] = inside
    return found.get(True, found.get(False))
