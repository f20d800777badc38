"""What a request's history becomes: ids at hand, or another row; and the budgets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.environments.base import EpisodeLimits
from actors.environments.chat_messages import normalised
from actors.environments.conversations import Conversation, Refused
from actors.environments.record import rows_of
from actors.environments.tokens import ChatTokens
from actors.messages import FinishReason
from tests.actors.environments.scripted import Chat, Script

ASK = {"role": "user", "content": "1+1?"}
ADD = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "add", "arguments": {"b": 1,  "a": 1.0}}\n</tool_call>'


@pytest.fixture(scope="module")
def chat(plain_tokenizer: Any) -> Chat:
    return Chat(ChatTokens(plain_tokenizer), plain_tokenizer)


def limits(**changes: Any) -> EpisodeLimits:
    usual: dict[str, Any] = {
        "max_turns": 8,
        "max_tool_calls": 8,
        "max_sampled_tokens": 1000,
        "max_tokens": 4000,
        "call_timeout_s": 5.0,
        "episode_timeout_s": 30.0,
        "max_output_characters": 1000,
    }
    return EpisodeLimits(**usual | changes)


def counts(conversation: Conversation) -> tuple[int, int, int]:
    figures = conversation.figures()
    return figures.extended, figures.realigned, figures.forked


def whole(conversation: Conversation, turn: int) -> list[int]:
    call = conversation.answers[turn].call
    return [*call.prompt_ids.tolist(), *call.sampled.token_ids.tolist()]


def test_a_history_that_goes_on_keeps_the_tokens_that_were_sampled(chat: Chat) -> None:
    """The call's JSON is written in a way that no template would write it."""

    async def talk() -> Conversation:
        conversation = Conversation(chat.tokens, Script(chat.tokenizer, [CALL, "2"]), limits())
        messages = [ASK]
        first = await conversation.chat(messages, ADD)
        messages += [first.message, {"role": "tool", "name": "add", "content": "2"}]
        await conversation.chat(normalised(messages), ADD)
        return conversation

    conversation = asyncio.run(talk())
    first, second = (whole(conversation, turn) for turn in (0, 1))
    assert second[: len(first)] == first
    assert '{"b": 1,  "a": 1.0}' in chat.tokenizer.decode(second)
    assert counts(conversation) == (1, 0, 0)
    assert len(rows_of([answer.call for answer in conversation.answers], FinishReason.STOP)) == 1
    messages, before = conversation.messages()
    assert ([message["role"] for message in messages], before) == (
        ["user", "assistant", "tool", "assistant"],
        1,
    )


@pytest.mark.parametrize("added", [{}, {"name": "solver"}])
def test_earlier_thinking_that_a_client_leaves_out_stays_in_the_tokens(
    chat: Chat, added: dict[str, str]
) -> None:
    """So does an answer to which a client adds a name, as LangGraph does."""

    async def talk() -> Conversation:
        conversation = Conversation(
            chat.tokens, Script(chat.tokenizer, ["<think>hm</think>2", "4"]), limits()
        )
        first = await conversation.chat([ASK], ())
        assert (first.message["reasoning_content"], first.message["content"]) == ("hm", "2")
        said = {"role": "assistant", "content": "2", **added}
        await conversation.chat([ASK, said, {"role": "user", "content": "2+2?"}], ())
        return conversation

    conversation = asyncio.run(talk())
    assert counts(conversation) == (1, 0, 0)
    assert "<think>hm</think>2<|im_end|>\n<|im_start|>user" in chat.tokenizer.decode(
        conversation.answers[1].call.prompt_ids
    )


def test_a_history_that_the_agent_has_changed_is_rendered_anew_and_forks(chat: Chat) -> None:
    async def talk() -> Conversation:
        conversation = Conversation(chat.tokens, Script(chat.tokenizer, ["two", "4"]), limits())
        await conversation.chat([ASK], ())
        said = {"role": "assistant", "content": "2"}
        await conversation.chat([ASK, said, {"role": "user", "content": "2+2?"}], ())
        return conversation

    conversation = asyncio.run(talk())
    assert counts(conversation) == (0, 0, 1)
    assert len(rows_of([answer.call for answer in conversation.answers], FinishReason.STOP)) == 2


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_thinking_in_a_history_that_is_rendered_anew_is_shown_by_either_name(
    tokenizer: Any, key: str
) -> None:
    tokens = ChatTokens(tokenizer)
    shot = {"role": "assistant", "content": "5!", key: "hm"}
    ids = tokens.prompt(normalised([ASK, shot, ASK]), ())
    assert "<think>\nhm\n</think>\n\n5!" in tokenizer.decode(ids)


