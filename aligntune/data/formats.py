"""What one prompt of the data is, and the text the model sees of it. Pure functions.

A prompt is a string or a list of messages. With a chat template both are rendered by it, a string
as one user message, and end where the assistant begins. Without one a string is the text as it
stands, and messages are refused: no template is made up. Errors here say what and the cure; the
caller, who knows the row, says where.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from actors.messages import Messages
from actors.models.templates import fitted
from aligntune.data.errors import DataError, Reason
from aligntune.data.messages import (
    check_instructions,
    check_messages,
    check_unicode,
    is_sharegpt,
    what_is_lost,
)

NOTHING_ASKED: Messages = []
"""The prompt of a row that leaves it to its environment; it is shown as an empty user message,
which goes on with what `reset` returns."""


def check_prompt(value: Any, environment: bool = False) -> str | Messages:
    """The prompt of one row: a string that says something, or well-formed messages.

    The answers that ShareGPT's conversations end in are left out, for the model is to write them.
    With an `environment`, which may say it all, a prompt may be missing. Raises: DataError.
    """
    if environment and (value is None or value == "" or value == []):
        return NOTHING_ASKED
    if value is None:
        raise DataError("the prompt is missing or null; remove the row or fill it in", Reason.EMPTY)
    if isinstance(value, str):
        if not value.strip():
            raise DataError("the prompt is empty; remove the row or fill it in", Reason.EMPTY)
        check_unicode(value, "the prompt")
        return value
    if not isinstance(value, list):
        raise DataError(
            f"the prompt is of type {type(value).__name__}; it must be a string, or messages as in "
            "[{'role': 'user', 'content': '...'}]"
        )
    messages = check_messages(value, "the prompt")
    if is_sharegpt(value):
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError("the conversation asks nothing: all of it is answers", Reason.EMPTY)
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
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    """The text of a checked prompt, up to where the completion begins.

    `system_prompt` becomes the first message; a prompt that brings its own is refused, for a model
    told two things obeys one of them and the data does not say which. `tools` are JSON schemas of
    what the model may call; a template that does not carry them, or calls of them, is refused.
    Raises: DataError.
    """
    check_template(tokenizer, system_prompt, apply_chat_template)
    if not uses_template(tokenizer, apply_chat_template):
        if isinstance(prompt, str):
            if tools and apply_chat_template:
                raise DataError(
                    "the row has tools, but the tokenizer has no chat template to say where they "
                    "go; use a model that has one"
                )
            return prompt
        raise DataError(
            "the prompt is messages, but the tokenizer has no chat template; "
            "use a model that has one, or give prompts as strings"
            if apply_chat_template
            else "the prompt is messages, but data.apply_chat_template is false; "
            "set it to true, or give prompts as strings"
        )
    prompt = prompt or ""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is not None:
        if messages[0]["role"] in ("system", "developer"):
            raise DataError(
                f"the prompt has a {messages[0]['role']} message and data.system_prompt is set "
                "too; remove one of them"
            )
        messages = [{"role": "system", "content": system_prompt}, *messages]
    write = partial(_templated, tokenizer, tools=tools)
    text = write(messages)
    if tools and text == write(messages, tools=()):
        raise DataError(
            "the model's chat template leaves out the row's tools; use a model whose template "
            "carries them, or remove column 'tools'"
        )
    if lost := what_is_lost(text, messages, said=False):
        raise DataError(
            f"the model's chat template leaves out {lost}; use a model whose template carries it"
        )
    check_instructions(text, messages, write)
    check_unicode(text, "the prompt with its tools and calls")
    return text


def _templated(tokenizer: Any, messages: Messages, tools: Sequence[dict[str, Any]]) -> str:
    from jinja2 import TemplateError

    try:
        taken = fitted(tokenizer, messages)
    except ValueError as error:
        raise DataError(str(error)) from error
    try:
        text: str = tokenizer.apply_chat_template(
            taken,
            tools=[*tools] or None,
            tokenize=False,
            add_generation_prompt=True,
        )
    except (TemplateError, TypeError) as error:
        raise DataError(
            f"the model's chat template refuses the prompt ({error}); give it the messages the "
            "template knows"
        ) from error
    return text
