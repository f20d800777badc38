"""Episodes with tools: what a conversation looks like, and what ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from actors.environment import EnvironmentActor
from actors.environments.base import Episode, EpisodeFailed, EpisodeLimits
from actors.environments.play import Clock, Toolbox
from actors.environments.play import Play as TurnsOf
from actors.environments.processes import EnvironmentProcess, Outcome, ToolCall, ToolProcesses
from actors.environments.specs import EpisodeCode, EpisodeReward, EpisodesSpec
from actors.environments.tokens import ChatTokens
from actors.environments.tool_episodes import ToolEpisodes
from actors.messages import FinishReason, GroupSampling
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, Script, call_text, deep_call, prompt_of
from tests.actors.environments.toy import ToyRollout

SYSTEM = {"role": "system", "content": "Be brief."}
FAILING = ("RaisesInReset", "DiesInReset", "HangsInReset", "RewardIsText")
CODES = {  # environments by the row's `environment`
    "none": {},
    "one": {"": "user_tools:Guess"},
    "several": {name: f"user_tools:{name}" for name in ("Guess", "Quiet", *FAILING)},
}
Play = Callable[..., tuple[Episode, Script]]


@pytest.fixture(scope="module")
def episodes(chat_model: ModelSpec, user_folder: Path, loop: Any) -> Iterator[Callable[..., Any]]:
    """Those of `CODES`, each started once."""
    kept: dict[str, ToolEpisodes] = {}

    def of(which: str) -> ToolEpisodes:
        if which not in kept:
            code = EpisodeCode(
                tuple(
                    f"user_tools:{tool}" for tool in ("add", "later", "nested", "roll", "misbehave")
                ),
                CODES[which],
                rewards={"both": EpisodeReward("user_tools:both", 30.0)}
                if which == "several"
                else {},
                search_path=(str(user_folder),),
                system_prompt=SYSTEM["content"],
            )
            kept[which] = ToolEpisodes(code, LIMITS, chat_model, None)
        return kept[which]

    yield of
    for made in kept.values():
        loop(made.close())


@pytest.fixture
def play(episodes: Callable[..., Any], tokenizer: Any, loop: Any) -> Play:
    def played(
        *turns: Any,
        code: str = "none",
        source: Any = "hi",
        limits: EpisodeLimits = LIMITS,
        seed: int = 1,
        **columns: Any,
    ) -> tuple[Episode, Script]:
        which, policy = episodes(code), Script(tokenizer, turns)
        which._limits = limits
        return loop(which.run(prompt_of(source, **columns), 0, seed, policy)), policy

    return played


def said(episode: Episode, role: str = "tool") -> list[str]:
    return [m["content"] for m in episode.messages if m["role"] == role]


class TestConversation:
    @pytest.mark.slow
    def test_tools_answer_in_the_order_of_the_calls_until_the_policy_calls_none(
        self, play: Play
    ) -> None:
        episode, policy = play(
            call_text("later", text="a") + call_text("add", a=1, b=2), call_text("nested"), "done"
        )
        assert said(episode) == ["a", "3", "inside"]
        assert said(episode, "assistant") == ["", "", "done"]
        assert episode.finish_reason is FinishReason.STOP
        assert episode.prompt_messages == 2
        assert (episode.figures.tool_calls, episode.figures.extended) == (3, 2)
        assert episode.figures.tools_failed == 0
        assert episode.rewards == {}
        assert [call.prompt_ids.tolist() for call in episode.calls] == policy.seen

    @pytest.mark.slow
    def test_what_is_no_call_goes_back_to_the_model_and_is_counted(self, play: Play) -> None:
        episode, _ = play(
            "<tool_call>\n{no json}\n</tool_call>",
            '<tool_call>\n{"arguments": {}}\n</tool_call>',
            deep_call(600),
            deep_call(5000),
            '<tool_call>\n{"name": "\\ud83d", "arguments": {}}\n</tool_call>',
            call_text("none_such"),
            call_text("add", a=1),
            call_text("add", a=1, b=2, c=3),
            call_text("misbehave", how="raise"),
            "done",
            limits=replace(LIMITS, max_turns=10, max_sampled_tokens=2**15, max_tokens=2**16),
        )
        assert said(episode) == [
            *["{'error': 'The tool call could not be read.'}"] * 5,
            "{'error': 'Tool none_such not found.'}",
            "{'error': \"add() missing 1 required positional argument: 'b'\"}",
            "{'error': \"add() got an unexpected keyword argument 'c'\"}",
            "{'error': \"'no such thing'\"}",
        ]
        assert episode.finish_reason is FinishReason.STOP
        assert episode.figures.malformed_calls == 5
        assert (episode.figures.tool_calls, episode.figures.tools_failed) == (4, 4)

    def test_the_system_prompt_and_messages_of_a_row_begin_the_conversation(
        self, play: Play, tokenizer: Any
    ) -> None:
        asked = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ]
        episode, policy = play("done", source=asked)
        assert episode.prompt_messages == 4
        assert episode.messages[:4] == [SYSTEM, *asked]
        text = tokenizer.decode(policy.seen[0])
        assert text.startswith("<|im_start|>system\nBe brief.")
        assert '"name": "add"' in text


class TestEnvironments:
    @pytest.mark.slow
    def test_an_environment_sees_the_row_answers_and_rewards(self, play: Play) -> None:
        episode, _ = play(
            call_text("guess", n=3),
            call_text("guess", n=7) + call_text("meet_here", others=1) + call_text("add", a=1, b=1),
            "it is 7",
            code="several",
            environment="Guess",
            number=7,
            other=[1],
        )
        assert episode.messages[1]["content"] == "hi Guess!"
        assert said(episode) == ["higher", "right", "met", "2"]
        assert episode.rewards == {"environment": 0.5, "both": 7.2}

    @pytest.mark.slow
    def test_a_row_chooses_its_environment_and_is_shown_its_tools_alone(
        self, play: Play, tokenizer: Any
    ) -> None:
        said_it = call_text("say", text="x")
        episode, policy = play(said_it, "done", code="several", environment="Quiet", number=1)
        assert said(episode) == ["said"]
        assert episode.messages[1]["content"] == "hi"
        assert episode.rewards == {"environment": None, "both": None}, "they abstain"
        text = tokenizer.decode(policy.seen[0])
        assert '"name": "say"' in text
        assert '"name": "guess"' not in text
        with pytest.raises(EpisodeFailed, match="environment 'none'; it must be one of 'Guess'"):
            play("x", code="several", environment="none")

    @pytest.mark.slow
    def test_a_row_without_a_prompt_has_what_reset_says(self, play: Play) -> None:
        episode, _ = play("done", code="one", source="", number=1)
        assert episode.messages[:2] == [SYSTEM, {"role": "user", "content": " Guess!"}]
        assert episode.rewards == {"environment": 1.0}

    @pytest.mark.slow
    def test_what_is_drawn_is_a_function_of_the_seed(self, play: Play) -> None:
        def drawn(seed: int) -> list[str]:
            turn = call_text("roll_here") + call_text("roll") + call_text("roll")
            episode, _ = play(turn, turn, "x", seed=seed, code="one", number=1)
            return said(episode)

        first = drawn(5)
        assert len(set(first)) == 6
        assert drawn(5) == first
        assert drawn(6) != first

    @pytest.mark.parametrize(
        ("environment", "reason", "infrastructure"),
        [
            ("RaisesInReset", "no board", False),
            ("DiesInReset", "exit status 7 while reset", True),
            ("HangsInReset", "reset gave no answer within 0.5 s", True),
            ("RewardIsText", "its value for completion 0 is 'much', a str", False),
        ],
    )
    def test_an_episode_that_came_to_no_end_has_no_score(
        self, play: Play, environment: str, reason: str, infrastructure: bool
    ) -> None:
        limits = replace(LIMITS, call_timeout_s=0.5 if environment == "HangsInReset" else 30.0)
        with pytest.raises(EpisodeFailed, match=reason) as failed:
            play("x", code="several", environment=environment, number=1, limits=limits)
        assert failed.value.infrastructure is infrastructure

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("environment", "timeout_s", "call_timeout_s", "said"),
        [
            ("Quiet", 60.0, 1.0, None),
            ("Quiet", 0.5, 30.0, r"reward 'slow' gave no answer within 0.5 s \(its timeout_s\)"),
            (
                "HangsInReward",
                60.0,
                0.5,
                r"get_reward gave no answer within 0.5 s \(episodes.call_timeout_s\)",
            ),
        ],
    )
    def test_each_reward_of_an_episode_has_its_own_time(
        self,
        chat_model: ModelSpec,
        user_folder: Path,
        tokenizer: Any,
        loop: Any,
        environment: str,
        timeout_s: float,
        call_timeout_s: float,
        said: str | None,
    ) -> None:
        """A function its `timeout_s`, however short a step of the environment may be."""
        code = EpisodeCode(
            environments={"": f"user_tools:{environment}"},
            rewards={"slow": EpisodeReward("user_tools:slow", timeout_s)},
            search_path=(str(user_folder),),
        )
        limits = replace(LIMITS, call_timeout_s=call_timeout_s)
        made = ToolEpisodes(code, limits, chat_model, None)
        row = prompt_of("hi", seconds=2.0, number=1)
        try:
            if said is None:
                episode = loop(made.run(row, 0, 1, Script(tokenizer, ["x"])))
                assert episode.rewards == {"slow": 1.0}
            else:
                with pytest.raises(EpisodeFailed, match=said) as failed:
                    loop(made.run(row, 0, 1, Script(tokenizer, ["x"])))
                assert failed.value.infrastructure
                assert failed.value.so_far is not None, "what the policy said may be why"
                assert failed.value.so_far.messages[-1]["content"] == "x"
        finally:
            loop(made.close())


@pytest.mark.slow
@pytest.mark.parametrize("waiting", [False, True])
def test_an_environment_is_let_go_before_its_actor_is_closed(
    chat_model: ModelSpec, user_folder: Path, tmp_path: Path, loop: Any, waiting: bool
) -> None:
    """Of an episode that has ended, and of one that waits for the policy, whose end is under way
    when the actor is closed."""
    code = EpisodeCode(environments={"": "user_tools:Holds"}, search_path=(str(user_folder),))
    actor = EnvironmentActor(
        *(chat_model, EpisodesSpec(), code, LIMITS, "environment-0", 60.0, False),
        drop=lambda ref: ref.drop(),
    )
    rollout, asked = ToyRollout(), asyncio.Event()

    async def wait(turns: Any) -> None:
        asked.set()
        if waiting:
            await asyncio.Event().wait()

    rollout.during = wait
    sampling = GroupSampling(64, 1.0, completions=1, seed=7, group_id=3)

    async def played() -> None:
        row = prompt_of("hi", folder=str(tmp_path))
        group = asyncio.create_task(
            actor.generate("life", row, sampling, rollout.handle, rollout.name)
        )
        await (asked.wait() if waiting else group)
        ending = asyncio.create_task(actor.end("life"))
        await asyncio.sleep(0)
        await actor.close()
        await asyncio.gather(ending, group, return_exceptions=True)

    loop(played())
    assert [path.name for path in tmp_path.iterdir()] == ["freed"]


class TestLimits:
    ADD = call_text("add", a=1, b=2)

    def test_turns(self, play: Play) -> None:
        episode, policy = play(*[self.ADD] * 5, limits=replace(LIMITS, max_turns=3))
        assert episode.finish_reason is FinishReason.TURNS
        assert len(policy.seen) == len(episode.calls) == 3
        assert episode.messages[-1]["role"] == "assistant"
        assert episode.figures.tool_calls == 2

    def test_tool_calls(self, play: Play) -> None:
        episode, _ = play(self.ADD, self.ADD * 2, "x", limits=replace(LIMITS, max_tool_calls=2))
        assert episode.finish_reason is FinishReason.TURNS
        assert (len(episode.calls), episode.figures.tool_calls) == (2, 1)

    def test_sampled_tokens_are_counted_over_turns(self, play: Play, tokenizer: Any) -> None:
        turn = len(tokenizer(self.ADD)["input_ids"]) + 1
        limits = replace(LIMITS, max_sampled_tokens=turn + 5)
        episode, _ = play(self.ADD, "a long answer", limits=limits)
        assert episode.finish_reason is FinishReason.LENGTH
        assert [len(call.sampled.token_ids) for call in episode.calls] == [turn, 5]
        episode, _ = play(self.ADD, "x", limits=replace(LIMITS, max_sampled_tokens=turn))
        assert (episode.finish_reason, len(episode.calls)) == (FinishReason.LENGTH, 1)

    def test_all_tokens(self, play: Play) -> None:
        _, policy = play(self.ADD, "x")
        first, second = map(len, policy.seen)
        episode, _ = play(self.ADD, "a long answer", limits=replace(LIMITS, max_tokens=second + 4))
        assert episode.finish_reason is FinishReason.CONTEXT
        assert len(episode.calls[-1].sampled.token_ids) == 4
        episode, _ = play(self.ADD, "x", limits=replace(LIMITS, max_tokens=second))
        assert (episode.finish_reason, len(episode.calls)) == (FinishReason.CONTEXT, 1)
        assert episode.messages[-1]["role"] == "assistant", "the policy never saw the answer"
        with pytest.raises(EpisodeFailed, match=f"the prompt has {first} tokens with its tools"):
            play("x", limits=replace(LIMITS, max_tokens=first))

    @pytest.mark.slow
    def test_time_spent_on_tools(self, play: Play) -> None:
        limits = replace(LIMITS, episode_timeout_s=0.5)
        episode, _ = play(call_text("misbehave", how="hang"), "x", limits=limits)
        assert episode.finish_reason is FinishReason.TIME
        assert (len(episode.calls), episode.figures.tools_timed_out) == (1, 1)
        assert 0.5 <= episode.figures.tool_seconds < 30

    def test_no_call_is_made_once_the_time_is_over(self, play: Play) -> None:
        """What came before it may have taken all, as a `reset` may."""
        limits = replace(LIMITS, episode_timeout_s=0.0)
        episode, _ = play(self.ADD, "x", limits=limits)
        assert episode.finish_reason is FinishReason.TIME
        assert (len(episode.calls), episode.figures.tool_calls) == (1, 0)


def test_methods_one_after_the_other_share_what_is_left_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each takes all that it is given: the second is not asked."""
    now, given = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow:
        async def call(self, calls: list[ToolCall], seed: int, limit: float) -> list[Outcome]:
            given.append(limit)
            now[0] += limit
            return [Outcome("", timed_out=True)] * len(calls)

    limits = replace(LIMITS, call_timeout_s=30.0, episode_timeout_s=50.0)
    box = Toolbox((), frozenset(), {"wait": False})
    environment, none = cast(EnvironmentProcess, Slow()), cast(ToolProcesses, None)
    turns = TurnsOf(cast(ChatTokens, None), limits, box, none, environment, Clock(limits))
    call = {"type": "function", "function": {"name": "wait", "arguments": {}}}
    asyncio.run(turns._answers([call] * 4, 1))
    assert given == [30.0, 20.0]
    assert turns._figures.tools_timed_out == 4
