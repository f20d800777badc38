"""The LLM judge against a server on loopback: what is a score, and what is a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from aligntune.rewards import judge as judging
from aligntune.rewards import service
from aligntune.rewards.judge import judge
from aligntune.rewards.service import NoAnswer

Reply = Callable[[dict[str, Any]], Any]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judging._kept.clear()
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
        ("Score: 7.5/10", 0.75),
        ("Score: 8 out of 10", 0.8),
        ("Score: 4/5", 0.8),
        ("Score: 4 / 5 stars", 0.8),
        ("**Score:** 80 / **100** points.", 0.8),
        ("Score: 0/5", 0.0),
        ("Score: unclear\nScore: 4 stars", 0.4),
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
        (chat("10/10"), "no line 'Score: NUMBER'"),
        (chat("score 3, not 4/5"), "no line 'Score: NUMBER'"),
        (chat("Score: 3, not 4/5"), "no line 'Score: NUMBER'"),
        (chat("Score: 4/5 or 5/5"), "no line 'Score: NUMBER'"),
        (chat("Score: 3/4/5"), "no line 'Score: NUMBER'"),
        (chat("Score: 80%"), "no line 'Score: NUMBER'"),
        (chat("Score: 3\nOr rather\nScore: 4 or 5"), "no line 'Score: NUMBER'"),
        (chat("Score: 7/5"), "score 7/5 is not on the scale of 0 to 10; set options low and high"),
        (chat("Score: 0/0"), "0/0 is not on the scale"),
        (chat("Score: 4/-5"), "4/-5 is not on the scale"),
        (chat("Score: 11/10"), "11 is not from 0 to 10"),
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


def test_a_fraction_is_on_the_scale_that_was_told_where_that_does_not_begin_at_0() -> None:
    assert judged(lambda _: chat("Score: 4/5"), "hi", low=1, high=5)[0] == [0.75]
    said, _ = judged(lambda _: chat("Score: 8/10"), "hi", low=1, high=5, retries=0)
    assert "8/10 is not on the scale of 1 to 5" in str(said)


class Bench:
    """A judge of several calls, which refuses some texts and never answers about others."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refused: set[str] = set()
        self.slow: set[str] = set()
        self.hangs = asyncio.Event()
        self.url = ""

    async def reply(self, request: web.Request) -> web.Response:
        """A score of 5, a refusal or silence."""
        shown = (await request.json())["messages"][1]["content"]
        text = shown.splitlines()[-2]
        self.asked.append(text)
        if text in self.slow:
            self.hangs.set()
            await asyncio.Event().wait()
        if text in self.refused:
            return web.Response(status=400)
        return web.json_response(chat("Score: 5"))

    async def judge(self, *texts: str, **options: Any) -> list[float]:
        """The scores of texts."""
        given = {"model": "m", "rubric": "r", **options}
        return await judge(["p"] * len(texts), list(texts), url=self.url, **given)


def with_bench(body: Callable[[Bench], Awaitable[None]]) -> None:
    async def whole() -> None:
        bench, app = Bench(), web.Application()
        app.router.add_post("/v1/chat/completions", bench.reply)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        bench.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            await body(bench)
        finally:
            await runner.cleanup()

    asyncio.run(whole())


def test_a_completion_without_a_score_costs_no_other_one() -> None:
    async def body(bench: Bench) -> None:
        bench.refused = {"b"}
        with pytest.raises(NoAnswer, match="it answered 400"):
            await bench.judge("b", "a", "a", "c")
        assert sorted(bench.asked) == ["a", "a", "b", "c"]
        bench.refused = set()
        assert await bench.judge("b", "a", "a", "c") == [0.5] * 4
        assert sorted(bench.asked) == ["a", "a", "b", "b", "c"]
        await bench.judge("a", "c")  # a call that succeeds leaves nothing
        assert len(bench.asked) == 7

    with_bench(body)


def test_a_request_that_hangs_until_the_time_limit_of_the_reward_costs_no_other_score() -> None:
    async def body(bench: Bench) -> None:
        bench.slow = {"b"}
        # One at a time: "b" is asked once "a" is scored.
        call = asyncio.ensure_future(bench.judge("a", "b", concurrency=1))
        await bench.hangs.wait()
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        bench.slow = set()
        assert await bench.judge("a", "b") == [0.5, 0.5]
        assert sorted(bench.asked) == ["a", "b", "b"]

    with_bench(body)


def test_no_more_scores_are_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "KEPT", 2)

    async def body(bench: Bench) -> None:
        bench.refused = {"e"}
        with pytest.raises(NoAnswer):
            await bench.judge("a", "b", "c", "d", "e")
        assert len(judging._kept) == 2

    with_bench(body)


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


def test_what_a_model_does_not_take_is_left_out_of_the_request() -> None:
    said, asked = judged(lambda _: chat("Score: 5"), "hi", max_tokens=None, temperature=None)
    assert said == [0.5]
    ((_, _, body),) = asked
    assert body.keys() == {"model", "messages"}


def test_bounds_that_are_no_bounds_are_refused() -> None:
    said, asked = judged(lambda _: chat("Score: 3"), "hi", low=5, high=5)
    assert "low 5 is not below high 5" in str(said)
    assert not asked
