"""Messages as clients send them, in the one way that chat templates and comparisons want them."""

from __future__ import annotations

import json
import re
from typing import Any

from actors.messages import Messages

NESTING = 100
"""Levels of a message's calls at most. Python's own limit, of about 1,000, would be met later, by
what writes or sends them."""

_HALF = re.compile("[\ud800-\udfff]")  # JSON can spell it, and no tokenizer and no file takes it


def normalised(messages: Messages) -> Messages:
    """Messages as chat templates want them: text as one string, arguments of calls as data, tool
    answers with the tool's name, and nothing that clients add and no template reads.

    Raises:
        ValueError: a message that is none, or holds what is not text.
    """
    names: dict[str, str] = {}
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} has no role")
        kept = {key: value for key, value in message.items() if value is not None}
        for key in ("refusal", "annotations", "audio", "function_call"):
            kept.pop(key, None)
        if "reasoning" in kept:  # vLLM's own name for it
            kept.setdefault("reasoning_content", kept.pop("reasoning"))
        kept["content"] = _text(kept.get("content", ""), index)
        if calls := kept.pop("tool_calls", None):
            kept["tool_calls"] = [_tool_call(call, index) for call in calls]
            if why := unsendable(kept["tool_calls"]):
                raise ValueError(f"message {index} has calls {why}")
            names |= {c["id"]: c["function"]["name"] for c in kept["tool_calls"] if "id" in c}
        if kept["role"] == "tool" and "name" not in kept:
            name = names.get(kept.get("tool_call_id", ""))
            kept |= {} if name is None else {"name": name}
        found.append(kept)
    return found


def _text(content: Any, index: int) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"message {index} has content that is not text; text alone is read")
    return "\n".join(part["text"] for part in parts)


def _tool_call(call: Any, index: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {index} has a tool call without a function's name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"message {index} calls {function['name']!r} with arguments that are not JSON, or "
                f"nested deeper than {NESTING} levels"
            ) from error
    kept = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **kept} if isinstance(call.get("id"), str) else kept


def unsendable(value: Any) -> str:
    """Why no template and no client takes data of JSON; empty for what they take."""
    left = [(value, 1)]
    while left:
        one, level = left.pop()
        if isinstance(one, str) and _HALF.search(one):
            return "with half of a surrogate pair, such as \\ud83d alone: write the whole character"
        if isinstance(one, dict | list):
            if level > NESTING:
                return f"nested deeper than {NESTING} levels"
            inner = [*one, *one.values()] if isinstance(one, dict) else one
            left += [(each, level + 1) for each in inner]
    return ""


def may_follow(messages: Messages) -> bool:
    """Whether these may stand after an answer as they are: answers of tools, then the user's."""
    roles = [message["role"] for message in messages]
    tools = roles.count("tool")
    named = all("name" in message for message in messages[:tools])
    return bool(roles) and named and roles == ["tool"] * tools + ["user"] * (len(roles) - tools)


def said(message: dict[str, Any]) -> str:
    """What a message says, in one way: without ids of calls, earlier thinking and the assistant's
    name, which clients give back, leave out or add as they like."""
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    name = "" if message["role"] == "assistant" else message.get("name", "")
    return canonical([message["role"], message.get("content") or "", calls, name])


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
