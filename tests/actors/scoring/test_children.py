"""A criterion's child processes: many calls at once, what is no answer, and nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.children import keeper
from actors.scoring import children
from actors.scoring.channel import Garbled, failed, parse, scored
from actors.scoring.children import FunctionScorer
from actors.scoring.criteria import RewardCriterion, RewardFailed, RewardFailure
from actors.specs import RewardActorSpec

MODULE = '''
import asyncio, glob, json, os, signal, socket, sys, time

def pids(completions):
    return [float(os.getpid())] * len(completions)

def meet(completions, folder, others):
    """Ends when `others` calls are in it at the same time."""
    open(os.path.join(folder, completions[0]), "w").close()
    while len(os.listdir(folder)) < others:
        time.sleep(0.01)
    return [float(completions[0])]

arrived = []
async def meet_in_one_process(completions, others):
    arrived.append(asyncio.Event())
    if len(arrived) == others:
        for event in arrived:
            event.set()
    await arrived[-1].wait()
    return [float(completions[0]), float(os.getpid())]

inside, most = 0, 0
async def count(completions):
    """How many calls have been in it at the same time."""
    global inside, most
    inside += 1
    most = max(most, inside)
    await asyncio.sleep(0.05)
    inside -= 1
    return [float(most)]

started = asyncio.Event()
async def one_of_them(completions, prompts, answer):
    """The first ends or holds up what it is in once another has arrived; the others answer."""
    what = prompts[0]
    if what == "fine":
        if answer[0] == "wait":
            started.set()
            await asyncio.sleep(0.2)
        return [float(completions[0]), float(os.getpid())]
    if answer[0] == "wait":
        try:
            await asyncio.wait_for(started.wait(), 0.5)
        except TimeoutError:
            pass  # it is alone in a new process
    if what == "exit":
        os._exit(3)
    if what == "block":
        signal.pause()
    if what == "hang":
        await asyncio.Event().wait()
    if what == "stubborn":
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

calls = 0
def forger(completions, prompts):
    """Forks and lets both come back, or writes to every descriptor it finds."""
    global calls
    calls += 1
    what = prompts[0]
    if what == "fork":
        os.fork()
    if what.startswith("write"):
        line = what.removeprefix("write ").encode() + b"\\n"
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            try:
                os.write(descriptor, line)
            except OSError:
                pass
    if what == "endless line":
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            try:
                socket.socket(fileno=os.dup(descriptor)).sendall(b"x" * 5_000_000)
            except OSError:
                pass
    return [float(calls)] * len(completions)

def leave_a_daemon(completions, prompts, folder):
    """A process of its own session that nothing here is the parent of."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(os.path.join(folder, "pid.tmp"), "w") as file:
                file.write(str(os.getpid()))
            os.rename(os.path.join(folder, "pid.tmp"), os.path.join(folder, "pid"))
            signal.pause()
        os._exit(0)
    os.wait()
    while not os.path.exists(os.path.join(folder, "pid")):
        time.sleep(0.01)
    if prompts[0] == "hang":
        signal.pause()
    if prompts[0] == "exit":
        os._exit(3)
    return [1.0]

def chatty(completions, prompts):
    for _ in range(int(prompts[0])):
        print("x" * 1023)
    return [2.0]

def picky(completions):
    return [None if text == "x" else 1.0 for text in completions]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "children_rewards.py").write_text(MODULE)
    return folder


@pytest.fixture
def scorer(folder: Path) -> Callable[..., Any]:
    @asynccontextmanager
    async def make(
        function: str,
        timeout_s: float = 60.0,
        log: Path | None = None,
        workers: int | None = None,
        max_concurrent_groups: int = RewardActorSpec().max_concurrent_groups,
        **options: Any,
    ) -> AsyncIterator[FunctionScorer]:
        criterion = RewardCriterion(
            name=function,
            target=f"children_rewards:{function}",
            timeout_s=timeout_s,
            options=options,
            search_path=(str(folder),),
            workers=workers,
        )
        made = FunctionScorer(criterion, str(log) if log else None, max_concurrent_groups)
        try:
            yield made
        finally:
            await made.close()

    return make


def run(body: Callable[[], Awaitable[None]], seconds: float = 120.0) -> None:
    asyncio.run(asyncio.wait_for(body(), seconds))


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


