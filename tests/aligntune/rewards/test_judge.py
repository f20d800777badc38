"""The LLM judge against a server on loopback: what is a score, and what is a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from aligntune.rewards import service
from aligntune.rewards.judge import judge
from aligntune.rewards.service import NoAnswer

Reply = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FIRST_PAUSE_S", 0.0)


def chat(text: Any, reason: str = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": reason}]}


def judged(reply: Reply, *completions: Any, **options: Any) -> tuple[Any, list[Any]]:
    """What the judge reward makes of a server that answers by `reply`, and the requests."""
    asked: list[Any] = []

    async def handler(request: web.Request) -> web.Response:
        body = await request.json()
        asked.append((request.path, request.headers.get("Authorization"), body))
        said = reply(body)
        return said if isinstance(said, web.Response) else web.json_response(said)

    async def ask() -> Any:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        given = {"model": "judge-7b", "rubric": "Is it kind?", **options}
        try:
            return await judge(
                ["Say hello"] * len(completions),
                list(completions),
                url=f"http://127.0.0.1:{port}/v1/",
                **given,
            )
        except (NoAnswer, ValueError) as error:
            return error
        finally:
            await runner.cleanup()

    return asyncio.run(ask()), asked


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("It is kind.\nScore: 7", 0.7),
        ("Score: 10/10", 1.0),
        ("**Score: 2.5**", 0.25),
        ("score: 0", 0.0),
        ("Score: 3\nNo, rather\nScore: 4\n", 0.4),
        ("## Score: 5.", 0.5),
    ],
)
def test_the_last_line_that_says_a_score_is_it(text: str, score: float) -> None:
    said, asked = judged(lambda _: chat(text), "hi")
    assert said == [pytest.approx(score)]
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (chat("It is kind: 7"), "no line 'Score: NUMBER'"),
        (chat("Score: high"), "no line 'Score: NUMBER'"),
        (chat("Score: 7 or 8"), "no line 'Score: NUMBER'"),
        (chat("Score: 11"), "11 is not from 0 to 10"),
        (chat("Score: -1"), "-1 is not from 0 to 10"),
        (chat("Score: 1", "length"), "cut off; raise option max_tokens"),
        (chat(None), "has no text"),
        (web.Response(status=503), "it answered 503"),
    ],
)
def test_anything_else_is_asked_again_and_fails_in_the_end(answer: Any, reason: str) -> None:
    def reply(_: Any) -> Any:
        return answer if isinstance(answer, dict) else web.Response(status=answer.status)

    said, asked = judged(reply, "hi", retries=2)
    assert isinstance(said, NoAnswer)
    assert reason in str(said)
    assert "in 3 tries" in str(said)
    assert len(asked) == 3


@pytest.mark.parametrize("answer", [{}, {"choices": []}, [], {"choices": [{"message": 3}]}])
def test_what_is_no_chat_completion_fails_at_once(answer: Any) -> None:
    said, asked = judged(lambda _: answer, "hi")
    assert "no chat completion" in str(said)
    assert len(asked) == 1


def test_a_reply_that_is_mended_by_another_try_scores() -> None:
    replies = iter([chat("hm"), chat("Score: 5")])
    said, asked = judged(lambda _: next(replies), "hi")
    assert (said, len(asked)) == ([0.5], 2)


def test_one_completion_without_a_score_fails_them_all() -> None:
    def reply(body: dict[str, Any]) -> Any:
        return chat("hm" if "second" in body["messages"][1]["content"] else "Score: 5")

    said, _ = judged(reply, "first", "second", retries=0)
    assert isinstance(said, NoAnswer)


def test_the_judge_sees_rubric_prompt_reference_and_answer_between_marks_nobody_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    said, asked = judged(
        lambda _: chat("Score: 3"),
        [{"role": "assistant", "content": "hi"}],
        column="gold",
        gold=["hello"],
        token_env="JUDGE_KEY",
        low=1,
        high=5,
    )
    assert said == [0.5]
    path, token, body = asked[0]
    assert (path, token) == ("/v1/chat/completions", "Bearer sesame")
    told, shown = (message["content"] for message in body["messages"])
    assert "Is it kind?" in told
    assert "from 1 to 5" in told
    word = shown.split("]")[0].removeprefix("[prompt ")
    assert len(word) == 16
    assert shown == (
        f"[prompt {word}]\nSay hello\n[end {word}]\n\n[reference {word}]\nhello\n[end {word}]\n\n"
        f"[answer {word}]\nhi\n[end {word}]"
    )
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-7b", 0.0, 1024)


def test_bounds_that_are_no_bounds_are_refused() -> None:
    said, asked = judged(lambda _: chat("Score: 3"), "hi", low=5, high=5)
    assert "low 5 is not below high 5" in str(said)
    assert not asked