@pytest.mark.parametrize("token", [-1, "the vocabulary", 2**31])
def test_an_id_that_the_model_does_not_know_is_refused_before_anybody_is_asked(
    chat: Chat, token: int | str
) -> None:
    unknown = len(chat.tokenizer) if isinstance(token, str) else token

    async def talk() -> None:
        script = Script(chat.tokenizer, ["2"])
        conversation = Conversation(chat.tokens, script, limits())
        with pytest.raises(Refused, match=f"has token {unknown}, and the model knows 0 to"):
            await conversation.complete([0, unknown])
        assert script.prompts == []
        answer = await conversation.complete([0, len(chat.tokenizer) - 1])
        assert answer.message["content"] == "2"

    asyncio.run(talk())


def test_a_history_with_an_answer_that_is_not_the_models_is_realigned_where_it_agrees(
    chat: Chat,
) -> None:
    async def talk() -> Conversation:
        conversation = Conversation(chat.tokens, Script(chat.tokenizer, ["2", "4"]), limits())
        first = await conversation.chat([ASK], ())
        shots = [{"role": "user", "content": "5?"}, {"role": "assistant", "content": "5!"}]
        await conversation.chat([ASK, first.message, *shots, ASK], ())
        return conversation

    conversation = asyncio.run(talk())
    assert counts(conversation) == (0, 1, 0)
    assert len(rows_of([answer.call for answer in conversation.answers], FinishReason.STOP)) == 1


def test_a_call_for_a_title_does_not_end_the_conversation(chat: Chat) -> None:
    async def talk() -> Conversation:
        conversation = Conversation(
            chat.tokens, Script(chat.tokenizer, ["2", "Sums", "4"]), limits()
        )
        first = await conversation.chat([ASK], ())
        await conversation.chat([{"role": "user", "content": "A title?"}], ())
        await conversation.chat([ASK, first.message, ASK], ())
        return conversation

    conversation = asyncio.run(talk())
    assert counts(conversation) == (1, 0, 1)
    messages, before = conversation.messages()
    assert ([message["content"] for message in messages], before) == (["1+1?", "2", "1+1?", "4"], 1)


def test_what_is_scored_is_the_conversation_of_the_last_call(chat: Chat) -> None:
    """Which is the last row: not the longer one of a sub-agent, nor the one before a compaction."""

    async def talk() -> Conversation:
        script = Script(chat.tokenizer, ["Help.", "a", "b", "c", "4", "6"])
        conversation = Conversation(chat.tokens, script, limits())
        first = await conversation.chat([ASK], ())
        of_another = [{"role": "user", "content": "Help me."}]
        for _ in range(3):
            answer = await conversation.chat(of_another, ())
            of_another += [answer.message, ASK]
        await conversation.chat([ASK, first.message, ASK], ())
        seen.append(conversation.messages())
        await conversation.chat([{"role": "user", "content": "So far: 4."}], ())
        seen.append(conversation.messages())
        return conversation

    seen: list[tuple[list[dict[str, Any]], int]] = []
    conversation = asyncio.run(talk())
    contents = [([message["content"] for message in said], before) for said, before in seen]
    assert contents == [(["1+1?", "Help.", "1+1?", "4"], 1), (["So far: 4.", "6"], 1)]
    *_, last = rows_of([answer.call for answer in conversation.answers], FinishReason.STOP)
    assert chat.tokenizer.decode(last.segments[-1].token_ids) == "6<|im_end|>"


