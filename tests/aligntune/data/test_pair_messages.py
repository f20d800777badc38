"""Pairs of messages: calls of tools, thinking, ShareGPT's form, and one end to each side."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from aligntune.data.dropped import RowRules
from aligntune.data.errors import DataError
from aligntune.data.pair_tokens import tokenise_pairs
from aligntune.data.pairs import Pair, to_pair
from aligntune.data.row_tokens import RowTokens
from tests.aligntune.data.conftest import byte_tokenizer
from tests.aligntune.data.test_messages import (
    DEVELOPER,
    GPT_OSS,
    QWEN,
    SYSTEM,
    TOOLS,
    USER,
    called,
    spelled,
    tool,
)
from tests.aligntune.data.test_preference import COLUMNS, Table, assistant, row, user

KINDS = ("dpo", "reward_model")
DROPS_THINKING = byte_tokenizer(
    template="{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}"
    "</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokens(
    tokenizer: Any, kind: Literal["dpo", "reward_model"], *rows: Any, **rules: Any
) -> RowTokens:
    template = rules.pop("apply_chat_template", True)
    given = {"bad_rows": "error", "long_rows": "error", "max_dropped_fraction": 1.0} | rules
    read = tokenise_pairs(Table(*rows), tokenizer, kind, **COLUMNS, apply_chat_template=template)
    return read.within(1000, RowRules(**given, length_key="data.max_length"))


def sides(tokenizer: Any, kind: Literal["dpo", "reward_model"], *rows: Any, **rules: Any) -> Any:
    columns = tokens(tokenizer, kind, *rows, **rules).columns
    asked = columns.get("prompt_ids", [[]] * len(rows))
    return [
        tuple(tokenizer.decode([int(token) for token in (*prompt, *side)]) for side in pair)
        for prompt, *pair in zip(asked, columns["chosen_ids"], columns["rejected_ids"], strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_developers_message_is_the_systems_and_one_that_is_left_out_is_refused(kind: Any) -> None:
    answers = {"chosen": [assistant("3")], "rejected": [assistant("no idea")]}
    for template in QWEN:
        prompts = ([{**DEVELOPER, "role": role}, USER] for role in ("developer", "system"))
        rows = ({"prompt": prompt, **answers} for prompt in prompts)
        one, other = sides(byte_tokenizer(template=template), kind, *rows)
        assert all("As developer." in side for side in one)
        assert one == other
    with pytest.raises(DataError, match="leaves out message 1, of role 'developer'"):
        tokens(GPT_OSS, kind, {"prompt": [SYSTEM, DEVELOPER, USER], **answers})


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_only_calls_a_tool_is_an_answer(kind: Any) -> None:
    schema = tool("weather", "city")
    pair = {
        "prompt": [USER],
        "chosen": [called("weather", city="Oslo", zone=None)],
        "rejected": [assistant("no idea")],
        "tools": [schema],
    }
    as_text = {**pair, "chosen": [spelled(called("weather", city="Oslo"))]}
    (chosen, rejected), written = sides(TOOLS, kind, pair, as_text)
    assert written == (chosen, rejected), "arguments may be JSON text"
    assert chosen.startswith("<tools>[{")
    assert chosen.endswith(
        '<assistant><call>{"name": "weather", "arguments": {"city": "Oslo"}}</call></assistant>'
    )
    assert rejected.endswith("<assistant>no idea</assistant>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_that_leaves_out_tools_or_calls_is_named(kind: Any, chat: Any) -> None:
    with_tools = row("1", "2", "3") | {"tools": [tool("weather", "city")]}
    with pytest.raises(DataError, match="row 0: the chat template leaves out the row's tools"):
        tokens(chat, kind, with_tools)
    calls = {"prompt": [USER], "chosen": [called("weather")], "rejected": [assistant("3")]}
    with pytest.raises(DataError, match="leaves the call of tool 'weather' out of chosen"):
        tokens(chat, kind, calls)
    with pytest.raises(DataError, match="no chat template to say where they go"):
        tokens(byte_tokenizer(), kind, with_tools, apply_chat_template=False)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_whose_thinking_the_template_drops_are_refused_or_counted(kind: Any) -> None:
    thinks = row("1+1", "<think>one and one</think>2", "3"), row("1+2", "3", "<think>x</think>4")
    rows = (row("1+3", "4", "5"), *thinks)
    with pytest.raises(DataError, match=r"leaves thinking out of chosen.*rows 2 too"):
        tokens(DROPS_THINKING, kind, *rows)
    kept = tokens(DROPS_THINKING, kind, *rows, bad_rows="drop")
    assert (len(kept), kept.dropped.reasons) == (1, {"not whole": 2})
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used \(2 not whole\)"):
        tokens(DROPS_THINKING, kind, *rows, bad_rows="drop", max_dropped_fraction=0.1)
    ((chosen, _), *_) = sides(TOOLS, kind, thinks[0])
    assert "<think>one and one</think>2" in chosen, "another template keeps it"


def test_thinking_of_earlier_turns_is_the_templates_own_affair() -> None:
    asked = [user("1"), assistant("<think>x</think>2"), user("3")]
    pair = {"prompt": asked, "chosen": [assistant("4")], "rejected": [assistant("5")]}
    ((chosen, _),) = sides(DROPS_THINKING, "dpo", pair)
    assert chosen == "<user>1</user><assistant>2</assistant><user>3</user><assistant>4</assistant>"


def test_sharegpt_pairs_are_read() -> None:
    pair = {
        "conversations": [{"from": "human", "value": "p"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    expected = Pair([user("p")], [assistant("a")], [assistant("b")])
    assert to_pair(pair["conversations"], pair["chosen"], pair["rejected"]) == expected
    ((chosen, _),) = sides(TOOLS, "dpo", pair)
    assert chosen == "<user>p</user><assistant>a</assistant>"


@pytest.mark.parametrize("kind", KINDS)
def test_each_side_ends_once_where_the_tokenizer_ends_every_text(kind: Any) -> None:
    tokenizer = byte_tokenizer(bos=True, eos=True)
    ((chosen, rejected),) = sides(
        tokenizer, kind, row("1+1=", "2", "3<eos>"), apply_chat_template=False
    )
    assert (chosen, rejected) == ("<bos>1+1=2<eos>", "<bos>1+1=3<eos>")
