"""What it costs when agents are killed amid their episodes, and when replicas are lost under them.

The agents are processes of the user's: a function's, and a program's.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.environment import EnvironmentActor, EpisodesGroup, RolloutGone
from actors.environments.base import EpisodeFailed
from actors.environments.specs import AgentCommand, EpisodeCode, EpisodesSpec
from actors.messages import GroupSampling, Prompt
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, prompt_of
from tests.actors.environments.toy import ToyRollout
from tests.actors.environments.user_agents import DYING, DYING_PROGRAM, PLAIN

ROLLOUTS = 3
SAMPLING = GroupSampling(64, 1.0, completions=ROLLOUTS, seed=7, group_id=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    (folder / "user_agents.py").write_text(PLAIN)
    (folder / "dying_agents.py").write_text(DYING)
    (folder / "program.py").write_text(DYING_PROGRAM)
    return folder


@pytest.fixture(params=["function", "program"])
def actor(
    request: pytest.FixtureRequest, chat_model: ModelSpec, folder: Path, loop: Any
) -> Iterator[EnvironmentActor]:
    code = EpisodeCode(
        agent=f"{folder}/dying_agents.py:plays"
        if request.param == "function"
        else AgentCommand((sys.executable, str(folder / "program.py"))),
        search_path=(str(folder),),
    )
    spec = EpisodesSpec(max_attempts=2)
    made = EnvironmentActor(
        *(chat_model, spec, code, LIMITS, "environment-0", 60.0, False),
        drop=lambda ref: ref.drop(),
    )
    yield made
    loop(made.close())


@pytest.fixture
def row(tmp_path: Path) -> Callable[..., Prompt]:
    """A row of a game that writes a letter to `begun` whenever it begins."""

    def made(**columns: Any) -> Prompt:
        return prompt_of("hi", begun=str(tmp_path / "begun"), **columns)

    return made


def begun(prompt: Prompt) -> int:
    return len(Path(prompt.columns["begun"]).read_text())


async def played(
    actor: EnvironmentActor, prompt: Prompt, rollout: ToyRollout, completions: int = ROLLOUTS
) -> EpisodesGroup:
    sampling = replace(SAMPLING, completions=completions)
    try:
        return await actor.generate("life", prompt, sampling, rollout.handle, rollout.name)
    finally:
        await actor.end("life")


@pytest.mark.slow
def test_an_agent_that_is_killed_amid_its_episode_is_begun_anew_alone(
    actor: EnvironmentActor, row: Callable[..., Prompt], tmp_path: Path, loop: Any
) -> None:
    """Its first turn has the answer that it had: nothing is sampled twice."""
    prompt, rollout = row(dies_unless=str(tmp_path / "died")), ToyRollout()
    record, _, talks = loop(played(actor, prompt, rollout))
    assert record.episodes.rewards == {"environment": (1.0,) * ROLLOUTS}
    assert record.episodes.figures["retried"] == 1
    assert record.turns == (2,) * ROLLOUTS
    assert begun(prompt) == ROLLOUTS + 1
    keys = [key for call in rollout.asked for key in call]
    assert sorted(keys) == [f"7/3/{i}/{turn}" for i in range(ROLLOUTS) for turn in range(2)]
    assert [len(said) for said in talks.messages] == [len(talks.messages[0])] * ROLLOUTS


@pytest.mark.slow
def test_an_agent_that_is_killed_each_time_is_a_fault_of_machines_and_never_a_score(
    actor: EnvironmentActor, row: Callable[..., Prompt], tmp_path: Path, loop: Any
) -> None:
    prompt = row(dies_unless=str(tmp_path / "no folder" / "died"))
    with pytest.raises(EpisodeFailed, match=r"at the same turn, the last: .*signal 9") as failed:
        loop(played(actor, prompt, ToyRollout()))
    assert failed.value.infrastructure


@pytest.mark.slow
def test_faults_of_machines_and_of_the_agent_have_budgets_of_their_own(
    actor: EnvironmentActor, row: Callable[..., Prompt], tmp_path: Path, loop: Any
) -> None:
    """One of each, where two of a kind would fail the group."""
    prompt = row(dies_unless=str(tmp_path / "died"), raises_unless=str(tmp_path / "raised"))
    record, _, _ = loop(played(actor, prompt, ToyRollout(), completions=1))
    assert record.episodes.figures["retried"] == 2
    assert record.episodes.rewards == {"environment": (1.0,)}


@pytest.mark.slow
def test_where_the_process_that_forks_is_killed_another_takes_its_place(
    actor: EnvironmentActor, row: Callable[..., Prompt], loop: Any
) -> None:
    loop(played(actor, row(), ToyRollout()))
    (server,) = [one for one in psutil.Process().children() if "environments.server" in said(one)]
    for process in (*server.children(recursive=True), server):
        with contextlib.suppress(psutil.NoSuchProcess):  # of an episode that has ended
            process.kill()
    record, _, _ = loop(played(actor, row(), ToyRollout()))
    assert record.episodes.rewards == {"environment": (1.0,) * ROLLOUTS}


@pytest.mark.slow
def test_an_end_of_it_that_is_not_heard_of_yet_costs_no_attempt(
    actor: EnvironmentActor, row: Callable[..., Prompt], loop: Any
) -> None:
    loop(played(actor, row(), ToyRollout()))
    server = actor._episodes._processes

    async def fork() -> None:
        (process,) = [p for p in psutil.Process().children() if "environments.server" in said(p)]
        process.kill()
        closed = select.poll()
        closed.register(server._control, select.POLLHUP)
        assert closed.poll(30_000), "the loop does not run meanwhile, and hears nothing"
        server.retire(await server.fork())

    loop(fork())


def said(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.ZombieProcess:  # another test's, which nobody has waited for
        return ""


@pytest.mark.slow
def test_a_rollout_replica_that_dies_under_an_agent_costs_a_turn_and_no_episode(
    actor: EnvironmentActor, row: Callable[..., Prompt], loop: Any
) -> None:
    """The agent waits for its answer meanwhile; another replica gives it."""
    prompt, first, second = row(), ToyRollout("rollout-0"), ToyRollout("rollout-1", version=5)

    def die(turns: Any) -> None:
        first.lost = first.lost or any(turn.key.endswith("/1") for turn in turns)

    first.during = die

    async def two() -> EpisodesGroup:
        with pytest.raises(RolloutGone, match="rollout-0"):
            await actor.generate("life", prompt, SAMPLING, first.handle, first.name)
        try:
            async with asyncio.timeout(60):
                return await actor.generate("life", prompt, SAMPLING, second.handle, second.name)
        finally:
            await actor.end("life")

    record, _, _ = loop(two())
    assert record.episodes.figures["retried"] == 0
    assert begun(prompt) == ROLLOUTS
    assert record.episodes.rewards == {"environment": (1.0,) * ROLLOUTS}
    assert record.turns == (2,) * ROLLOUTS
    assert all(span.version in (0, 5) for spans in record.version_spans for span in spans)
    assert any(span.version == 5 for spans in record.version_spans for span in spans)