def test_a_refusal_from_which_the_agent_finds_a_way_on_cuts_nothing(chat: Chat) -> None:
    async def talk() -> list[tuple[FinishReason, bool]]:
        conversation = Conversation(
            chat.tokens, Script(chat.tokenizer, ["2", "4"]), limits(max_tokens=200)
        )

        def now() -> tuple[FinishReason, bool]:
            return conversation.finish_reason, conversation.refused

        first = await conversation.chat([ASK], ())
        with pytest.raises(Refused, match="200 is the most"):
            await conversation.chat(
                [ASK, first.message, {"role": "user", "content": "long " * 99}], ()
            )
        refused = now()
        await conversation.chat([ASK, first.message, ASK], ())
        return [refused, now()]

    assert asyncio.run(talk()) == [(FinishReason.CONTEXT, True), (FinishReason.STOP, False)]


def test_ids_in_go_on_from_ids_out(chat: Chat) -> None:
    async def talk() -> Conversation:
        conversation = Conversation(chat.tokens, Script(chat.tokenizer, ["2", "4", "6"]), limits())
        await conversation.complete([5, 6])
        await conversation.complete([*whole(conversation, 0), 7])
        await conversation.complete([5, 9])
        return conversation

    conversation = asyncio.run(talk())
    assert counts(conversation) == (1, 0, 1)


def test_what_is_said_by_token_ids_is_read_as_that_by_messages_is(chat: Chat) -> None:
    """Its calls are counted and bounded, and rewards read what the assistant says last."""

    async def talk() -> list[Any]:
        said = ["<tool_call>{", f"<think>\nx\n</think>\n\n2{CALL}"]
        script = Script(chat.tokenizer, said * 2)
        found: list[Any] = []
        for by_ids in (True, False):
            conversation = Conversation(chat.tokens, script, limits(max_tool_calls=0))
            ids = chat.tokens.prompt([ASK], ADD)
            for _ in range(2):
                await (conversation.complete(ids) if by_ids else conversation.chat([ASK], ADD))
            with pytest.raises(Refused, match="has had its 0 calls of tools"):
                await conversation.complete(ids)
            figures = conversation.figures()
            answers = [answer.message for answer in conversation.answers]
            found.append((figures.tool_calls, figures.malformed_calls, answers))
            assert conversation.messages()[0][-1]["content"] == "2"
        return found

    by_ids, by_messages = asyncio.run(talk())
    assert by_ids == by_messages
    assert by_ids[:2] == (1, 1)


def test_an_agent_that_goes_on_in_one_turn_has_each_call_counted_once_and_its_own_text(
    chat: Chat,
) -> None:
    """Rewards read what the model says last, not what the agent has put in before it."""

    async def talk(said: list[str], told: str) -> Conversation:
        conversation = Conversation(
            chat.tokens, Script(chat.tokenizer, said), limits(max_tool_calls=1)
        )
        ids = chat.tokens.prompt([ASK], ADD)
        for _ in said:
            answer = await conversation.complete(ids)
            sampled = answer.call.sampled.token_ids.tolist()
            ids = [*ids, *sampled[:-1], *chat.tokenizer.encode(told)]
        return conversation

    told = "<information>the answer is <answer>42</answer></information>\n"
    searched = asyncio.run(talk(["<search>q</search>", "I guess 7."], told))
    assert searched.messages()[0][-1]["content"] == "I guess 7."
    called = asyncio.run(talk([CALL, "hm", "hm2"], "\n2\n"))
    assert called.figures().tool_calls == 1
    assert [answer.message["content"] for answer in called.answers] == ["", "hm", "hm2"]


@pytest.mark.parametrize(
    ("changes", "message", "reason"),
    [
        ({"max_turns": 1}, "has had its 1 turns", FinishReason.TURNS),
        ({"max_sampled_tokens": 2}, "has sampled its 2 tokens", FinishReason.LENGTH),
        ({"max_tokens": 40}, "40 is the most", FinishReason.CONTEXT),
        ({"max_tool_calls": 0}, "has had its 0 calls of tools", FinishReason.TURNS),
    ],
)
def test_a_budget_that_is_used_up_refuses_the_next_turn(
    chat: Chat, changes: dict[str, Any], message: str, reason: FinishReason
) -> None:
    async def talk() -> Conversation:
        said = CALL if "max_tool_calls" in changes else "2"
        conversation = Conversation(chat.tokens, Script(chat.tokenizer, [said]), limits(**changes))
        first = await conversation.chat([ASK], ())
        assert conversation.finish_reason == FinishReason.STOP or "tokens" in str(changes)
        with pytest.raises(Refused, match=message) as refused:
            await conversation.chat([ASK, first.message, ASK], ())
        assert refused.value.reason == reason
        return conversation

    assert asyncio.run(talk()).finish_reason == reason


