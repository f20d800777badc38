"""RewardActor with real child processes: the calling convention, every failure, no orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from tokenizers import Regex, Tokenizer, models
from tokenizers.decoders import Fuse
from tokenizers.pre_tokenizers import Split
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from actors import reward
from actors.messages import Conversations, GroupTensors, Messages, Prompt, Scores
from actors.reward import Criterion, RewardActor
from actors.sandbox import SandboxBusy
from actors.scoring.criteria import RewardCriterion, RewardFailed, RewardFailure
from actors.scoring.model import RewardModelCriterion
from actors.specs import ModelSpec, RewardFunctionSpec
from aligntune.rewards.registry import from_callable, resolve
from tests import drivers
from tests.conftest import plain_environment

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 </>"
USER_MODULE = '''
import asyncio, os, signal, sys, time

def ones(completions):
    return [1.0] * len(completions)

def lengths(completions, **columns):
    return [len(text) for text in completions]

def seen(prompts, completions, answer, level, scale):
    conversational = not isinstance(prompts[0], str)
    texts = [c[0]["content"] if conversational else c for c in completions]
    roles = {c[0]["role"] for c in completions} if conversational else set()
    assert roles <= {"assistant"}
    return [scale * level[i] * (texts[i] == answer[i]) + len(prompts[i]) for i in range(len(texts))]

async def slowly(completions):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]

def printing(completions):
    print("x" * 100_000)
    os.write(1, b"raw bytes on stdout")
    print("on stderr", file=sys.stderr)
    return [2.0] * len(completions)

def misbehaving(prompts, completions):
    """Does what the prompt says; `fine` scores."""
    what = prompts[0]
    if what == "raise":
        raise KeyError("user mistake")
    if what == "sys exit":
        sys.exit(3)
    if what == "exit":
        os._exit(3)
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit leaving a process":
        if os.fork() == 0:
            signal.pause()
        os._exit(3)
    if what == "hang":
        signal.pause()
    if what == "close every file":
        os.closerange(3, 1000)
    values = {"nan": float("nan"), "inf": float("inf"), "text": "1"}
    if what in values:
        return [values[what]] * len(completions)
    if what == "few":
        return [1.0] * (len(completions) - 1)
    return [5.0] * len(completions)

def leave_pid_and_hang(completions, folder):
    with open(os.path.join(folder, "pid.tmp"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.path.join(folder, "pid.tmp"), os.path.join(folder, "pid"))
    # A regular expression that backtracks for ever holds the interpreter lock: no Python code, and
    # no signal handler, runs in this process any more.
    import re
    re.match("(a+)+$", "a" * 60 + "b")
'''


@pytest.fixture(scope="session")
def tokenizer_spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """One token a character, and `</s>` (id 0) at the end."""
    vocabulary = {"</s>": 0} | {c: i for i, c in enumerate(CHARACTERS, start=1)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    raw.pre_tokenizer = Split(Regex("."), "isolated")
    raw.decoder = Fuse()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(folder)
    Qwen2Config().save_pretrained(folder)
    return ModelSpec(name=str(folder))


@pytest.fixture(scope="session")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "user_rewards.py").write_text(USER_MODULE)
    return folder


@pytest.fixture
def criterion(user_folder: Path) -> Callable[..., RewardCriterion]:
    def make(function: str, timeout_s: float = 60.0, **options: Any) -> RewardCriterion:
        return RewardCriterion(
            name=function,
            target=f"user_rewards:{function}",
            timeout_s=timeout_s,
            options=options,
            search_path=(str(user_folder),),
        )

    return make


def prompt(source: str | Messages = "p", **columns: Any) -> Prompt:
    return Prompt(0, source, "p", np.array([1], np.int32), columns)


def group(*completions: str, group_id: int = 7) -> GroupTensors:
    """Completions as the rollout engine leaves them: with their end-of-sequence token."""
    tokens = [[CHARACTERS.index(c) + 1 for c in text] + [0] for text in completions]
    flat = np.array([t for row in tokens for t in row], np.int32)
    return GroupTensors(
        group_id=group_id,
        prompt_ids=np.array([1], np.int32),
        lengths=tuple(map(len, tokens)),
        token_ids=flat,
        logprobs=np.zeros(len(flat), np.float32),
        mask=np.ones(len(flat), bool),
    )


@asynccontextmanager
async def running(spec: ModelSpec, *criteria: Criterion) -> AsyncIterator[RewardActor]:
    actor = RewardActor(criteria, spec)
    await actor.start()
    try:
        yield actor
    finally:
        await actor.close()


async def scores_of(actor: RewardActor, *args: Any) -> Scores:
    scores, _ = await actor.score(*args)
    return scores


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def gone(pid: int) -> bool:
    """Whether process `pid` no longer runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def reward_model(tokenizer_spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """An untrained sequence classifier with one label, and the tokenizer of `tokenizer_spec`."""
    folder = tmp_path_factory.mktemp("reward-model")
    config = Qwen2Config(
        vocab_size=64,  # room for what the tokenizer class adds
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        num_labels=1,
        pad_token_id=0,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_spec.name).save_pretrained(folder)
    return ModelSpec(name=str(folder))


class Judge:
    """A criterion that fails so often, and counts how often it is asked."""

    def __init__(self, name: str, failures: int = 0) -> None:
        self.name = name
        self.failures = failures
        self.asked = 0

    async def score(self, _: Prompt, completions: Sequence[str], *more: Any) -> list[float]:
        self.asked += 1
        if self.asked <= self.failures:
            raise RewardFailed(self.name, RewardFailure.UNREACHED, "no connection")
        return [float(self.asked)] * len(completions)


def test_while_one_criterion_is_away_the_others_are_asked_once_for_a_group(
    tokenizer_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward, "KEPT_TRIES", 1)
    actor = RewardActor((), tokenizer_spec)
    actor._load_tokenizer()
    answers, away = Judge("answers"), Judge("away", failures=4)
    actor._scorers = (answers, away)  # type: ignore[assignment]

    async def fails(*args: Any) -> None:
        with pytest.raises(RewardFailed, match="no connection"):
            await actor.score(*args)

    async def body() -> None:
        one, other = group("a"), group("b")  # another try of it may have other tokens
        await fails(prompt(), one)
        await fails(prompt(), one)
        assert answers.asked == 1
        await fails(prompt(), other)
        await fails(prompt(), one)  # given up meanwhile, as far as the actor knows
        assert answers.asked == 3
        assert (await scores_of(actor, prompt(), one)).values == ((3.0, 5.0),)
        assert answers.asked == 3
        await scores_of(actor, prompt(), one)
        assert answers.asked == 4, "it was for that one try"

    run(body)


class TestRewardModels:
    @pytest.mark.slow
    def test_functions_and_models_score_the_same_group_in_the_order_they_were_given(
        self, tokenizer_spec: ModelSpec, reward_model: ModelSpec, criterion: Any
    ) -> None:
        model = RewardModelCriterion("model", reward_model, batch_size=2, timeout_s=60.0)

        async def body() -> None:
            criteria = (criterion("lengths"), model, criterion("ones"))
            async with running(tokenizer_spec, *criteria) as actor:
                scores = await scores_of(actor, prompt(), group("abc", "a", "abc"))
                with pytest.raises(RewardFailed, match="max_tokens is 32") as failed:
                    await scores_of(actor, prompt(), group("a" * 40))
                assert failed.value.reason is RewardFailure.TOO_LONG
                assert (await scores_of(actor, prompt(), group("abc"))).values[0][0] == 3.0
            assert scores.criteria == ("lengths", "model", "ones")
            assert [row[0] for row in scores.values] == [3.0, 1.0, 3.0]
            first, second, third = (row[1] for row in scores.values)
            assert first == pytest.approx(third, abs=1e-6)
            assert first != pytest.approx(second, abs=1e-6)

        run(body)


class TestScoring:
    @pytest.mark.slow
    def test_completions_are_decoded_without_special_tokens_and_scored_by_every_criterion(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("lengths"), criterion("ones")) as actor:
                scores, texts = await actor.score(
                    prompt(answer="x"), group("abc", "", "a b", group_id=9)
                )
            assert scores.group_id == 9
            assert scores.criteria == ("lengths", "ones")
            assert scores.values == ((3.0, 1.0), (0.0, 1.0), (3.0, 1.0))
            assert texts == ("abc", "", "a b")

        run(body)

    @pytest.mark.slow
    @pytest.mark.parametrize("source", ["p", [{"role": "user", "content": "p"}]])
    def test_thoughts_that_the_prompt_opens_are_thoughts_to_the_rewards_that_read_them(
        self, tokenizer_spec: ModelSpec, criterion: Any, source: Any
    ) -> None:
        spec = RewardFunctionSpec(function="tags", options={"tags": ["think", "answer"]})
        ours = [resolve(RewardFunctionSpec(function=name)) for name in ("preference", "math")]
        ours.append(resolve(spec))
        said = group(
            "so 4</think><answer>5</answer>",
            "<think>so 4</think><answer>5</answer>",
            "so it is 5",
        )

        async def body() -> None:
            row = prompt(source, answer="5", chosen="so it is 5", rejected="4")
            asked = replace(row, text="p<think>\n")
            seen = (criterion("lengths"),) if isinstance(source, str) else ()
            async with running(tokenizer_spec, *ours, *seen) as actor:
                scores, texts = await actor.score(asked, said)
                plain = await scores_of(actor, row, said)
            assert [row[1:3] for row in scores.values] == [(1, 1), (1, 1), (0, 0)]
            assert [row[1:3] for row in plain.values] == [(1, 0), (1, 1), (1, 0)]
            (amid, own, unfinished), wording = scores.values, plain.values[2][0]
            assert (amid[0] == own[0], unfinished[0], wording) == (True, 0.0, 1.0)
            assert texts[0] == "so 4</think><answer>5</answer>"
            assert [row[3:] for row in scores.values] == [row[3:] for row in plain.values]

        run(body)

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("what", ((24.0,), (4.0,))),
            ([{"role": "user", "content": "what"}], ((21.0,), (1.0,))),
        ],
    )
    def test_functions_get_prompts_completions_columns_and_options(
        self, tokenizer_spec: ModelSpec, criterion: Any, source: Any, expected: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("seen", scale=10)) as actor:
                scores = await scores_of(
                    actor, prompt(source, answer="yes", level=2, other="x"), group("yes", "no")
                )
            assert scores.values == expected

        run(body)

    @pytest.mark.slow
    @pytest.mark.parametrize("source", ["2+3", [{"role": "user", "content": "2+3"}]])
    def test_of_an_episode_rewards_read_what_the_model_says_last(
        self, tokenizer_spec: ModelSpec, reward_model: ModelSpec, source: Any
    ) -> None:
        """Whatever the prompt is: never what a tool said, and no text of the chat's marks."""
        rewards = [
            resolve(RewardFunctionSpec(function=name)) for name in ("contains", "exact_match")
        ]
        model = RewardModelCriterion("model", reward_model, 2, 60.0, reads="completion")
        asked = {"role": "user", "content": "2+3"}
        call = {"role": "assistant", "content": "", "tool_calls": []}
        told = {"role": "tool", "content": "5"}
        talks = Conversations(
            messages=tuple(
                [asked, call, told, {"role": "assistant", "content": said}] for said in "565"
            ),
            asked=(1, 1, 1),
            last_rows=(0, 1, 2),
        )

        async def body() -> None:
            async with running(tokenizer_spec, *rewards, model) as actor:
                raw = group("tool call 5 5", "tool call 5 6", "another call 5 5")
                scores, texts = await actor.score(prompt(source, answer="5"), raw, talks)
                alone = await scores_of(actor, prompt(answer="5"), group("5", "6", "5"))
            assert [row[:2] for row in scores.values] == [(1.0, 1.0), (0.0, 0.0), (1.0, 1.0)]
            of_talks, of_texts = ([row[2] for row in s.values] for s in (scores, alone))
            assert of_talks == pytest.approx(of_texts, abs=1e-6)
            assert texts[0] == "tool call 5 5", "samples show all that was written"

        run(body)

    def test_an_async_function_is_awaited_for_every_group(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("slowly")) as actor:
                for text in ("a", "ab"):
                    scores = await scores_of(actor, prompt(), group(text))
                    assert scores.values == ((float(len(text)),),)

        run(body)

    @pytest.mark.slow
    def test_registered_and_pickled_functions_are_run_alike(
        self, tokenizer_spec: ModelSpec
    ) -> None:
        bonus = 4.0
        spec = RewardFunctionSpec(function="math")
        own = from_callable(lambda completions: [bonus for _ in completions], spec)

        async def body() -> None:
            async with running(tokenizer_spec, resolve(spec), own) as actor:
                scores = await scores_of(actor, prompt(answer="42"), group("it is 42", "41"))
            assert scores.values == ((1.0, 4.0), (0.0, 4.0))

        run(body)

    def test_many_groups_in_flight_each_get_their_own_scores(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("lengths")) as actor:
                results = await asyncio.gather(
                    *(scores_of(actor, prompt(), group("a" * n, group_id=n)) for n in range(20))
                )
            assert [(r.group_id, r.values) for r in results] == [
                (n, ((float(n),),)) for n in range(20)
            ]

        run(body)

    def test_what_the_user_prints_does_not_reach_the_channel(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("printing")) as actor:
                for _ in range(2):
                    assert (await scores_of(actor, prompt(), group("a"))).values == ((2.0,),)

        run(body)

    @pytest.mark.slow
    def test_tags_that_are_special_tokens_are_part_of_what_the_model_wrote(
        self, tokenizer_spec: ModelSpec, tmp_path: Path
    ) -> None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_spec.name)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<think>", "</think>"], "pad_token": "<pad>"}
        )
        tokenizer.save_pretrained(tmp_path)
        Qwen2Config(eos_token_id=0).save_pretrained(tmp_path)
        ids = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<pad>"])
        opened, closed, pad = map(int, ids)
        tokens = np.array([opened, 3, closed, 5, 0, pad], np.int32)
        written = replace(group("abcde"), token_ids=tokens, lengths=(6,))
        pattern = {"pattern": "<think>c</think>e"}
        criterion = resolve(RewardFunctionSpec(function="format", options=pattern))

        async def body() -> None:
            async with running(ModelSpec(name=str(tmp_path)), criterion) as actor:
                scores, texts = await actor.score(prompt(), written)
            assert texts == ("<think>c</think>e",)
            assert scores.values == ((1.0,),)

        run(body)

    @pytest.mark.slow
    def test_a_data_column_of_an_option_s_name_is_not_that_option(
        self, tokenizer_spec: ModelSpec
    ) -> None:
        """Countdown's data have `target`; `side` is an option of `length` that is not given."""
        criterion = resolve(RewardFunctionSpec(function="length", options={"target": 4}))

        async def body() -> None:
            async with running(tokenizer_spec, criterion) as actor:
                scores = await scores_of(actor, prompt(target=98, side="left"), group("ab"))
            assert scores.values == ((-0.5,),)

        run(body)


