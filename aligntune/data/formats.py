"""What one prompt of the data is, and the text the model sees of it. Pure functions.

A prompt is a string or a list of messages. With a chat template both are rendered by it, a string
as one user message, and end where the assistant begins. Without one a string is the text as it
stands, and messages are refused: no template is made up. Errors here say what and the cure; the
caller, who knows the row, says where.
"""

from __future__ import annotations

from typing import Any

from actors.messages import Messages
from aligntune.data.errors import DataError, Reason

ROLES = ("system", "developer", "user", "assistant", "tool")


def check_prompt(value: Any) -> str | Messages:
    """The prompt of one row: a string that says something, or well-formed messages.

    Null fields of messages are left out: columnar files give every message of a column the same
    fields. Raises: DataError.
    """
    if value is None:
        raise DataError("the prompt is missing or null; remove the row or fill it in", Reason.EMPTY)
    if isinstance(value, str):
        if not value.strip():
            raise DataError("the prompt is empty; remove the row or fill it in", Reason.EMPTY)
        _check_unicode(value, "the prompt")
        return value
    if not isinstance(value, list):
        raise DataError(
            f"the prompt is of type {type(value).__name__}; it must be a string, or messages as in "
            "[{'role': 'user', 'content': '...'}]"
        )
    if not value:
        raise DataError(
            "the prompt is an empty list of messages; remove the row or fill it in", Reason.EMPTY
        )
    messages = [_check_message(message, f"message {n}") for n, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "the last message is the assistant's, which the model is to write; "
            "leave it out of the prompt"
        )
    return messages


def check_template(tokenizer: Any, system_prompt: str | None, apply_chat_template: bool) -> None:
    """Raise DataError where a system prompt is set but no chat template says where it goes."""
    if system_prompt is not None and not uses_template(tokenizer, apply_chat_template):
        raise DataError(
            "data.system_prompt: there is no chat template to say where it goes; "
            "write it into the prompts, or use a model with a template"
        )


def uses_template(tokenizer: Any, apply_chat_template: bool) -> bool:
    """Whether prompts go through the tokenizer's chat template.

    It writes the special tokens itself; text that does not go through it is tokenised with them.
    """
    return apply_chat_template and bool(tokenizer.chat_template)


def render(
    prompt: str | Messages,
    tokenizer: Any,
    *,
    system_prompt: str | None = None,
    apply_chat_template: bool = True,
) -> str:
    """The text of a checked prompt, up to where the completion begins.

    `system_prompt` becomes the first message; a prompt that brings its own is refused, for a model
    told two things obeys one of them and the data does not say which. Raises: DataError.
    """
    check_template(tokenizer, system_prompt, apply_chat_template)
    if not uses_template(tokenizer, apply_chat_template):
        if isinstance(prompt, str):
            return prompt
        raise DataError(
            "the prompt is messages, but the tokenizer has no chat template; "
            "use a model that has one, or give prompts as strings"
            if apply_chat_template
            else "the prompt is messages, but data.apply_chat_template is false; "
            "set it to true, or give prompts as strings"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is not None:
        if messages[0]["role"] in ("system", "developer"):
            raise DataError(
                f"the prompt has a {messages[0]['role']} message and data.system_prompt is set "
                "too; remove one of them"
            )
        messages = [{"role": "system", "content": system_prompt}, *messages]
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise DataError(
            f"the model's chat template refuses the prompt ({error}); give it the messages the "
            "template knows"
        ) from error
    return text


def _check_message(message: Any, which: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(
            f"{which} of the prompt is of type {type(message).__name__}; it must be an object with "
            "role and content"
        )
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        raise DataError(
            f"{which} of the prompt has role {role!r}; it must be one of {', '.join(ROLES)}"
        )
    if "content" not in kept and kept.get("tool_calls"):
        return kept
    content = kept.get("content")
    if not isinstance(content, str):
        raise DataError(
            f"{which} of the prompt has content of type {type(content).__name__}; "
            "it must be a string"
        )
    _check_unicode(content, f"{which} of the prompt")
    return kept


def _check_unicode(text: str, which: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{which} has half a surrogate pair (U+{ord(text[error.start]):04X}), which is not a "
            "character; repair the text"
        ) from error