class TestSideBySide:
    @pytest.mark.slow  # 32 interpreters
    def test_sixteen_groups_of_several_rewards_are_in_flight_at_the_same_time(
        self, scorer: Any, tmp_path: Path
    ) -> None:
        """Every call waits for all the others, so one that had to wait for another's end hangs."""

        async def body() -> None:
            folders = [tmp_path / "first", tmp_path / "second"]
            for folder in folders:
                folder.mkdir()
            first, second = (scorer("meet", folder=str(f), others=16) for f in folders)
            async with first as a, second as b:
                got = await asyncio.gather(
                    *(s.call("p", [str(n)], {}) for n in range(16) for s in (a, b))
                )
            assert got == [[float(n)] for n in range(16) for _ in range(2)]

        run(body)

    @pytest.mark.slow  # nine interpreters
    def test_a_child_that_died_leaves_no_file_open(self, scorer: Any) -> None:
        async def body() -> None:
            async with scorer("pids") as reward:
                gc.collect()  # or files that other tests have left are closed meanwhile
                counts = []
                for _ in range(8):
                    [pid] = await reward.call("p", [""], {})
                    counts.append(len(os.listdir("/proc/self/fd")))
                    os.kill(int(pid), signal.SIGKILL)
                    # Its end is heard of by its channel too, maybe later.
                    while not gone(int(pid)) or any(c.running for c in reward._children):  # noqa: ASYNC110 - a process sets no event
                        await asyncio.sleep(0.01)
            assert counts[1:] == [counts[1]] * 7

        run(body)

    def test_calls_of_an_async_function_run_together_in_one_process(self, scorer: Any) -> None:
        async def body() -> None:
            async with scorer("meet_in_one_process", others=16) as reward:
                got = await asyncio.gather(*(reward.call("p", [str(n), ""], {}) for n in range(16)))
            assert [row[0] for row in got] == [float(n) for n in range(16)]
            assert len({row[1] for row in got}) == 1

        run(body)

    @pytest.mark.parametrize("limit", [{"workers": 2}, {}])
    def test_as_many_calls_of_an_async_function_run_at_once_as_are_allowed(
        self, scorer: Any, limit: dict[str, int]
    ) -> None:
        """The others wait before their time limit begins."""

        async def body() -> None:
            async with scorer("count", **limit) as reward:
                got = await asyncio.gather(*(reward.call("p", ["a"], {}) for _ in range(8)))
            assert max(row[0] for row in got) == limit.get("workers", 8)

        run(body)

    @pytest.mark.parametrize(
        "limit",
        [{"workers": 3}, {"max_concurrent_groups": 3}, {"workers": 3, "max_concurrent_groups": 9}],
    )
    def test_no_more_processes_are_started_than_calls_wait_for_or_than_are_allowed(
        self, scorer: Any, limit: dict[str, int]
    ) -> None:
        async def body() -> None:
            async with scorer("pids", **limit) as reward:
                alone = [await reward.call("p", ["a"], {}) for _ in range(5)]
                assert len({row[0] for row in alone}) == 1, "an idle child is used again"
                many = await asyncio.gather(*(reward.call("p", ["a"], {}) for _ in range(40)))
            assert len({row[0] for row in many}) <= 3

        run(body)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("what", "reason"),
        [
            ("exit", RewardFailure.DIED),
            ("block", RewardFailure.TIMEOUT),
            ("hang", RewardFailure.TIMEOUT),
            ("stubborn", RewardFailure.TIMEOUT),
        ],
    )
    def test_a_call_that_ends_or_holds_up_the_shared_process_costs_the_others_nothing(
        self, scorer: Any, what: str, reason: RewardFailure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(children, "CANCEL_SECONDS", 0.3)

        async def body() -> None:
            async with scorer(
                "one_of_them", timeout_s=1.0 if reason == "timeout" else 60.0
            ) as reward:
                bad = asyncio.ensure_future(reward.call(what, ["0"], {"answer": "wait"}))
                others = [
                    asyncio.ensure_future(reward.call("fine", [str(n), ""], {"answer": "wait"}))
                    for n in range(1, 4)
                ]
                with pytest.raises(RewardFailed) as failure:
                    await bad
                got = await asyncio.gather(*others)
                after = await reward.call("fine", ["9", ""], {"answer": ""})
            assert failure.value.reason is reason
            assert [row[0] for row in got] == [1.0, 2.0, 3.0]
            assert after[0] == 9.0
            if what == "hang":
                assert {row[1] for row in got} == {after[1]}, "only the call was ended"

        run(body)

    @pytest.mark.slow
    def test_a_caller_that_leaves_ends_its_call_of_an_async_function(
        self, scorer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(children, "CANCEL_SECONDS", 0.3)

        async def body() -> None:
            async with scorer("one_of_them") as reward:
                before = await reward.call("fine", ["1", ""], {"answer": ""})
                for what in ("hang", "block"):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(reward.call(what, ["0"], {"answer": ""}), 0.3)
                    after = await reward.call("fine", ["1", ""], {"answer": ""})
                    assert (after[1] == before[1]) is (what == "hang")

        run(body)


class TestAnswers:
    def test_a_fork_that_comes_back_from_the_function_answers_nothing(self, scorer: Any) -> None:
        async def body() -> None:
            async with scorer("forger") as reward:
                got = [
                    await reward.call("fork" if n == 2 else "fine", ["a"], {}) for n in range(1, 6)
                ]
            assert got == [[1.0], [2.0], [3.0], [4.0], [5.0]]

        run(body)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "line",
        [
            "junk",
            json.dumps({"call": "1", "scores": [9.0]}),
            json.dumps({"call": "2", "failure": "raised", "detail": ""}),
        ],
    )
    def test_what_is_written_to_the_channel_is_no_answer(self, scorer: Any, line: str) -> None:
        async def body() -> None:
            async with scorer("forger") as reward:
                assert await reward.call("fine", ["a"], {}) == [1.0]
                with pytest.raises(RewardFailed) as failure:
                    await reward.call(f"write {line}", ["a"], {})
                assert failure.value.reason is RewardFailure.GARBLED
                assert "wrote to its channel" in failure.value.detail
                assert await reward.call("fine", ["a"], {}) == [1.0], "in a new process"

        run(body)

    def test_a_line_without_an_end_does_not_fill_the_memory(self, scorer: Any) -> None:
        async def body() -> None:
            async with scorer("forger") as reward:
                with pytest.raises(RewardFailed) as failure:
                    await reward.call("endless line", ["a"], {})
                assert failure.value.reason is RewardFailure.GARBLED

        run(body)

    def test_none_is_an_abstention_and_no_failure(self, scorer: Any) -> None:
        async def body() -> None:
            async with scorer("picky") as reward:
                assert await reward.call("p", ["x", "y", "x"], {}) == [None, 1.0, None]

        run(body)

    @settings(max_examples=30)
    @given(st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False)))
    def test_numbers_arrive_as_they_were_sent(self, scores: list[float | None]) -> None:
        answer = parse(scored("w", scores))
        assert (answer.call, answer.scores) == ("w", scores)

    @pytest.mark.slow
    @given(st.text(max_size=100), st.sampled_from(list(RewardFailure)))
    def test_reasons_arrive_as_they_were_sent(self, detail: str, reason: RewardFailure) -> None:
        assert parse(failed("w", reason, detail)).failure == (reason, detail)

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b"[" * 100_000,
            b"1" * 10_000,
            b"\xff\xfe",
            b'{"call": "w"}',
            b'{"call": 1, "scores": [1.0]}',
            b'{"call": "w", "scores": 1.0}',
            b'{"call": "w", "scores": [NaN]}',
            b'{"call": "w", "scores": [Infinity]}',
            b'{"call": "w", "scores": [1e999]}',
            b'{"call": "w", "scores": [true]}',
            b'{"call": "w", "scores": ["1"]}',
            b'{"call": "w", "scores": [[1.0]]}',
            b'{"call": "w", "scores": [1.0], "detail": "x"}',
            b'{"call": "w", "failure": "no such reason", "detail": ""}',
            b'{"call": "w", "failure": "raised", "detail": 1}',
        ],
    )
    def test_anything_else_is_no_answer(self, line: bytes) -> None:
        with pytest.raises(Garbled):
            parse(line)


