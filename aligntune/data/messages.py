"""The messages and tools of a data row, in the one form that chat templates take. Pure functions.

OpenAI's form stays as it is, ShareGPT's (`from` and `value`) is turned into it. Fields that are
null are left out, at any depth: columnar files give every object of a column the same fields, and
so a row is the same from Parquet as from JSON Lines. Errors say what and the cure; the caller, who
knows the row, says where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from actors.messages import Messages
from actors.models.templates import unwritten, without_nulls
from aligntune.data.errors import DataError, Reason
from aligntune.errors import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
CONVERSATIONS, TOOLS = "conversations", "tools"  # columns of these names mean what they say
SEEN = ("images", "image", "videos", "video")  # columns of what a model would have to see
THINKING = ("reasoning_content", "reasoning", "thinking")  # fields of an assistant's message


def check_messages(value: list[Any], what: str) -> Messages:
    """The messages of `what`, such as "the prompt", each with a role and something said.

    Raises: DataError.
    """
    if not value:
        raise DataError(
            f"{what} is an empty list of messages; remove the row or fill it in", Reason.EMPTY
        )
    return [_check_message(message, f"message {n} of {what}") for n, message in enumerate(value)]


def is_sharegpt(value: Any) -> bool:
    """Whether `value` is messages as ShareGPT has them."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and "from" in m and "value" in m for m in value)
    )


def check_tools(value: Any) -> list[dict[str, Any]]:
    """The tools of a row: a list of JSON schemas, or JSON text of one; none where it is null.

    Raises: DataError.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"column 'tools' is text that is no JSON ({error}); give a list of JSON schemas"
            ) from error
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("column 'tools' must be a list of JSON schemas, or JSON text of one")
    found: list[dict[str, Any]] = without_nulls(value)
    for tool in found:
        described = tool.get("function", tool)
        if not isinstance(described, dict) or not isinstance(described.get("name"), str):
            raise DataError(
                "a tool in column 'tools' has no name; give schemas as in {'type': 'function', "
                "'function': {'name': ..., 'description': ..., 'parameters': {...}}}"
            )
    return found


def check_unseen(row: Mapping[str, Any], *said: Any) -> None:
    """Raise DataError where a row has images or videos: every model here reads text alone.

    A column of one of these names may hold other things, such as the name of a container's image:
    text and numbers are taken for a picture only where `said`, what the row asks and answers, has a
    place for one, as "<image>".
    """
    for name in SEEN:
        value = row.get(name)
        if value is None or (isinstance(value, str | bytes | list | dict) and not value):
            continue
        place = f"<{name.removesuffix('s')}>"
        if isinstance(value, str | int | float) and not any(place in str(part) for part in said):
            continue
        raise DataError(
            f"column {name!r} has what no model here sees, which reads text alone; remove such "
            "rows, or the column where the text says it all"
        )


def what_is_lost(text: str, messages: Messages, *, said: bool = True) -> str | None:
    """What of the assistant's messages a rendering `text` lacks, blanks aside; None where nothing.

    Names of called tools, and with `said` the contents and the thinking.
    """
    written = "".join(text.split())
    for message in messages:
        if message["role"] != "assistant":
            continue
        for call in message.get("tool_calls") or ():
            name = call.get("function", call).get("name") if isinstance(call, dict) else None
            if isinstance(name, str) and name not in text:
                return f"the call of tool {name!r}"
        for key in ("content", *THINKING) if said else ():
            value = message.get(key)
            if isinstance(value, str) and not _holds(written, value):
                return "thinking" if "</think>" in value or key in THINKING else f"its {key}"
    return None


def check_instructions(text: str, messages: Messages, write: Callable[[Messages], str]) -> None:
    """Raise DataError where `text`, which `write` made of `messages`, leaves out what the system or
    the developer says."""
    if lost := unwritten(messages, write, text):
        raise DataError(
            f"the chat template leaves out {lost}; use a model whose template carries it, or say "
            "it in a message that is carried",
            Reason.NOT_WHOLE,
        )


def _holds(written: str, value: str) -> bool:
    return "".join(value.split()) in written


def _check_message(message: Any, which: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(
            f"{which} is of type {type(message).__name__}; it must be an object with role and "
            "content"
        )
    kept: dict[str, Any] = without_nulls(message)
    if "from" in kept and "role" not in kept:
        kept = _from_sharegpt(kept, which)
    role = kept.get("role")
    if role not in ROLES:
        raise DataError(
            f"{which} has role {role!r}; it must be an object with a role of {', '.join(ROLES)}"
        )
    if "content" not in kept and role == "assistant" and kept.get("tool_calls"):
        return kept
    content = kept.get("content")
    if not isinstance(content, str):
        raise DataError(
            f"{which} has content of type {type(content).__name__}; it must be a string"
        )
    check_unicode(content, which)
    return kept


def _from_sharegpt(message: dict[str, Any], which: str) -> dict[str, Any]:
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT:
        raise DataError(
            f"{which} is from {shown(speaker)}; it must be from one of {', '.join(SHAREGPT)}"
        )
    if speaker != "function_call":
        return {"role": SHAREGPT[speaker], "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{which} is a function_call that is no JSON ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError(f"{which} is a function_call without a name")
    made = [{"type": "function", "function": without_nulls(call)} for call in calls]
    return {"role": "assistant", "tool_calls": made}


def check_unicode(text: str, which: str) -> None:
    """Raise DataError where `text` holds what is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{which} has half a surrogate pair (U+{ord(text[error.start]):04X}), which is not a "
            "character; repair the text"
        ) from error
