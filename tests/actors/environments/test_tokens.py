"""What is trained is what was sampled, bit for bit; or the run was refused before it began."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environments.base import Episode
from actors.environments.play import Clock, Play, Toolbox
from actors.environments.processes import Outcome, ToolCall, ToolProcesses
from actors.environments.record import rows_of
from actors.environments.tokens import ChatTokens
from tests.actors.environments.chat import LIMITS, Script, call_text, deep_call, make_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "tell",
        "description": "Tell.",
        "parameters": {"type": "object", "properties": {}},
    },
}
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
READ = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
NAMES = ("qwen3", "qwen2_5")
VOCABULARY = 270


@cache
def tokenizer_of(name: str) -> Any:
    """One with the chat template that TRL knows by this name."""
    from trl import chat_template_utils

    return make_tokenizer(getattr(chat_template_utils, f"{name}_chat_template"))


@cache
def tokens_of(name: str) -> ChatTokens:
    return ChatTokens(tokenizer_of(name), name)


class Answers:
    """Tools that say one text after the other."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(texts)

    async def call(self, call: ToolCall, seed: int, limit: float) -> Outcome:
        return Outcome(self._texts[seed % len(self._texts)])


def played(name: str, turns: Sequence[Any], answers: Sequence[str], asked: Any) -> Episode:
    box = Toolbox((TOOL,), frozenset({"tell"}), {})
    limits = replace(LIMITS, max_tokens=10**6, max_sampled_tokens=10**6, max_tool_calls=100)
    functions = cast(ToolProcesses, Answers(answers))
    play = Play(tokens_of(name), limits, box, functions, None, Clock(limits))
    script = Script(tokenizer_of(name), turns)
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    return asyncio.run(play.run(messages, 1, script))


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_renders_messages_with_nulls_and_keeps_them(name: str) -> None:
    """As columnar files have them; Qwen's templates write null arguments, say."""
    call = {"id": None, "function": {"name": "tell", "arguments": {"a": 1, "b": None}}}
    asked = [
        {"role": "user", "content": "x", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "y", "tool_calls": None},
    ]
    episode = played(name, ["<think>\n\n</think>\n\ndone"], ["z"], asked)
    text = tokenizer_of(name).decode(episode.calls[0].prompt_ids)
    assert '"arguments": {"a": 1}}' in text
    assert episode.messages[:3] == asked
    call["function"]["arguments"] = '{"a":1}'
    episode = played(name, ["<think>\n\n</think>\n\ndone"], ["z"], asked)
    text = tokenizer_of(name).decode(episode.calls[0].prompt_ids)
    assert ('{"a":1}' if name == "qwen3" else '"arguments": {"a": 1}}') in text


@pytest.mark.parametrize("name", NAMES)
def test_what_a_developer_says_is_the_systems_where_a_template_knows_no_developer(
    name: str,
) -> None:
    asked = [{"role": "user", "content": "x"}]
    developer, system = ([{"role": r, "content": "Be brief."}] for r in ("developer", "system"))
    ids = tokens_of(name).prompt(developer + asked, ())
    assert ids == tokens_of(name).prompt(system + asked, ())
    assert "Be brief." in tokenizer_of(name).decode(ids)


def gpt_oss(tools: bool) -> tuple[Any, ChatTokens]:
    from trl.chat_template_utils import gptoss_chat_template

    tokenizer = make_tokenizer(gptoss_chat_template)
    marks = ["start", "message", "channel", "end", "call", "constrain"]
    tokenizer.add_special_tokens(
        {"eos_token": "<|return|>", "additional_special_tokens": [f"<|{m}|>" for m in marks]}
    )
    return tokenizer, ChatTokens(tokenizer, "gpt-oss", tools)


def test_a_second_instruction_that_a_template_leaves_out_is_refused() -> None:
    tokenizer, tokens = gpt_oss(tools=False)
    said = [{"role": role, "content": f"As {role}."} for role in ("system", "developer", "user")]
    assert "As developer." in tokenizer.decode(tokens.prompt(said[1:], ()))
    with pytest.raises(ValueError, match="leaves out message 1, of role 'developer'; say it in"):
        tokens.prompt(said, ())


def test_a_template_that_forks_at_each_message_of_the_user_is_noted_for_agents() -> None:
    (note,) = gpt_oss(tools=False)[1].notes
    assert note.startswith("each further message of the user begins another row of the episode")
    assert gpt_oss(tools=True)[1].notes == [], "where tools alone follow an answer"
    plain = make_tokenizer(PLAIN)
    plain.response_template = READ
    assert ChatTokens(plain, tools=False).notes == []