@pytest.mark.parametrize(
    "error",
    [
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
    ],
)
def test_without_room_for_a_process_a_group_waits_and_the_next_try_has_its_scores(
    scorer: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def no_room(*_: Any, **__: Any) -> Any:
        raise error

    async def body() -> None:
        async with scorer("picky") as reward:
            with monkeypatch.context() as patch:
                patch.setattr(asyncio, "create_subprocess_exec", no_room)
                with pytest.raises(RewardFailed, match="no process could be started") as failed:
                    await reward.call("p", ["a"], {})
            assert failed.value.reason is RewardFailure.UNREACHED
            assert await reward.call("p", ["a"], {}) == [1.0]

    run(body)


class TestEnds:
    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["hang", "exit", "close"])
    def test_daemons_of_the_user_s_code_end_with_its_process(
        self, scorer: Any, tmp_path: Path, what: str
    ) -> None:
        async def body(limit: float) -> None:
            async with scorer("leave_a_daemon", timeout_s=limit, folder=str(tmp_path)) as reward:
                if what == "close":
                    assert await reward.call("fine", ["a"], {}) == [1.0]
                    assert not gone(pid())
                else:
                    with pytest.raises(RewardFailed):
                        await reward.call(what, ["a"], {})
                    assert not there() or gone(pid()), "when the caller hears of it"

        def pid() -> int:
            return int((tmp_path / "pid").read_text())

        there = (tmp_path / "pid").exists
        for limit in (0.5, 2.0, 8.0, 60.0) if what == "hang" else (60.0,):
            run(partial(body, limit))
            if there():  # on a busy machine it takes longer to be
                break
        assert gone(pid())

    @pytest.mark.slow
    def test_what_is_printed_goes_to_the_log_until_it_is_too_much(
        self, scorer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = tmp_path / "reward.log"
        kib = keeper.LOG_BYTES // 1024

        async def body() -> None:
            async with scorer("chatty", log=log) as reward:
                assert await reward.call("3", ["a"], {}) == [2.0]
                await asyncio.to_thread(within, 10, lambda: log.stat().st_size == 3 * 1024)
                assert log.read_text() == ("x" * 1023 + "\n") * 3
                assert await reward.call(str(2 * kib), ["a"], {}) == [2.0]

        run(body)
        assert log.stat().st_size < (kib + 1) * 1024
        assert "too much output" in log.read_text()[-100:]
        assert os.path.getsize(log) > (kib - 1) * 1024
