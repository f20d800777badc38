"""Sessions as OpenAI's own client, and any other, sees them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from actors.environments import sessions
from actors.environments.base import EpisodeFailed
from actors.environments.conversations import Conversation
from actors.environments.sessions import Session, SessionServer, require_free
from actors.environments.tokens import ChatTokens
from tests.actors.environments.scripted import Chat, Script, Text
from tests.actors.environments.test_conversations import ADD, ASK, CALL, limits

ARGUMENTS = {"b": 1, "a": 1.0}


@pytest.fixture(scope="module")
def chat(plain_tokenizer: Any) -> Chat:
    return Chat(ChatTokens(plain_tokenizer), plain_tokenizer)


class Served:
    """A server with one session, and a script that answers in it."""

    def __init__(self, server: SessionServer, session: Session, script: Script) -> None:
        self.server = server
        self.session = session
        self.script = script
        self.conversation = session.conversation
        self.client = AsyncOpenAI(base_url=session.url, api_key=session.key)

    async def post(self, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        """What any program would send."""
        headers = {"Authorization": f"Bearer {self.session.key}", **headers}
        async with httpx.AsyncClient(timeout=20) as client:
            return await client.post(f"{self.session.url}/{path}", json=body, headers=headers)


@asynccontextmanager
async def serving(chat: Chat, said: Sequence[Text], **changes: Any) -> AsyncIterator[Served]:
    server = SessionServer(chat.tokens, "policy", "127.0.0.1", None)
    await server.start()
    try:
        script = Script(chat.tokenizer, said)
        with server.session(Conversation(chat.tokens, script, limits(**changes))) as session:
            served = Served(server, session, script)
            async with served.client:
                yield served
    finally:
        await server.close()


def run(talk: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(talk(), 60))


@pytest.mark.slow
def test_an_openai_client_talks_and_calls_tools(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, [f"Adding.{CALL}", "It is 2."]) as served:
            messages: list[Any] = [ASK]
            first = await served.client.chat.completions.create(
                model="gpt-5", messages=messages, tools=ADD
            )
            choice = first.choices[0]
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Adding.")
            call = choice.message.tool_calls[0]
            assert call.function.name == "add"
            assert json.loads(call.function.arguments) == ARGUMENTS
            messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
            second = await served.client.chat.completions.create(
                model="gpt-5", messages=messages, tools=ADD
            )
            assert second.choices[0].finish_reason == "stop"
            assert second.choices[0].message.content == "It is 2."
            assert (
                second.usage.total_tokens
                == len(served.conversation.answers[1].call.prompt_ids) + len("It is 2.") + 1
            )
            assert second.id != first.id
            assert served.conversation.figures().extended == 1

    run(talk)


def test_the_blocking_client_talks_from_a_thread(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["2"]) as served:
            client = OpenAI(base_url=served.session.url, api_key=served.session.key)
            answer = await asyncio.to_thread(
                client.chat.completions.create, model="m", messages=[ASK]
            )
            assert answer.choices[0].message.content == "2"
            models = await asyncio.to_thread(lambda: client.models.list().data)
            assert [model.id for model in models] == ["policy"]

    run(talk)


def test_a_stream_brings_the_same_answer_in_pieces(chat: Chat) -> None:
    async def talk() -> None:
        async with (
            serving(chat, [f"Adding.{CALL}"]) as served,
            served.client.chat.completions.stream(
                model="m",
                messages=[ASK],
                tools=ADD,
                stream_options={"include_usage": True},
                extra_body={"return_token_ids": True},
            ) as stream,
        ):
            answer = await stream.get_final_completion()
            choice = answer.choices[0]
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Adding.")
            assert json.loads(choice.message.tool_calls[0].function.arguments) == ARGUMENTS
            assert answer.usage.completion_tokens == len(
                served.conversation.answers[0].call.sampled.token_ids
            )

    run(talk)


def test_token_ids_and_log_probs_are_those_that_are_trained_on(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["zwei ü", "4", "6"]) as served:
            answer = await served.client.chat.completions.create(
                model="m",
                messages=[ASK],
                logprobs=True,
                extra_body={"return_token_ids": True},
            )
            call = served.conversation.answers[0].call
            assert answer.prompt_token_ids == call.prompt_ids.tolist()
            assert answer.choices[0].token_ids == call.sampled.token_ids.tolist()
            content = answer.choices[0].logprobs.content
            assert [entry.logprob for entry in content] == call.sampled.logprobs.tolist()
            assert [entry.token for entry in content] == [
                f"token_id:{i}" for i in call.sampled.token_ids
            ]
            assert bytes(b for e in content for b in e.bytes).startswith(b"zwei ")
            chunks = await served.client.chat.completions.create(
                model="m",
                messages=[ASK],
                stream=True,
                logprobs=True,
                extra_body={"return_token_ids": True, "return_tokens_as_token_ids": False},
            )
            got = [chunk async for chunk in chunks]
            call = served.conversation.answers[1].call
            assert got[0].prompt_token_ids == call.prompt_ids.tolist()
            ids = [getattr(chunk.choices[0], "token_ids", None) or [] for chunk in got]
            assert [i for several in ids for i in several] == call.sampled.token_ids.tolist()
            names = [e.token for c in got if (p := c.choices[0].logprobs) for e in p.content]
            assert names[:1] == ["4"]
            by_id = await served.client.chat.completions.create(
                model="m",
                messages=[ASK],
                logprobs=True,
                extra_body={"return_tokens_as_token_ids": True},
            )
            ids = served.conversation.answers[2].call.sampled.token_ids
            names = [entry.token for entry in by_id.choices[0].logprobs.content]
            assert names == [f"token_id:{i}" for i in ids]

    run(talk)


def test_ids_in_are_answered_with_ids_out(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, [f"2{CALL}", f"4{CALL}"]) as served:
            root = served.session.url.removesuffix("/v1")
            body = {
                "model": "m",
                "token_ids": [5, 6],
                "sampling_params": {
                    "max_tokens": 999,
                    "logprobs": 1,
                    "stop_token_ids": [chat.tokenizer.eos_token_id],
                    "routed_experts_prompt_start": 1,  # of verifiers, whatever the model
                },
            }
            async with httpx.AsyncClient() as client:
                key = {"Authorization": f"Bearer {served.session.key}"}
                ask = partial(client.post, f"{root}/inference/v1/generate", headers=key)
                reply = await ask(json=body)
                other = {**body, "sampling_params": {"stop_token_ids": [257]}}
                refused = await ask(json=other)
            assert refused.status_code == 400
            message = refused.json()["error"]["message"]
            assert "token 257 ends no turn" in message
            assert "model.stop_token_ids" in message
            choice = reply.json()["choices"][0]
            call = served.conversation.answers[0].call
            assert (choice["finish_reason"], choice["token_ids"]) == (
                "stop",
                call.sampled.token_ids.tolist(),
            )
            found = [entry["logprob"] for entry in choice["logprobs"]["content"]]
            assert found == call.sampled.logprobs.tolist()
            again = await served.client.completions.create(
                model="m",
                prompt=[5, 6, *choice["token_ids"], 7],
                logprobs=1,
                extra_body={"return_token_ids": True},
            )
            call = served.conversation.answers[1].call
            assert again.choices[0].text == f"4{CALL}", "the text as it was sampled"
            assert again.choices[0].finish_reason == "stop"
            assert again.choices[0].token_ids == call.sampled.token_ids.tolist()
            assert again.choices[0].prompt_token_ids == call.prompt_ids.tolist()
            assert again.choices[0].logprobs.token_logprobs == call.sampled.logprobs.tolist()
            assert served.conversation.figures().extended == 1

    run(talk)


@pytest.mark.slow
def test_a_retry_gets_the_one_answer_and_a_new_request_a_new_one(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["2", "two"]) as served:
            served.script.go_on.clear()
            body = {"model": "m", "messages": [ASK]}
            first = asyncio.ensure_future(served.post("chat/completions", body))
            await served.script.asked(1)
            first.cancel()  # the client gives up while the model still writes
            with pytest.raises(asyncio.CancelledError):
                await first
            retry = {"x-stainless-retry-count": "1"}
            second = asyncio.ensure_future(served.post("chat/completions", body, **retry))
            served.script.go_on.set()
            answer = (await second).json()
            again = (await served.post("chat/completions", body, **retry)).json()
            assert answer["choices"][0]["message"]["content"] == "2"
            assert (again["id"], again["choices"]) == (answer["id"], answer["choices"])
            other = (await served.post("chat/completions", body)).json()
            assert other["choices"][0]["message"]["content"] == "two"
            assert len(served.conversation.answers) == len(served.script.prompts) == 2

    run(talk)


def test_an_equal_request_takes_up_a_turn_whose_client_has_gone(chat: Chat) -> None:
    """Without a word of its being sent again, as most clients do."""

    async def talk() -> None:
        async with serving(chat, ["2", "two"]) as served:
            served.script.go_on.clear()
            body = {"model": "m", "messages": [ASK], "max_tokens": 9}
            first = asyncio.ensure_future(served.post("chat/completions", body))
            await served.script.asked(1)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            ((sent,),) = served.session._sent.values()
            while not sent.lost:  # noqa: ASYNC110 - the server hears of it in this loop
                await asyncio.sleep(0)
            both = [asyncio.ensure_future(served.post("chat/completions", body)) for _ in range(2)]
            await served.script.asked(2)
            served.script.go_on.set()
            said = [
                reply.json()["choices"][0]["message"]["content"]
                for reply in [await b for b in both]
            ]
            assert sorted(said) == ["2", "two"]
            assert len(served.conversation.answers) == len(served.script.prompts) == 2

    run(talk)


@pytest.mark.slow
def test_a_client_that_times_out_and_sends_again_takes_one_turn(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["2"]) as served:
            served.script.go_on.clear()
            client = served.client.with_options(timeout=1.0, max_retries=5)
            asked = asyncio.ensure_future(client.chat.completions.create(model="m", messages=[ASK]))
            await served.script.asked(1)
            asyncio.get_running_loop().call_later(1.5, served.script.go_on.set)
            assert (await asked).choices[0].message.content == "2"
            assert len(served.conversation.answers) == 1

    run(talk)


def test_a_wrong_key_and_a_session_that_has_ended_are_refused(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["2"]) as served:
            other = Conversation(chat.tokens, Script(chat.tokenizer, []), limits())
            with served.server.session(other) as ended:
                pass
            neighbour = served.client.with_options(api_key=ended.key)
            late = AsyncOpenAI(base_url=ended.url, api_key=ended.key)
            for client in (neighbour, late):
                with pytest.raises(openai.AuthenticationError, match="no session has this key"):
                    await client.chat.completions.create(model="m", messages=[ASK])
            assert not served.conversation.answers

    run(talk)


def test_what_is_asked_when_the_session_ends_is_refused(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, []) as served:
            script = Script(chat.tokenizer, ["2"])
            script.go_on.clear()
            conversation = Conversation(chat.tokens, script, limits())
            with served.server.session(conversation) as session:
                client = AsyncOpenAI(base_url=session.url, api_key=session.key)
                asked = asyncio.ensure_future(
                    client.chat.completions.create(model="m", messages=[ASK])
                )
                await script.asked(1)
            with pytest.raises(openai.AuthenticationError, match="its episode has ended"):
                await asked
            assert not conversation.answers

    run(talk)


@pytest.mark.slow
def test_sessions_side_by_side_keep_apart(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, []) as served:

            async def one(name: str) -> Conversation:
                conversation = Conversation(
                    chat.tokens, Script(chat.tokenizer, [name] * 3), limits()
                )
                with served.server.session(conversation) as session:
                    async with AsyncOpenAI(base_url=session.url, api_key=session.key) as client:
                        messages: list[Any] = [{"role": "user", "content": name}]
                        for _ in range(3):
                            answer = await client.chat.completions.create(
                                model="m", messages=messages
                            )
                            said = answer.choices[0].message
                            assert said.content == name
                            messages += [said, {"role": "user", "content": name}]
                return conversation

            conversations = await asyncio.gather(*(one(f"n{i}") for i in range(8)))
            assert [c.figures().extended for c in conversations] == [2] * 8

    run(talk)


def test_a_used_up_budget_is_a_bad_request_that_says_which(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["2"], max_turns=1) as served:
            messages: list[Any] = [ASK]
            first = await served.client.chat.completions.create(model="m", messages=messages)
            messages += [first.choices[0].message, ASK]
            with pytest.raises(openai.BadRequestError, match=r"episodes\.max_turns"):
                await served.client.chat.completions.create(model="m", messages=messages)
            assert len(served.script.prompts) == 1

    run(talk)


def test_a_cut_answer_says_length(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["a long answer"]) as served:
            answer = await served.client.chat.completions.create(
                model="m", messages=[ASK], max_completion_tokens=6
            )
            assert answer.choices[0].finish_reason == "length"
            assert answer.choices[0].message.content == "a long"

    run(talk)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"n": 2}, "^Error code: 400.*n: Input should be 1, not 2"),
        ({"stop": ["x"]}, "stop"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"extra_body": {"colour": 1}}, "colour: Extra inputs are not permitted"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a function's name"),
    ],
)
def test_what_a_session_cannot_give_is_a_bad_request(
    chat: Chat, more: dict[str, Any], message: str
) -> None:
    async def talk() -> None:
        async with serving(chat, ["2"]) as served:
            with pytest.raises(openai.BadRequestError, match=message):
                await served.client.chat.completions.create(
                    **{"model": "m", "messages": [ASK], **more}
                )
            assert not served.script.prompts

    run(talk)


def test_a_key_that_is_null_is_absent(chat: Chat) -> None:
    async def talk() -> None:
        async with serving(chat, ["2"]) as served:
            body = {"logit_bias": None, "stop": None, "model": None}
            answer = await served.client.chat.completions.create(
                model="m", messages=[ASK], extra_body=body
            )
            assert answer.choices[0].message.content == "2"
            with pytest.raises(openai.BadRequestError, match="messages: Field required"):
                await served.client.chat.completions.create(
                    model="m", messages=[ASK], extra_body={"messages": None}
                )

    run(talk)


def test_what_a_session_does_not_serve_is_refused_as_openai_does_and_with_the_cure(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "BODY_BYTES", 2**20)

    async def talk() -> None:
        async with serving(chat, []) as served:
            ask = served.client
            with pytest.raises(openai.NotFoundError, match="ask it for chat completions") as found:
                await ask.responses.create(model="m", input="1+1?")
            assert "set_default_openai_api('chat_completions')" in str(found.value)
            assert found.value.code == "unknown_url"
            with pytest.raises(openai.APIStatusError, match="takes POST, not GET") as found:
                await ask.chat.completions.list()
            assert found.value.status_code == 405
            long = [{"role": "user", "content": "x" * 2**20}]
            with pytest.raises(openai.APIStatusError, match="reads 1 MiB at most") as found:
                await ask.chat.completions.create(model="m", messages=long)
            assert found.value.status_code == 413

    run(talk)


def test_tokens_are_spelled_one_by_one_only_for_log_probs(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes long, and all sessions wait for it."""
    spelled: list[int] = []

    def text(ids: Sequence[int]) -> str:
        spelled.append(len(ids))
        return str(chat.tokenizer.decode(ids, skip_special_tokens=True))

    monkeypatch.setattr(chat.tokens, "text", text)

    async def talk() -> None:
        async with serving(chat, ["It is 2."] * 5) as served:
            ask, complete = served.client.chat.completions.create, served.client.completions.create
            await ask(model="m", messages=[ASK])
            async for _ in await ask(model="m", messages=[ASK], stream=True):
                pass
            await complete(model="m", prompt=[5])
            assert spelled.count(1) == 1, "the prompt of one token"
            await ask(model="m", messages=[ASK], logprobs=True)
            await complete(model="m", prompt=[5, 6], logprobs=0)
            assert spelled.count(1) == 1 + 2 * len("It is 2.") + 2

    run(talk)


def test_an_agents_own_sampling_is_said_once_and_not_followed(
    chat: Chat, caplog: pytest.LogCaptureFixture
) -> None:
    async def talk() -> None:
        async with serving(chat, ["2", "2"]) as served:
            for _ in range(2):
                await served.client.chat.completions.create(
                    model="m", messages=[ASK], temperature=0.0, seed=1
                )

    run(talk)
    said = [r.message for r in caplog.records if "asks for" in r.message]
    assert len(said) == 1
    assert "a temperature and a seed of its own; tokens are drawn as `rollout` says" in said[0]


def test_a_port_in_use_is_one_line(chat: Chat) -> None:
    async def talk(port: int) -> None:
        server = SessionServer(chat.tokens, "policy", "127.0.0.1", port)
        with pytest.raises(EpisodeFailed, match=message):
            await server.start()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"^episodes\.port: .* cannot be served at 127\.0\.0\.1:{port}: .*in use; set"
        run(lambda: talk(port))
        with pytest.raises(EpisodeFailed, match=message):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)
