"""A prompt is a string or messages; what the model sees of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from aligntune.data.errors import DataError
from aligntune.data.formats import check_prompt, render

USER = {"role": "user", "content": "Hi"}


def test_a_string_becomes_a_user_message(chat: Any) -> None:
    assert render("2+2?", chat) == "<user>2+2?</user><assistant>"


def test_messages_are_rendered_up_to_the_assistants_turn(chat: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "数"}]
    expected = "<user>Hi</user><assistant>Yes?</assistant><user>数</user><assistant>"
    assert render(check_prompt(messages), chat) == expected


@pytest.mark.parametrize("prompt", ["Hi", [USER]])
def test_the_system_prompt_comes_first(chat: Any, prompt: Any) -> None:
    assert render(prompt, chat, system_prompt="Be brief.") == (
        "<system>Be brief.</system><user>Hi</user><assistant>"
    )


@pytest.mark.parametrize("role", ["system", "developer"])
def test_two_system_prompts_are_refused(chat: Any, role: str) -> None:
    messages = [{"role": role, "content": "A"}, USER]
    assert render(messages, chat).startswith(f"<{role}>A")
    with pytest.raises(DataError, match="remove one"):
        render(messages, chat, system_prompt="B")


def test_without_a_template_a_string_stays_as_it_is(plain: Any, chat: Any) -> None:
    assert render(" as it is\n", plain) == " as it is\n"
    assert render("<user>x", chat, apply_chat_template=False) == "<user>x"


def test_without_a_template_messages_are_refused(plain: Any, chat: Any) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        render([USER], plain)
    with pytest.raises(DataError, match="apply_chat_template is false"):
        render([USER], chat, apply_chat_template=False)


def test_without_a_template_a_system_prompt_is_refused(plain: Any) -> None:
    with pytest.raises(DataError, match=r"data\.system_prompt"):
        render("x", plain, system_prompt="y")


def test_what_the_template_refuses_is_a_data_error(chat: Any) -> None:
    with pytest.raises(DataError, match="no tools here"):
        render([USER, {"role": "tool", "content": "1"}], chat)


def test_null_fields_of_columnar_files_are_left_out() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    messages = [USER | {"tool_calls": None}, call, {"role": "tool", "content": "1"}]
    assert check_prompt(messages) == [
        USER,
        {"role": "assistant", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "1"},
    ]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "missing or null"),
        ("", "empty"),
        (" \n", "empty"),
        (3, "type int"),
        (USER, "type dict"),
        ([], "empty list"),
        (["Hi"], "message 0 .* type str"),
        ([USER, {"content": "x"}], "message 1 .* role None"),
        ([{"role": "human", "content": "x"}], "role 'human'"),
        ([{"role": "user"}], "message 0 .* content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content of type list"),
        ([USER, {"role": "assistant", "content": "x"}], "assistant's"),
        ("\ud83e", r"surrogate pair \(U\+D83E\)"),
        ([{"role": "user", "content": "\udc00"}], "message 0 .*surrogate"),
    ],
)
def test_what_is_no_prompt_is_refused(value: Any, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        check_prompt(value)
    assert "\n" not in str(caught.value)
