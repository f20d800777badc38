"""What a model's chat template gets beside the messages, such as Qwen3's `enable_thinking`, and
what it says of its model.

Invariant: a tokenizer that was given some passes them on in every call of its template, so prompts,
episodes, rows to imitate and pairs are rendered alike.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
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
THINKING = "enable_thinking"
"""The variable by which templates switch thinking off, as Qwen3's and SmolLM3's do."""
ANSWER = "QzQzQ"  # stands in no template
INSTRUCTS = ("developer", "system")  # roles of who says how to answer


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


def day_is_given(tokenizer: Any) -> bool:
    """Whether `give` gave the day that the chat template writes."""
    called = tokenizer.apply_chat_template
    return isinstance(called, partial) and CLOCK in called.keywords


def writes_day(tokenizer: Any) -> bool:
    """Whether the chat template writes today's date."""
    return CLOCK in str(tokenizer.chat_template or "")


def turn_ends(tokenizer: Any) -> list[int]:
    """The special tokens that the chat template writes after an answer, in order: the first of them
    ends the turn. None without a template, or where it refuses a question and an answer."""
    if not tokenizer.chat_template:
        return []
    asked, said = {"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}
    if (text := _written(tokenizer, None, [asked, said])) is None:
        return []
    _, found, after = text.rpartition(ANSWER)
    added = tokenizer.added_tokens_decoder
    special = {token for token, how in added.items() if how.special}  # no <think>, no <tool_call>
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return [token for token in ids if token in special]


def thinks(tokenizer: Any) -> bool:
    """Whether the chat template lets the model think before it answers, and would not if it were
    given `enable_thinking` false. False where `give` gave that variable, whatever it is."""
    if THINKING in given(tokenizer) or THINKING not in str(tokenizer.chat_template or ""):
        return False
    from jinja2 import TemplateError

    asked = [{"role": "user", "content": "?"}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    try:
        text: str = tokenizer.apply_chat_template(asked, **options)
        plain: str = tokenizer.apply_chat_template(asked, **options, **{THINKING: False})
    except (TemplateError, TypeError):
        return False
    return text != plain


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


def without_nulls(value: Any) -> Any:
    """`value` without the fields of objects that are null; the elements of lists all stay."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def fitted(tokenizer: Any, messages: Messages, template: str | None = None) -> Messages:
    """`messages` as `template` takes them, by default the tokenizer's: roles as by `with_roles`,
    arguments of calls as by `with_arguments`. Raises ValueError as both do."""
    messages = with_roles(messages, partial(_written, tokenizer, template))
    return with_arguments(tokenizer, messages, template)


def with_roles(messages: Messages, write: Callable[[Messages], str | None]) -> Messages:
    """`messages`, each of the developer's as the system's where `write` leaves out or refuses a
    developer's and not a system's, as Qwen3's template does. `write` makes text of messages, None
    of those that it refuses.

    Raises:
        ValueError: it writes neither.
    """
    if not any(message.get("role") == "developer" for message in messages):
        return messages
    for role in INSTRUCTS:
        text = write([{"role": role, "content": ANSWER}, {"role": "user", "content": "?"}])
        if text is not None and ANSWER in text:
            return [
                {**message, "role": role} if message.get("role") == "developer" else message
                for message in messages
            ]
    raise ValueError(
        "the chat template takes neither a developer's message nor a system's; say in the user's "
        "what it says"
    )


def unwritten(
    messages: Messages, write: Callable[[Messages], str], text: str | None = None
) -> str | None:
    """Which message of a system or developer is left out of `text`, which `write` makes of
    `messages`; None where none is, blanks aside.

    A template may write another text for one, as SmolLM3's for `/no_think`: so a message that is
    not found is written once more with a word added, and is left out where that is not found too.
    """
    if not any(message.get("role") in INSTRUCTS for message in messages):
        return None
    found = "".join((write(messages) if text is None else text).split())
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in INSTRUCTS or "".join(str(content).split()) in found:
            continue
        longer = {**message, "content": f"{content} {ANSWER}"}
        if ANSWER not in write([*messages[:place], longer, *messages[place + 1 :]]):
            return f"message {place}, of role {role!r}"
    return None


def _written(tokenizer: Any, template: str | None, messages: Messages) -> str | None:
    """The text of `messages`; None where the template refuses them."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    except (TemplateError, TypeError):
        return None
    return text


def with_arguments(tokenizer: Any, messages: Messages, template: str | None = None) -> Messages:
    """`messages` with the arguments of calls as `template` takes them, by default the tokenizer's.

    JSON text stays as it stands where the template writes it so, as Qwen3's does; for others it is
    the object that it spells. An object is JSON text where nothing else is taken, as by
    DeepSeek-V3's.

    Raises:
        ValueError: text that spells no object, for a template that needs one.
    """
    if not any(isinstance(message.get("tool_calls"), list) for message in messages):
        return messages
    text, data = _takes(tokenizer, template)
    return [
        {**message, "tool_calls": [_taken(call, text, data) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _takes(tokenizer: Any, template: str | None) -> tuple[bool, bool]:
    """Whether a template takes arguments as text, and whether as data. Both only where it writes
    the same of both, blanks and quotes aside: others have a form of their own for data."""

    def written(arguments: Any) -> str | None:
        function = {"name": "f", "arguments": arguments}
        call = {"id": "call00000", "type": "function", "function": function}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        return _written(tokenizer, template, [{"role": "user", "content": "?"}, said])

    spelled = f'{{"a":"{ANSWER}"}}'
    text, data = written(spelled), written({"a": ANSWER})
    if text is None or data is None:
        return text is not None, text is None
    return spelled in text and _same(text, data), True


def _same(one: str, other: str) -> bool:
    first, second = ("".join(each.split()).replace("'", '"') for each in (one, other))
    return first == second


def _taken(call: Any, text: bool, data: bool) -> Any:
    """`call` with its arguments as `_takes` says. Raises ValueError."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str) and not text:
        arguments = _read(arguments, function.get("name"))
    elif isinstance(arguments, dict) and not data:
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        return call
    taken = {**function, "arguments": arguments}
    return taken if function is call else {**call, "function": taken}


def _read(text: str, name: Any) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError):
        found = text
    if found is not None and not isinstance(found, dict):
        raise ValueError(
            f"{name!r} is called with arguments that are text and no JSON object, "
            f"{reprlib.repr(text)}; give an object, or JSON text of one"
        )
    return found or {}