TEXT = st.text(
    st.one_of(
        st.sampled_from([*'\n\t \r\u00a0\u2028\u0085aeber{":', "\U0001f600", "\u4e16", "\u0301"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=30,
)
SPECIAL = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<think>", "</think>", "<tool_call>", "<|endoftext|>"]
)
ODD = st.lists(st.one_of(TEXT, SPECIAL), max_size=4).map("".join)
IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=20)


@st.composite
def turns(draw: st.DrawFn) -> list[int]:
    """What a policy might write: any ids, and perhaps calls among them, tokenised oddly."""
    tokenizer = tokenizer_of("qwen3")
    parts = draw(st.lists(st.one_of(IDS, ODD, st.just(call_text("tell"))), max_size=4))
    ids: list[int] = []
    for part in parts:
        if isinstance(part, str):
            chunks = list(part) if draw(st.booleans()) else [part]
            if "<" in part:
                chunks = [part]
            for chunk in chunks:
                ids += tokenizer(chunk, add_special_tokens=False)["input_ids"]
        else:
            ids += part
    return [*ids, tokenizer.eos_token_id]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(data=st.data())
def test_what_is_trained_is_what_was_sampled(name: str, data: st.DataObject) -> None:
    said = data.draw(st.lists(turns(), min_size=1, max_size=4))
    end = tokenizer_of(name)("x")["input_ids"] + [tokenizer_of(name).eos_token_id]
    episode = played(
        name, [*said, end], data.draw(st.lists(ODD, min_size=1, max_size=3)), data.draw(ODD)
    )
    sampled = [list(call.sampled.token_ids) for call in episode.calls]
    assert sampled == [*said, end][: len(sampled)]
    for before, after in zip(episode.calls, episode.calls[1:], strict=False):
        known = [*before.prompt_ids.tolist(), *before.sampled.token_ids]
        assert after.prompt_ids[: len(known)].tolist() == known
    rows = rows_of(episode.calls, episode.finish_reason)
    assert len(rows) == 1
    trained = [list(s.token_ids) for s in rows[0].segments if s.logprobs is not None]
    assert trained == sampled
    assert episode.figures.extended == len(sampled) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(
    answers=st.lists(st.one_of(TEXT, SPECIAL), min_size=1, max_size=3),
    asked=TEXT,
    calls=st.lists(st.integers(1, 3), max_size=4),
)
def test_the_row_is_the_conversation_as_the_template_renders_it(
    name: str, answers: list[str], asked: str, calls: list[int]
) -> None:
    """Where the policy writes what the template would: nothing between turns is lost or doubled."""
    tokenizer, head = tokenizer_of(name), "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    said = [head + "\n".join([call_text("tell")] * count) for count in calls]
    episode = played(name, [*said, head + "done"], answers, asked)
    last = episode.calls[-1]
    row = [*last.prompt_ids.tolist(), *last.sampled.token_ids]
    whole = tokenizer.apply_chat_template(
        episode.messages,
        tools=[TOOL],
        chat_template=tokens_of(name)._template,
        tokenize=True,
        return_dict=False,
    )
    newline = tokenizer("\n")["input_ids"]
    assert [*row, *newline] == whole


HALF = "\\ud83d"  # of an emoji, as a call spells it


@pytest.mark.parametrize(
    ("text", "malformed"),
    [
        (deep_call(90), False),
        (deep_call(110), True),
        (deep_call(5000), True),  # deeper than Python's own parser goes
        *(
            (f"<tool_call>\n{said.replace('HALF', HALF)}\n</tool_call>", True)
            for said in (
                '{"name": "HALF", "arguments": {}}',
                '{"name": "tell", "arguments": {"a": ["xHALF"]}}',
                '{"name": "tell", "arguments": {"HALF": 1}}',
            )
        ),
        (call_text("tell", a="\U0001f600"), False),
    ],
    ids=["deep", "too deep", "past Python", "in the name", "in arguments", "in a key", "whole"],
)
def test_a_call_that_nobody_could_send_is_no_call(text: str, malformed: bool) -> None:
    tokens = tokens_of("qwen2_5")
    turn = tokens.read([], tokenizer_of("qwen2_5").encode(text), (TOOL,))
    assert (turn.malformed, "tool_calls" in turn.message) == (malformed, not malformed)


class TestRefused:
    """One line each, before the run."""

    @pytest.mark.parametrize(
        ("template", "read", "reason"),
        [
            (None, READ, "has no chat template"),
            (
                "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
                READ,
                "does not render tool calls and their answers",
            ),
            (PLAIN, None, "TRL does not know its chat template; set response_template"),
            (
                PLAIN.replace(
                    "{{ m.content or '' }}", "{{ (m.content or '') if loop.last else '-' }}"
                )
                .replace("{% for call in", "{{ m.content if m.role == 'tool' }}{% for call in")
                .replace("<|im_end|>\n", "{{ 'last' if loop.last }}"),
                READ,
                "renders earlier messages another way",
            ),
        ],
    )
    def test_a_tokenizer_that_cannot_carry_tools(
        self, template: str | None, read: Any, reason: str
    ) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.response_template = read
        with pytest.raises(ValueError, match=reason) as refused:
            ChatTokens(tokenizer, "model 'x'")
        assert "model 'x'" in str(refused.value)
        assert "\n" not in str(refused.value)

    def test_a_template_that_only_appends_is_taken_as_it_is(self) -> None:
        tokenizer = make_tokenizer(PLAIN)
        tokenizer.response_template = READ
        tokens = ChatTokens(tokenizer)
        assert tokens.notes == []
        assert (
            tokens.between([{"role": "tool", "name": "a", "content": "b"}])
            == (tokenizer("\n<|im_start|>tool\nb<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
        )

    @pytest.mark.parametrize("cut", [False, True])
    def test_where_another_token_than_eos_ends_a_turn_what_follows_it_is_kept(
        self, cut: bool
    ) -> None:
        """As with Gemma, whose turns end by `<end_of_turn>` and a newline, and its eos is another
        token. The user's end of turn in the prefix is not the policy's."""
        tokenizer = make_tokenizer(PLAIN)
        tokenizer.response_template = READ
        end = tokenizer.eos_token_id
        tokenizer.eos_token = "<|endoftext|>"
        tokens = ChatTokens(tokenizer, stops=(end,))
        follows = "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer("<|im_end|>" * cut + follows)["input_ids"]
        assert tokens.between([{"role": "user", "content": "b"}], cut) == ids

    def test_one_that_drops_earlier_thinking_gives_way_to_trls_own(self) -> None:
        assert len(tokenizer_of("qwen3")) == VOCABULARY
        assert len(tokens_of("qwen3").notes) == 1
        assert (
            "TRL's training template, which only appends, takes its place"
            in (tokens_of("qwen3").notes[0])
        )
