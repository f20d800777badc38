"""Rewards over HTTP against a service on loopback: what is a score, and what is a failure."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import BasicAuth, web

from actors.scoring.criteria import RewardFailed, RewardFailure, Unreached
from actors.specs import RewardUrlSpec
from aligntune.config.load import load_config
from aligntune.errors import UserError
from aligntune.rewards import service
from aligntune.rewards.registry import resolve_all, resolve_url
from aligntune.rewards.remote import remote_scores
from aligntune.rewards.service import NoAnswer
from aligntune.rewards.trial import Group, called

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FIRST_PAUSE_S", 0.0)


def asked(handler: Handler, groups: int = 1, proxy: str | None = None, **options: Any) -> list[Any]:
    """What `groups` calls at once say of a service that answers by `handler`. `PORT` is its port in
    an option `url`, and in `proxy`, which is what http_proxy says."""

    async def ask() -> list[Any]:
        app = web.Application()
        app.router.add_post("/score", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            given = {"url": f"http://127.0.0.1:{port}/score", "answer": ["1", "2"], **options}
            given["url"] = given["url"].replace("PORT", str(port))
            if proxy is not None:
                os.environ["http_proxy"] = proxy.replace("PORT", str(port))
            calls = [remote_scores(["p", "p"], ["a", "bb"], **given) for _ in range(groups)]
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await runner.cleanup()

    return asyncio.run(ask())


def says(body: str, status: int = 200, **headers: str) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(text=body, status=status, headers=headers)

    return handler


def test_a_service_scores_what_it_is_sent() -> None:
    async def handler(request: web.Request) -> web.Response:
        sent = await request.json()
        assert sent["prompts"] == ["p", "p"]
        assert sent["columns"] == {"answer": ["1", "2"]}
        return web.json_response({"scores": [len(text) for text in sent["completions"]]})

    assert asked(handler) == [[1.0, 2.0]]
    assert asked(says('{"scores": [0.5, null]}')) == [[0.5, None]]


def test_columns_that_json_has_no_word_for_are_sent_as_samples_write_them() -> None:
    async def handler(request: web.Request) -> web.Response:
        sent = await request.json()
        assert sent["columns"]["when"] == ["2024-01-02 00:00:00", None]
        assert sent["columns"]["level"] == [None, {"1": [2.5, None]}]
        return web.json_response({"scores": [1, 2]})

    when, level = [datetime(2024, 1, 2), None], [math.nan, {1: (2.5, math.inf)}]
    assert asked(handler, when=when, level=level) == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("oops", "no JSON"),
        ("[1, 2]", "no object"),
        ("{}", "no object"),
        ('{"scores": [1]}', "1 scores for 2"),
        ('{"scores": [1, "2"]}', "score 1 is no number"),
        ('{"scores": [true, 1]}', "score 0 is no number"),
        ('{"scores": [NaN, 1]}', "score 0 is not finite"),
        ('{"scores": [1, 1e999]}', "score 1 is not finite"),
        ('{"scores": [1, %s]}' % ("9" * 400), "score 1 is not finite"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_an_answer_of_another_form_is_a_failure_and_no_score(body: str, said: str) -> None:
    (error,) = asked(says(body))
    assert isinstance(error, NoAnswer)
    assert said in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    asked_times = 0

    async def handler(_: web.Request) -> web.Response:
        nonlocal asked_times
        asked_times += 1
        return web.Response(status=status, headers={"Location": "/score"})

    (error,) = asked(handler)
    assert str(status) in str(error)
    assert asked_times == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "Unsupported parameter:\\n\'max_tokens\'"}}',
         ": Unsupported parameter: 'max_tokens'"),
        ('{"object": "error", "message": "no model \\u001b[31mm"}', r": no model \x1b[31mm"),
        ('{"error": "Rumpel is no key"}', ": [the token] is no key"),
        ('{"detail": [1]}', ': {"detail": [1]}'),
        ("<html>" + "x" * 300, ": <html>" + "x" * 194),
        ("", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 429])
def test_a_refusal_says_why(
    status: int, body: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE", "Rumpel")
    (error,) = asked(says(body, status), retries=0, token_env="JUDGE")
    told = "it answered 400 Bad Request" if status == 400 else "it answered 429"
    end = "" if status == 400 else ", in 1 tries"
    assert str(error).endswith(f"/score: {told}{said}{end}")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_service_that_fails_for_a_while_is_asked_again(status: int) -> None:
    left = [status, status]

    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=left.pop()) if left else web.json_response({"scores": [1, 2]})

    assert asked(handler, retries=2) == [[1.0, 2.0]]
    (error,) = asked(says("", status), retries=1)
    assert f"answered {status}, in 2 tries" in str(error)
    assert isinstance(error, Unreached) is (status != 500), "500 may be the group's fault"


@pytest.mark.slow
def test_a_service_that_hangs_or_is_gone_is_a_failure() -> None:
    async def handler(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    (error,) = asked(handler, request_timeout_s=0.2, retries=1)
    assert "no answer in time, in 2 tries" in str(error)
    assert not isinstance(error, Unreached)
    spec = RewardUrlSpec(url="http://127.0.0.1:9/", retries=0)
    (failed,) = asyncio.run(called(resolve_url(spec), [Group("p", ("a",), {})]))
    assert isinstance(failed, RewardFailed)
    assert failed.reason is RewardFailure.UNREACHED
    assert "in 1 tries" in failed.detail


@pytest.fixture
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.setenv(name, "")  # taken away again, whatever a test puts there
        monkeypatch.delenv(name)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_a_request_goes_through_the_proxy_of_the_environment(
    without_proxies: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("default login me password hidden\n")
    without_proxies.setenv("NETRC", str(tmp_path / "netrc"))
    without_proxies.setenv("JUDGE", "Rumpel")

    async def handler(request: web.Request) -> web.Response:
        assert str(request.url) == "http://scores.invalid/score"
        assert request.headers["Authorization"] == "Bearer Rumpel"
        assert request.headers["Proxy-Authorization"] == BasicAuth("me", "hunter2").encode()
        return web.json_response({"scores": [1, 2]})

    proxy, url = "http://me:hunter2@127.0.0.1:PORT", "http://scores.invalid/score"
    assert asked(handler, url=url, proxy=proxy, token_env="JUDGE") == [[1.0, 2.0]]


GONE = "http://me:hunter2@127.0.0.1:9"
FAR = "192.0.2.1"  # of nobody
NAMED = "; the proxy http://127.0.0.1:9 (http_proxy"


@pytest.mark.parametrize(
    ("host", "proxy", "past", "said"),
    [
        ("127.0.0.1", GONE, None, None),
        ("localhost", GONE, None, None),
        ("0.0.0.0", GONE, None, None),
        (FAR, GONE, "other", f"127.0.0.1:9 .* in 1 tries{re.escape(NAMED)}"),
        (
            FAR,
            GONE,
            None,
            r"; add 192\.0\.2\.1 to no_proxy .* that Ray was started with on this node$",
        ),
        (FAR, "socks5://127.0.0.1:9", None, "speaks socks5 is not supported; the proxy"),
        (FAR, "http://127.0.0.1:x", None, "the proxy's address is no URL; the proxy"),
    ],
)
def test_a_proxy_is_passed_by_as_no_proxy_says_and_named_where_it_fails(
    without_proxies: pytest.MonkeyPatch, host: str, proxy: str, past: str | None, said: str | None
) -> None:
    if past is not None:
        without_proxies.setenv("no_proxy", past)
    url = f"http://{host}:PORT/score"
    (answer,) = asked(says('{"scores": [1, 2]}'), url=url, proxy=proxy, retries=0)
    if said is None:
        assert answer == [1.0, 2.0]
    else:
        assert isinstance(answer, NoAnswer)
        assert isinstance(answer, Unreached) is (proxy == GONE)
        assert re.search(said, str(answer))
        assert "hunter2" not in str(answer)


@pytest.mark.parametrize(
    ("host", "past"),
    [
        ("[::1]", True),
        ("[::]", True),
        ("10.9.8.7", True),
        ("[fe80::7]", True),
        ("node7", True),
        ("NODE7.Cluster", True),
        ("172.16.0.9", True),  # of no_proxy
        ("node7.elsewhere", False),
        ("node70", False),
        ("judge", False),
        ("10.9.8.70", False),
    ],
)
def test_no_proxy_stands_before_a_name_or_an_address_of_the_node(
    without_proxies: pytest.MonkeyPatch, host: str, past: bool
) -> None:
    without_proxies.setenv("http_proxy", GONE)
    without_proxies.setenv("no_proxy", "172.16.0.0/12")
    cards = {"eth0": [SimpleNamespace(address=a) for a in ("10.9.8.7", "fe80::7%eth0")]}
    without_proxies.setattr(service.psutil, "net_if_addrs", lambda: cards)
    without_proxies.setattr(service.socket, "gethostname", lambda: "Node7")
    without_proxies.setattr(service.socket, "getfqdn", lambda: "node7.cluster")
    assert (service._way_to(f"http://{host}:8000/score").proxy is None) is past


def test_no_more_requests_run_at_once_than_are_allowed() -> None:
    now = most = 0

    async def handler(_: web.Request) -> web.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return web.json_response({"scores": [1, 2]})

    assert asked(handler, groups=12, concurrency=3) == [[1.0, 2.0]] * 12
    assert most == 3


def test_a_token_is_read_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer Rumpel"
        return web.json_response({"scores": [1, 2]})

    monkeypatch.setenv("JUDGE", "Rumpel")
    assert asked(handler, token_env="JUDGE") == [[1.0, 2.0]]
    monkeypatch.delenv("JUDGE")
    (error,) = asked(handler, token_env="JUDGE")
    assert "JUDGE" in str(error)


def config(reward: Any) -> Any:
    return load_config(
        {
            "algorithm": "grpo",
            "model": {"name": "m"},
            "data": {"path": "d"},
            "rewards": [reward],
            "output_dir": "out",
        }
    )


def test_a_url_is_a_kind_of_reward() -> None:
    loaded = config({"url": "http://judge:8000/score", "retries": 5, "weight": 2.0})
    (criterion,) = resolve_all(loaded.rewards)
    assert (criterion.name, loaded.rewards[0].weight) == ("judge", 2.0)
    assert criterion.options["retries"] == 5
    for wrong in ("judge:8000", "ftp://judge/x", "http://"):
        with pytest.raises(UserError, match="http://HOST"):
            config({"url": wrong})
    with pytest.raises(UserError, match="credential"):
        config({"url": "https://me:secret@judge/score"})


def test_limits_that_leave_no_time_for_a_second_try_are_refused() -> None:
    url = {"url": "http://judge:8000/v1"}
    judge = {"function": "judge", "options": {**url, "model": "m", "rubric": "r"}}
    for reward in ({**url, "timeout_s": 30}, {**judge, "timeout_s": 30}):
        with pytest.raises(ValueError, match=r"^reward 'judge': its timeout_s=30, .* have 120 s\)"):
            resolve_all(config(reward).rewards)
        resolve_all(config({**reward, "timeout_s": 31}).rewards)
    resolve_all(config(judge).rewards)
    resolve_all(config({**url, "timeout_s": 30, "retries": 0}).rewards)
