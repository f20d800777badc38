"""Models that the renderers library knows: the same tokens as TRL's, and those that TRL refuses."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environments.rendered import RenderedTokens, chat_tokens, known
from actors.environments.tokens import ChatTokens
from actors.models.templates import give
from actors.specs import ModelSpec
from tests.actors.environments.chat import call_text, deep_call, make_tokenizer
from tests.actors.environments.test_tokens import ODD, PLAIN, TEXT, TOOL

pytest.importorskip("renderers")

GLM = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
GLM += ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
THOUGHT = "<think>\nhm\n</think>\n\n"
SAID = {
    "text": f"{THOUGHT}done",
    "a call": f"{THOUGHT}I tell.\n{call_text('tell', a=1, b=[True, None])}",
    "calls": call_text("tell") + call_text("tell", a="\u00e9"),
    "no call": "<tool_call>\n{</tool_call>",
    "an open call": "<tool_call>\n{",
    "a deep call": deep_call(90),
    "a call too deep to be sent": deep_call(110),
    "a call too deep to be parsed": deep_call(5000),
    "half of a character": call_text("tell", a="\ud83d"),
    "arguments of another kind": '<tool_call>{"name": "tell", "arguments": 1}</tool_call>',
}


@cache
def by_trl() -> ChatTokens:
    return ChatTokens(make_tokenizer())


@cache
def by_renderers() -> RenderedTokens:
    from renderers import Qwen3RendererConfig, create_renderer

    tokenizer = make_tokenizer()
    return RenderedTokens(
        tokenizer, create_renderer(tokenizer, Qwen3RendererConfig(thinking_retention="all"))
    )


def rendered_by_glm(tokenizer: Any) -> ChatTokens:
    tokens = known(tokenizer, "TRL knows it not")
    assert isinstance(tokens, RenderedTokens)
    return tokens


def glm(name: str = "zai-org/GLM-5") -> Any:
    tokenizer = make_tokenizer(PLAIN)
    tokenizer.add_special_tokens({"additional_special_tokens": GLM})
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.name_or_path = name
    return tokenizer


BETWEEN = st.one_of(
    st.lists(st.builds(lambda t: {"role": "tool", "name": "tell", "content": t}, ODD), min_size=1),
    st.builds(lambda text: [{"role": "user", "content": text}], TEXT),
)


@pytest.mark.slow
@settings(max_examples=30)
@given(asked=ODD, system=st.none() | ODD, tools=st.booleans(), after=BETWEEN, cut=st.booleans())
def test_both_ways_give_qwen3_the_same_ids(
    asked: str, system: str | None, tools: bool, after: list[dict[str, Any]], cut: bool
) -> None:
    messages = [{"role": "user", "content": asked}]
    messages = messages if system is None else [{"role": "system", "content": system}, *messages]
    offered = (TOOL,) if tools else ()
    prompt = by_trl().prompt(messages, offered)
    assert by_renderers().prompt(messages, offered) == prompt
    tokenizer = by_trl()._tokenizer
    sampled = tokenizer.encode(SAID["a call"]) + [tokenizer.eos_token_id] * (not cut)
    expected = by_trl().after(prompt, sampled, after, offered, cut)
    assert by_renderers().after(prompt, sampled, after, offered, cut) == expected


@pytest.mark.parametrize("said", SAID)
def test_both_ways_read_the_same(said: str) -> None:
    tokenizer = by_trl()._tokenizer
    prompt = by_trl().prompt([{"role": "user", "content": "x"}], (TOOL,))
    sampled = [*tokenizer.encode(SAID[said]), tokenizer.eos_token_id]
    expected = by_trl().read(prompt, sampled, (TOOL,))
    found = by_renderers().read(prompt, sampled, (TOOL,))
    assert found.malformed == expected.malformed
    assert found.message == expected.message


def test_an_end_that_the_run_names_is_no_part_of_what_is_said() -> None:
    known = by_renderers()
    stop, *_ = known._tokenizer.encode("!")
    tokens = RenderedTokens(known._tokenizer, known._renderer, [stop])
    prompt = tokens.prompt([{"role": "user", "content": "x"}], (TOOL,))
    for said in ("text", "a call", "no call"):
        others = [tokens.read(prompt, tokens._tokenizer.encode(SAID[said] + e)) for e in ("", "!")]
        assert others[0] == others[1]


class TestGLM:
    """A turn of it ends with the token that begins the next one, which it samples."""

    def test_a_call_is_read_by_the_types_of_its_tool_and_gone_on_from(self) -> None:
        tokenizer = glm()
        tokens = rendered_by_glm(tokenizer)
        parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
        tool = {"type": "function", "function": {"name": "tell", "parameters": parameters}}
        prompt = tokens.prompt([{"role": "user", "content": "x"}], (tool,))
        said = "hm</think><tool_call>tell<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
        sampled = tokenizer.encode(f"{said}<|observation|>")
        turn = tokens.read(prompt, sampled, (tool,))
        assert not turn.malformed
        (call,) = turn.message["tool_calls"]
        assert call == {"type": "function", "function": {"name": "tell", "arguments": {"a": "1"}}}
        answer = [{"role": "tool", "name": "tell", "content": "told"}]
        ids = tokens.after(prompt, sampled, answer, (tool,))
        assert ids[: len(prompt) + len(sampled)] == [*prompt, *sampled]
        rest = tokenizer.decode(ids[len(prompt) + len(sampled) :])
        assert rest == "<tool_response>told</tool_response><|assistant|><think>"

    def test_what_a_developer_says_is_the_systems(self) -> None:
        tokens = rendered_by_glm(glm())
        told = [
            [{"role": role, "content": "Be brief."}, {"role": "user", "content": "x"}]
            for role in ("developer", "system")
        ]
        ids = tokens.prompt(told[0], ())
        assert ids == tokens.prompt(told[1], ())
        assert "Be brief." in tokens.text(ids)

    def test_a_turn_that_ended_in_its_thinking_is_not_gone_on_from(self) -> None:
        tokenizer = glm()
        tokens = rendered_by_glm(tokenizer)
        prompt = tokens.prompt([{"role": "user", "content": "x"}], ())
        with pytest.raises(ValueError, match="cannot go on from what was sampled"):
            tokens.after(prompt, tokenizer.encode("hm<|user|>"), [{"role": "user", "content": "y"}])


class TestChoice:
    """TRL's way where there is one: the library, installed or not, changes no run that works."""

    @pytest.fixture
    def loaded(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def load(tokenizer: Any, tools: bool = True) -> ChatTokens:
            monkeypatch.setattr("actors.models.loading.load_tokenizer", lambda spec: tokenizer)
            monkeypatch.setattr("actors.environments.rendered.configured_ends", lambda spec: ())
            return chat_tokens(ModelSpec(name=tokenizer.name_or_path, stop_token_ids=[7]), tools)

        return load

    @pytest.mark.parametrize("tools", [True, False])
    def test_a_model_that_trl_refuses_and_the_library_knows(self, loaded: Any, tools: bool) -> None:
        tokenizer = glm()
        tokens = loaded(tokenizer, tools)
        assert isinstance(tokens, RenderedTokens)
        assert tokens.ends == {7, tokenizer.eos_token_id}
        (note,) = tokens.notes
        assert note.startswith("conversations are rendered by the renderers library, for nothing")

    def test_a_model_that_trl_knows(self, loaded: Any) -> None:
        tokenizer = make_tokenizer()
        tokenizer.name_or_path = "Qwen/Qwen3-0.6B"
        assert not isinstance(loaded(tokenizer), RenderedTokens)

    def test_another_name_or_another_tokenizer_than_the_name_promises(self, loaded: Any) -> None:
        other = make_tokenizer(PLAIN)
        other.name_or_path = "zai-org/GLM-5"
        for tokenizer in (glm("mine/GLM-5"), other):
            with pytest.raises(ValueError, match="TRL does not know its chat template"):
                loaded(tokenizer)

    def test_a_template_that_is_given_a_day(self, loaded: Any) -> None:
        tokenizer = glm()
        tokenizer.chat_template += "{# strftime_now #}"
        assert isinstance(loaded(tokenizer), RenderedTokens)
        give(tokenizer, {}, "2026-03-01")
        with pytest.raises(ValueError, match="TRL does not know its chat template"):
            loaded(tokenizer)

    def test_without_the_library(self, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "renderers", None)
        with pytest.raises(ValueError, match="TRL does not know its chat template"):
            loaded(glm())