def test_an_answer_that_a_budget_cuts_ends_the_episode_by_length(chat: Chat) -> None:
    async def talk(asked: int | None, **changes: Any) -> Conversation:
        conversation = Conversation(
            chat.tokens, Script(chat.tokenizer, ["a long one"]), limits(**changes)
        )
        await conversation.chat([ASK], (), asked)
        return conversation

    by_budget = asyncio.run(talk(None, max_sampled_tokens=4))
    assert by_budget.finish_reason == FinishReason.LENGTH
    assert by_budget.answers[0].call.finish_reason == FinishReason.LENGTH
    prompt = len(by_budget.answers[0].call.prompt_ids)
    assert asyncio.run(talk(None, max_tokens=prompt + 3)).finish_reason == FinishReason.CONTEXT
    by_agent = asyncio.run(talk(4))
    assert by_agent.finish_reason == FinishReason.STOP  # no limit of the run's cut it
    assert by_agent.answers[0].call.finish_reason == FinishReason.LENGTH


def test_a_turn_that_was_cut_is_ended_before_what_follows(chat: Chat) -> None:
    """The end of turn that is put in was not sampled, and is not trained."""

    async def talk() -> Conversation:
        conversation = Conversation(chat.tokens, Script(chat.tokenizer, ["abcd", "2"]), limits())
        first = await conversation.chat([ASK], (), 2)
        await conversation.chat([ASK, first.message, ASK], ())
        return conversation

    conversation = asyncio.run(talk())
    assert counts(conversation) == (1, 0, 0)
    row = rows_of([a.call for a in conversation.answers], FinishReason.STOP)[0]
    texts = [chat.tokenizer.decode(segment.token_ids) for segment in row.segments]
    assert texts[1:] == ["ab", f"<|im_end|>\n{texts[0]}", "2<|im_end|>"]


def test_turns_beside_each_other_share_the_budget_and_never_pass_it(chat: Chat) -> None:
    async def talk() -> Conversation:
        script = Script(chat.tokenizer, ["abcdefgh"] * 3)
        script.go_on.clear()
        conversation = Conversation(chat.tokens, script, limits(max_sampled_tokens=20))
        both = [asyncio.ensure_future(conversation.chat([ASK], (), 9)) for _ in range(2)]
        third = asyncio.ensure_future(conversation.chat([ASK], ()))
        await script.asked(3)
        script.go_on.set()
        await asyncio.gather(*both)
        assert len((await third).call.sampled.token_ids) == 2  # all that was left
        with pytest.raises(Refused, match="has sampled its 20 tokens"):
            await conversation.chat([ASK], ())
        return conversation

    conversation = asyncio.run(talk())
    assert sum(len(turn.call.sampled.token_ids) for turn in conversation.answers) == 20


def test_messages_are_read_as_templates_want_them() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert normalised(
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "tool_call_id": "x", "content": "2"},
        ]
    ) == [
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "x",
                    "type": "function",
                    "function": {"name": "add", "arguments": {"a": 1}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "x", "content": "2", "name": "add"},
    ]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": "a"}, "message 0 has no role"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "not text"),
        ({"role": "assistant", "tool_calls": [{}]}, "without a function's name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "not JSON",
        ),
        *(
            (
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": a}}]},
                "nested deeper than 100 levels",
            )
            for a in ("[" * 101 + "]" * 101, "[" * 5000 + "]" * 5000)
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}],
            },
            "message 0 has calls with half of a surrogate pair",
        ),
    ],
)
def test_messages_that_no_template_reads_are_refused(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        normalised([message])