class TestFailures:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("what", "reason", "detail"),
        [
            ("raise", RewardFailure.RAISED, "user mistake"),
            ("sys exit", RewardFailure.RAISED, "SystemExit: 3"),
            ("exit", RewardFailure.DIED, "exit status 3"),
            ("segfault", RewardFailure.DIED, "signal 11"),
            ("exit leaving a process", RewardFailure.DIED, "exit status 3"),
            ("close every file", RewardFailure.DIED, "while scoring a group"),
            ("nan", RewardFailure.NOT_FINITE, "completion 0 is nan"),
            ("inf", RewardFailure.NOT_FINITE, "completion 0 is inf"),
            ("text", RewardFailure.NOT_A_NUMBER, "completion 0 is '1'"),
            ("few", RewardFailure.WRONG_COUNT, "1 values for 2 completions"),
        ],
    )
    def test_each_is_reported_and_the_next_group_is_scored(
        self,
        tokenizer_spec: ModelSpec,
        criterion: Any,
        what: str,
        reason: RewardFailure,
        detail: str,
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("misbehaving")) as actor:
                with pytest.raises(RewardFailed) as failure:
                    await scores_of(actor, prompt(what), group("a", "b"))
                assert failure.value.criterion == "misbehaving"
                assert failure.value.reason is reason
                assert detail in failure.value.detail
                scores = await scores_of(actor, prompt("fine"), group("a", "b"))
                assert scores.values == ((5.0,), (5.0,))

        run(body)

    def test_the_detail_shows_the_users_line_and_not_ours(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("misbehaving")) as actor:
                with pytest.raises(RewardFailed) as failure:
                    await scores_of(actor, prompt("raise"), group("a"))
                assert 'raise KeyError("user mistake")' in failure.value.detail
                assert "scoring/child.py" not in failure.value.detail

        run(body)

    @pytest.mark.slow
    def test_a_hang_ends_at_the_limit_and_costs_other_groups_and_criteria_no_more(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        limit = 1.0

        async def body() -> None:
            async with running(
                tokenizer_spec, criterion("misbehaving", timeout_s=limit), criterion("ones")
            ) as actor:
                began = time.monotonic()
                results = await asyncio.gather(
                    scores_of(actor, prompt("hang"), group("a")),
                    scores_of(actor, prompt("fine"), group("a")),
                    return_exceptions=True,
                )
                seconds = time.monotonic() - began
            assert isinstance(results[0], RewardFailed)
            assert results[0].reason is RewardFailure.TIMEOUT
            assert "within 1 s" in results[0].detail
            assert results[1].values == ((5.0, 1.0),)  # type: ignore[union-attr]
            assert limit <= seconds < 30

        run(body)

    @pytest.mark.slow
    def test_a_group_waiting_behind_a_hang_keeps_its_own_time_limit(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("misbehaving", timeout_s=0.5)) as actor:
                results = await asyncio.gather(
                    *(scores_of(actor, prompt("hang"), group("a")) for _ in range(3)),
                    scores_of(actor, prompt("fine"), group("a")),
                    return_exceptions=True,
                )
            reasons = [getattr(result, "reason", None) for result in results]
            assert reasons == [RewardFailure.TIMEOUT] * 3 + [None]

        run(body)

    @pytest.mark.slow
    def test_a_caller_that_leaves_does_not_leave_its_call_running(
        self, tokenizer_spec: ModelSpec, criterion: Any
    ) -> None:
        async def body() -> None:
            async with running(tokenizer_spec, criterion("misbehaving")) as actor:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(scores_of(actor, prompt("hang"), group("a")), 0.5)
                assert (await scores_of(actor, prompt("fine"), group("a"))).values == ((5.0,),)

        run(body)

    def test_a_function_that_cannot_be_imported_here_keeps_the_actor_from_starting(
        self, tokenizer_spec: ModelSpec
    ) -> None:
        async def body() -> None:
            actor = RewardActor((RewardCriterion("lost", "no_such_module:f", 1.0),), tokenizer_spec)
            with pytest.raises(RewardFailed, match="no module 'no_such_module'") as failure:
                await actor.start()
            assert failure.value.reason is RewardFailure.IMPORT

        run(body)

    def test_a_machine_that_cannot_say_now_whether_it_has_a_sandbox_begins(
        self, tokenizer_spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who runs a program asks again, and does not run it then."""

        def busy(_: str) -> str:
            raise SandboxBusy("bwrap has not ended within 20 s")

        monkeypatch.setattr(reward, "in_force", busy)

        async def body() -> None:
            actor = RewardActor((), tokenizer_spec)
            assert "bwrap has not ended" in (await actor.start())["sandbox"]
            await actor.close()

        run(body)

    def test_a_column_that_is_missing_is_named(self, tokenizer_spec: ModelSpec) -> None:
        async def body() -> None:
            async with running(
                tokenizer_spec, resolve(RewardFunctionSpec(function="exact_match"))
            ) as actor:
                with pytest.raises(RewardFailed, match=r"column 'answer'.*\(columns: 'gold'\)"):
                    await scores_of(actor, prompt(gold="x"), group("a"))

        run(body)


ORPHAN_SCRIPT = """
import asyncio, sys
from tests.actors.scoring.test_reward_actor import (
    RewardActor, RewardCriterion, ModelSpec, group, prompt
)

async def main():
    criterion = RewardCriterion("c", "user_rewards:leave_pid_and_hang", 600.0,
                                {"folder": sys.argv[2]}, (sys.argv[3],))
    actor = RewardActor((criterion,), ModelSpec(name=sys.argv[1]))
    await actor.start()
    await actor.score(prompt(), group("a"))

asyncio.run(main())
"""


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("keeper", ["runs", "is stopped"])
    def test_no_child_outlives_an_actor_that_is_killed_amid_a_call(
        self, tokenizer_spec: ModelSpec, user_folder: Path, tmp_path: Path, keeper: str
    ) -> None:
        line = ["-c", ORPHAN_SCRIPT, tokenizer_spec.name, str(tmp_path), str(user_folder)]
        with (tmp_path / "output").open("wb") as output:
            parent = drivers.start(line, env=plain_environment(), output=output)
        try:
            started = (tmp_path / "pid").exists
            assert within(120, lambda: started() or parent.poll() is not None)
            assert parent.poll() is None
            child = int((tmp_path / "pid").read_text())
            assert not gone(child)
            above = psutil.Process(child).ppid()
            if keeper == "is stopped":
                os.kill(above, signal.SIGSTOP)
        finally:
            parent.send_signal(signal.SIGKILL)
            parent.wait()
        assert within(10, lambda: gone(child) and gone(above))

    @pytest.mark.slow
    def test_a_child_that_hangs_holding_the_interpreter_lock_is_killed_at_the_limit(
        self, tokenizer_spec: ModelSpec, criterion: Any, tmp_path: Path
    ) -> None:
        async def body() -> None:
            stuck = criterion("leave_pid_and_hang", timeout_s=1.0, folder=str(tmp_path))
            async with running(tokenizer_spec, stuck) as actor:
                with pytest.raises(RewardFailed) as failure:
                    await scores_of(actor, prompt(), group("a"))
            assert failure.value.reason is RewardFailure.TIMEOUT

        run(body)
        assert within(10, lambda: gone(int((tmp_path / "pid").read_text())))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_in_ray_failures_arrive_whole_and_children_end_with_the_actor(
    tokenizer_spec: ModelSpec, criterion: Any, tmp_path: Path
) -> None:
    criteria = (criterion("misbehaving", timeout_s=1.0), criterion("ones"))
    actor: Any = ray.remote(RewardActor).options(num_cpus=0.5).remote(criteria, tokenizer_spec)
    ray.get(actor.start.remote(), timeout=120)
    tensors = ray.put(group("a", "b"))

    score = actor.score.options(num_returns=2)
    (hanging, _), (fine, texts) = (score.remote(prompt(what), tensors) for what in ("hang", "fine"))
    with pytest.raises(RewardFailed) as failure:
        ray.get(hanging, timeout=60)
    assert failure.value.cause.reason is RewardFailure.TIMEOUT  # type: ignore[attr-defined]
    assert ray.get(fine, timeout=60).values == ((5.0, 1.0), (5.0, 1.0))
    assert ray.get(texts, timeout=60) == ("a", "b")

    stuck = criterion("leave_pid_and_hang", folder=str(tmp_path))
    other: Any = ray.remote(RewardActor).options(num_cpus=0.5).remote((stuck,), tokenizer_spec)
    pid = ray.get(other.start.remote(), timeout=120)["pid"]
    other.score.remote(prompt(), tensors)
    assert within(60, (tmp_path / "pid").exists)
    os.kill(pid, signal.SIGKILL)
    assert within(10, lambda: gone(int((tmp_path / "pid").read_text())))
