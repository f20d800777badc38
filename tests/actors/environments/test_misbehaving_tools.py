"""Tools that hang, flood, fork, exit or say too much: one failed call each, and nothing is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.children.keeper import LOG_BYTES
from actors.environments import processes
from actors.environments.base import Episode, EpisodeFailed
from actors.environments.server import Setup
from actors.environments.specs import EpisodeCode
from actors.environments.tool_episodes import ToolEpisodes, described
from actors.messages import FinishReason
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, Script, call_text, prompt_of

SECONDS = 0.8  # of a call, where it hangs
GRACE = 1.0  # then, until what does not end by itself is killed
HANGING = ("hang", "spin", "deaf", "flood", "fork without end")
ENDED = "{'error': 'no answer within 0.8 s'}"
BOUND = replace(LIMITS, memory_gib=0.5)


@pytest.fixture(autouse=True)
def grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", GRACE)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "user.log"


@pytest.fixture(scope="module")
def episodes(
    chat_model: ModelSpec, user_folder: Path, loop: Any, log: Path
) -> Iterator[ToolEpisodes]:
    code = EpisodeCode(
        ("user_tools:misbehave", "user_tools:meet", "user_tools:leave_a_process"),
        {"": "user_tools:Guess"},
        search_path=(str(user_folder),),
    )
    made = ToolEpisodes(code, BOUND, chat_model, str(log))
    yield made
    loop(made.close())


@pytest.fixture
def play(episodes: ToolEpisodes, tokenizer: Any, loop: Any) -> Callable[..., Episode]:
    def played(*turns: str, seconds: float = 30.0) -> Episode:
        episodes._limits = replace(BOUND, call_timeout_s=seconds)
        row = prompt_of("hi", number=1)
        return loop(episodes.run(row, 0, 1, Script(tokenizer, turns)))

    return played


def said(episode: Episode) -> list[str]:
    return [m["content"] for m in episode.messages if m["role"] == "tool"]


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


class TestFunctions:
    @pytest.mark.slow
    def test_one_that_does_not_end_is_ended_within_its_limit(
        self, episodes: ToolEpisodes, tokenizer: Any, loop: Any
    ) -> None:
        """Each in an episode of its own, side by side, so that their limits are waited for once."""
        episodes._limits = replace(BOUND, call_timeout_s=SECONDS)
        fine = call_text("misbehave", how="fine")

        async def all_of_them() -> list[Episode]:
            turns = [[call_text("misbehave", how=how) + fine, fine, "x"] for how in HANGING]
            row = prompt_of("hi", number=1)
            plays = [Script(tokenizer, said) for said in turns]
            return await asyncio.gather(
                *(episodes.run(row, rollout, 1, policy) for rollout, policy in enumerate(plays))
            )

        for episode in loop(all_of_them()):
            assert said(episode) == [ENDED, "fine", "fine"]
            assert episode.finish_reason is FinishReason.STOP
            assert (episode.figures.tools_timed_out, episode.figures.tools_failed) == (1, 0)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("how", "answer"),
        [
            ("exit", "the tool ended its process: its process ended with exit status 3"),
            ("sys.exit", "the call ended with SystemExit"),
            ("10 MB", "the answer has 10000000 characters, which is too much"),
            ("memory", "the call ended with MemoryError"),
        ],
    )
    def test_one_that_fails_is_one_failed_call(
        self, play: Callable[..., Episode], how: str, answer: str
    ) -> None:
        episode = play(call_text("misbehave", how=how) + call_text("misbehave", how="fine"), "x")
        assert said(episode) == [str({"error": answer}), "fine"]
        assert (episode.figures.tools_failed, episode.figures.tool_calls) == (1, 2)

    def test_what_it_writes_to_every_descriptor_is_no_answer(
        self, play: Callable[..., Episode]
    ) -> None:
        episode = play(call_text("misbehave", how="write to every descriptor"), "x")
        assert "something wrote to its channel what is no answer" in said(episode)[0]
        assert episode.figures.tools_failed == 1

    def test_a_fork_that_comes_back_answers_nothing(self, play: Callable[..., Episode]) -> None:
        fork = call_text("misbehave", how="fork")
        assert said(play(fork, fork, fork + fork, "x")) == ["forked"] * 4

    def test_a_long_answer_is_cut_and_says_so(self, play: Callable[..., Episode]) -> None:
        episode = play(
            call_text("misbehave", how="long"),
            call_text("misbehave", how="raise at length"),
            call_text("misbehave", how="half a character"),
            "x",
        )
        long, raised, half = said(episode)
        assert long == "x" * 2000 + "\n[cut: the answer has 5000 characters]"
        assert raised == str({"error": "x" * 2000})
        assert half == "a?b"
        assert episode.figures.tools_failed == 1

    def test_what_it_prints_is_kept_up_to_a_limit(
        self, play: Callable[..., Episode], log: Path
    ) -> None:
        assert said(play(call_text("misbehave", how="print much"), "x")) == ["printed"]
        assert 0 < log.stat().st_size <= LOG_BYTES + 1000

    def test_calls_of_a_turn_run_side_by_side(
        self, play: Callable[..., Episode], tmp_path: Path
    ) -> None:
        """Each waits for all the others, so that one after the other they would not end."""
        calls = [call_text("meet", folder=str(tmp_path), name=f"{n}", others=8) for n in range(8)]
        assert said(play("".join(calls), "x")) == [f"{n}" for n in range(8)]

    @pytest.mark.slow
    def test_what_a_call_left_ends_with_its_process(
        self, play: Callable[..., Episode], tmp_path: Path
    ) -> None:
        for seconds in (0.5, 2.0, 8.0, 30.0):  # on a busy machine it takes longer to be there
            episode = play(
                call_text("leave_a_process", folder=str(tmp_path), hang=True), "x", seconds=seconds
            )
            assert episode.figures.tools_timed_out == 1
            if (tmp_path / "pid").exists():
                break
        pid = int((tmp_path / "pid").read_text())
        assert within(10, lambda: gone(pid))


class TestMethods:
    @pytest.mark.slow
    def test_one_that_is_ended_leaves_the_environment_as_it_is(
        self, play: Callable[..., Episode]
    ) -> None:
        hanging = [call_text("misbehave_here", how=how) for how in ("hang", "spin")]
        episode = play(
            call_text("guess", n=2),
            "".join(hanging) + call_text("meet_here", others=2),
            call_text("tries_so_far"),
            "x",
            seconds=SECONDS,
        )
        assert said(episode) == ["lower", ENDED, ENDED, ENDED, "1"]
        assert episode.figures.tools_timed_out == 3
        assert episode.rewards == {"environment": 1.0}

    def test_async_ones_run_side_by_side(self, play: Callable[..., Episode]) -> None:
        """Each waits for all the others, so that one after the other they would not end."""
        assert said(play(call_text("meet_here", others=3) * 3, "x")) == ["met"] * 3

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("how", "reason"),
        [
            ("exit", "its process ended with exit status 3 while calling misbehave_here"),
            ("deaf", "calling misbehave_here gave no answer within 1.8 s"),
            ("write to every descriptor", "what is no answer"),
        ],
    )
    def test_one_that_ends_its_process_ends_its_episode_and_no_other(
        self, episodes: ToolEpisodes, tokenizer: Any, loop: Any, how: str, reason: str
    ) -> None:
        episodes._limits = replace(BOUND, call_timeout_s=SECONDS)
        row = prompt_of("hi", number=1)
        bad = Script(tokenizer, [call_text("misbehave_here", how=how), "x"])
        good = Script(tokenizer, [call_text("guess", n=1), call_text("tries_so_far"), "x"])

        async def both() -> list[Any]:
            runs = (episodes.run(row, i, 1, policy) for i, policy in enumerate((bad, good)))
            return await asyncio.gather(*runs, return_exceptions=True)

        failed, fine = loop(both())
        assert isinstance(failed, EpisodeFailed)
        assert failed.infrastructure, "another try may go well"
        assert reason in failed.reason
        assert failed.so_far.finish_reason is FinishReason.ERROR
        assert (len(failed.so_far.calls), failed.so_far.rewards) == (1, {})
        assert [m["role"] for m in failed.so_far.messages] == ["user", "assistant"]
        assert said(fine) == ["right", "1"]

    def test_cancelling_an_episode_ends_what_it_started(
        self, episodes: ToolEpisodes, tokenizer: Any, loop: Any, tmp_path: Path
    ) -> None:
        episodes._limits = BOUND

        async def cancelled() -> int:
            policy = Script(
                tokenizer,
                [call_text("leave_here", folder=str(tmp_path)), call_text("meet_here", others=2)],
            )
            task = asyncio.create_task(episodes.run(prompt_of("hi", number=1), 0, 1, policy))
            await policy.turn(1)
            pid = int((tmp_path / "pid").read_text())
            assert not gone(pid)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return pid

        pid = loop(cancelled())
        assert within(10, lambda: gone(pid))


@pytest.mark.slow
def test_an_import_that_hangs_is_ended_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_tools.py").write_text(
        "import os, threading\n"
        "if not os.path.exists(os.path.join(os.path.dirname(__file__), 'ready')):\n"
        "    threading.Event().wait()\n"
        "def tool() -> str:\n"
        '    """Say it.\n\n    Returns:\n        It.\n    """\n'
        "    return 'it'\n"
    )
    server = processes.Server(Setup(("slow_tools:tool",), {}), (str(tmp_path),), None)
    before = psutil.Process().children(recursive=True)

    async def twice() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "IMPORT_SECONDS", 0.2)
            with pytest.raises(EpisodeFailed, match="gave no answer within"):
                await server.start()
        assert psutil.Process().children(recursive=True) == before, "it was ended"
        starting = asyncio.create_task(server.start())
        while server._child is None:  # noqa: ASYNC110 - nothing says when there is one
            await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        assert psutil.Process().children(recursive=True) == before, "as is one nobody waits for"
        (tmp_path / "ready").touch()
        await server.start()
        assert (await described(server))["tools"]
        await server.close()

    asyncio.run(twice())
