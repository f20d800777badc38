"""What a completion says. Standard library only: children of rewards import this."""

from __future__ import annotations

import re
from typing import Any

Completion = str | list[dict[str, Any]]
"""A text; or messages, of an episode or where the prompt is messages."""

_OPENER = re.compile(r"<think>\s*\Z")


def text_of(completion: Completion) -> str:
    """The text of a completion: a string as it is; of messages what the assistant says last, that
    is the contents behind the last message of another role, such as a tool's."""
    if isinstance(completion, str):
        return completion
    others = [n for n, m in enumerate(completion) if m.get("role", "assistant") != "assistant"]
    last = completion[others[-1] + 1 :] if others else completion
    return "".join(str(message.get("content") or "") for message in last)


def without_thoughts(text: str) -> str:
    """What a completion says behind its last `</think>`; of thoughts that never end, nothing."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def with_thoughts(prompt: str, text: str) -> str:
    """A completion with the `<think>` that its rendered prompt ends with, as templates of models
    that always think have it; as it is where the prompt ends otherwise or it has its own."""
    opener = _OPENER.search(prompt)
    return text if opener is None or text.lstrip().startswith("<think>") else opener[0] + text
