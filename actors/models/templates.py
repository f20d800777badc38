"""What a model's chat template gets beside the messages, such as Qwen3's `enable_thinking`, and
what it says of its model.

Invariant: a tokenizer that was given some passes them on in every call of its template, so prompts,
episodes, rows to imitate and pairs are rendered alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from functools import partial
from typing import Any

from actors.messages import Messages

OURS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "self",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}
"""Arguments of the call that say something else, and what the rows say themselves."""


CLOCK = "strftime_now"
"""The function by which templates write today's date, as Llama 3.2's and gpt-oss's do."""
ANSWER = "QzQzQ"  # stands in no template


def give(tokenizer: Any, variables: Mapping[str, Any], day: str | None = None) -> None:
    """From now on `tokenizer` hands `variables` to its chat template, whoever calls. A template
    that writes today's date writes `day`, as `2026-01-31`, where that is given."""
    bound = dict(variables)
    if day is not None and writes_day(tokenizer):
        bound[CLOCK] = date.fromisoformat(day).strftime
    if bound:
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **bound)


def given(tokenizer: Any) -> Mapping[str, Any]:
    """The variables that `give` gave."""
    called = tokenizer.apply_chat_template
    bound = called.keywords if isinstance(called, partial) else {}
    return {name: value for name, value in bound.items() if name != CLOCK}


def writes_day(tokenizer: Any) -> bool:
    """Whether the chat template writes today's date."""
    return CLOCK in str(tokenizer.chat_template or "")


def turn_ends(tokenizer: Any) -> list[int]:
    """The special tokens that the chat template writes after an answer, in order: the first of them
    ends the turn. None without a template, or where it refuses a question and an answer."""
    if not tokenizer.chat_template:
        return []
    from jinja2 import TemplateError

    asked, said = {"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}
    try:
        text: str = tokenizer.apply_chat_template([asked, said], tokenize=False)
    except (TemplateError, TypeError):
        return []
    _, found, after = text.rpartition(ANSWER)
    added = tokenizer.added_tokens_decoder
    special = {token for token, how in added.items() if how.special}  # no <think>, no <tool_call>
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return [token for token in ids if token in special]


def check_given(tokenizer: Any, template: str | None = None) -> None:
    """Raises ValueError where a variable that was given would do nothing in `template`, by default
    the tokenizer's own, or is no variable."""
    text = str(tokenizer.chat_template or "") if template is None else template
    for name in given(tokenizer):
        if name in OURS:
            raise ValueError(f"{name!r} is no variable of chat templates; remove it")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            whose = "the model has no chat template" if not text else "no variable of the template"
            raise ValueError(f"{name!r} would do nothing: {whose}; remove it or correct its name")


def with_arguments(tokenizer: Any, messages: Messages) -> Messages:
    """`messages` with the arguments of calls as the chat template takes them: data as they are, or
    JSON text where it takes nothing else, as DeepSeek-V3's."""
    if not any(message.get("tool_calls") for message in messages) or not _takes_text(tokenizer):
        return messages
    return [
        {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _takes_text(tokenizer: Any) -> bool:
    from jinja2 import TemplateError

    def renders(arguments: Any) -> bool:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}, said], tokenize=False)
        except (TemplateError, TypeError):
            return False
        return True

    return not renders({}) and renders("{}")


def _as_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), dict):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}
