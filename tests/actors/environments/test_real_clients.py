"""Sessions against clients that nobody here wrote, and that cannot live beside our own packages:
each in an environment of its own, which `scripts/install_clients.sh` makes.

OpenEnv's capture proxy has a session as upstream, and is asked in turn by an agent in OpenAI's and
one in Anthropic's dialect; verifiers' train client sends token ids and wants token ids, by itself
and within the interception server that stands between an agent and it.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import pytest

from actors.environments.conversations import Answer
from actors.environments.tokens import ChatTokens
from actors.specs import ModelSpec
from tests.actors.environments.scripted import Chat
from tests.actors.environments.test_conversations import CALL
from tests.actors.environments.test_sessions import Served, serving
from tests.stand_ins import REPOSITORY

pytestmark = pytest.mark.slow

FOLDER = Path(os.environ.get("ALIGNTUNE_CLIENTS", REPOSITORY / ".clients")).absolute()
SCRIPTS = Path(__file__).parent / "clients"
SECONDS = 240  # their imports alone take 5 on an idle machine
ARGUMENTS = {"b": 1, "a": 1.0}


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> Chat:
    """Its turns end by both tokens that verifiers names as stops of Qwen3."""
    stops = (tokenizer.convert_tokens_to_ids("<|endoftext|>"),)
    return Chat(ChatTokens(tokenizer, stops=stops), tokenizer)


def interpreter(package: str) -> Path:
    """That of the environment of `package`."""
    return FOLDER / package / "bin/python"


def needs(package: str) -> pytest.MarkDecorator:
    """Skips, before anything is set up, where `package` is not installed."""
    why = f"{package} is not in {FOLDER / package}: `make test-clients` installs and tests it"
    return pytest.mark.skipif(not interpreter(package).exists(), reason=why)


def run(talk: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(talk(), SECONDS))


async def client(package: str, script: str, served: Served, *arguments: str) -> Any:
    """What the script prints, in the environment of `package`, with the session as its endpoint."""
    process = await asyncio.create_subprocess_exec(
        str(interpreter(package)),
        "-I",
        str(SCRIPTS / script),
        *arguments,
        env={
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "HF_HUB_OFFLINE": "1",
            "OPENAI_BASE_URL": served.session.url,
            "OPENAI_API_KEY": served.session.key,
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()[-3000:]
    return json.loads(printed.decode().splitlines()[-1])


def sampled(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The calls that are trained on, as clients tell of them."""
    return [
        {
            "prompt": answer.call.prompt_ids.tolist(),
            "sampled": answer.call.sampled.token_ids.tolist(),
            "logprobs": answer.call.sampled.logprobs.tolist(),
        }
        for answer in answers
    ]


THOUGHT = f"<think>\nOne and one.\n</think>\n\nAdding.{CALL}"


@needs("openenv")
class TestOpenEnv:
    def test_the_capture_proxy_captures_what_is_trained_on(self, chat: Chat) -> None:
        async def talk() -> None:
            async with serving(chat, [THOUGHT, "It is 2.", "Sums"], max_turns=3) as served:
                got = await client("openenv", "openenv_capture.py", served, "chat")
                assert got["got"] == ["Adding.", ARGUMENTS, "tool_calls", "It is 2.", "Sums"]
                assert got["turns"] == sampled(served.conversation.answers)
                assert (got["trainable"], got["roots"], got["fixes"]) == (True, 2, [])
                assert [entry["completion_token_ids"] for entry in got["entries"]] == [
                    turn["sampled"] for turn in got["turns"][:2]
                ]
                assert not [found for found in got["validation"] if "FATAL" in found]
                figures = served.conversation.figures()
                assert (figures.extended, figures.realigned, figures.forked) == (1, 0, 1)

        run(talk)

    def test_an_agent_in_another_dialect_is_one_row_too(self, chat: Chat) -> None:
        async def talk() -> None:
            async with serving(chat, [THOUGHT, "It is 2."]) as served:
                got = await client("openenv", "openenv_capture.py", served, "messages")
                use, stopped, content = got["got"]
                assert (use, stopped) == (ARGUMENTS, "tool_use")
                assert [block["text"] for block in content if block["type"] == "text"] == [
                    "It is 2."
                ]
                assert got["turns"] == sampled(served.conversation.answers)
                assert (got["trainable"], got["roots"]) == (True, 1)
                assert served.conversation.figures().extended == 1

        run(talk)

    def test_its_probe_finds_token_ids_log_probs_and_tools(self, chat: Chat) -> None:
        async def talk() -> None:
            async with serving(chat, ["ok", CALL]) as served:
                got = await client("openenv", "openenv_capture.py", served, "probe")
                assert got == {
                    "ok": True,
                    "capture_level": "tokens",
                    "tool_support": "ok",
                    "findings": [],
                    "fixes": [],
                }
                assert len(served.conversation.answers) == 2, "a probe is a turn like any other"

        run(talk)


@needs("verifiers")
class TestVerifiers:
    def test_the_train_client_goes_on_from_the_ids_that_are_trained_on(
        self, chat: Chat, chat_model: ModelSpec
    ) -> None:
        async def talk() -> None:
            said = [THOUGHT, "It is 2.", "Nothing."]
            async with serving(chat, said, max_turns=3) as served:
                got = await client("verifiers", "verifiers_train.py", served, chat_model.name)
                turns = got["turns"]
                assert [turn["content"] for turn in turns] == ["Adding.", *said[1:]]
                assert [turn["finish_reason"] for turn in turns] == ["tool_calls", "stop", "stop"]
                assert [turn["bridged"] for turn in turns] == [False, True, True]
                own = sampled(served.conversation.answers)
                assert [{key: turn[key] for key in own[0]} for turn in turns] == own
                assert got["token_ids"] == own[-1]["prompt"] + own[-1]["sampled"]
                assert sum(got["mask"]) == sum(len(turn["sampled"]) for turn in own)
                assert served.conversation.figures().extended == 2

        run(talk)

    @pytest.mark.parametrize("kind", ["train", "eval"])
    def test_an_agent_behind_the_interception_server_is_one_row(
        self, chat: Chat, chat_model: ModelSpec, kind: str
    ) -> None:
        async def talk() -> None:
            async with serving(chat, [THOUGHT, "It is 2."]) as served:
                got = await client(
                    "verifiers", "verifiers_intercepted.py", served, kind, chat_model.name
                )
                assert got["got"] == ["Adding.", ARGUMENTS, "tool_calls", "It is 2."]
                assert (got["turns"], got["errors"]) == (2, [])
                own = sampled(served.conversation.answers)
                figures = served.conversation.figures()
                assert (figures.extended, figures.realigned, figures.forked) == (1, 0, 0)
                if kind == "train":
                    assert got["token_ids"] == own[-1]["prompt"] + own[-1]["sampled"]
                    trained = list(compress(got["token_ids"], got["mask"]))
                    assert trained == [i for turn in own for i in turn["sampled"]]

        run(talk)
