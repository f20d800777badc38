"""The same model, tools and sampled tokens give the same ids, masks and rewards as TRL.

Where TRL differs by definition (`TestDifferences`), a test says how.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.environments.base import Episode
from actors.environments.record import rows_of
from actors.environments.specs import EpisodeCode
from actors.environments.tool_episodes import ToolEpisodes
from actors.messages import FinishReason
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, Script, call_text, prompt_of

pytestmark = pytest.mark.slow  # TRL's trainer takes seconds to be imported and made

TOOLS = ("add", "later")
BUDGET = 1500  # TRL's max_completion_length: of policy and tools together


@pytest.fixture(scope="module")
def user(user_folder: Path) -> Iterator[Any]:
    """The user's module, as TRL's trainer gets it."""
    sys.path.insert(0, str(user_folder))
    yield importlib.import_module("user_tools")
    sys.path.remove(str(user_folder))
    del sys.modules["user_tools"]


@pytest.fixture(scope="module")
def trainer_of(
    chat_model: ModelSpec, tokenizer: Any, user: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """TRL's trainer with our tools, made once with and once without environments."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    kept: dict[bool, Any] = {}

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(said)) for said in completions]

    def make(environments: bool) -> Any:
        if environments not in kept:
            kept[environments] = GRPOTrainer(
                model=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(chat_model.name)),
                reward_funcs=[user.both] if environments else [reward],
                args=GRPOConfig(
                    output_dir=str(tmp_path_factory.mktemp("trl")),
                    use_cpu=True,
                    report_to=[],
                    per_device_train_batch_size=16,  # its logs keep as many
                    num_generations=2,
                    max_completion_length=BUDGET,
                    max_tool_calling_iterations=LIMITS.max_turns - 1,
                ),
                train_dataset=Dataset.from_list(
                    [{"prompt": [{"role": "user", "content": "x"}]}] * 4
                ),
                processing_class=tokenizer.__class__.from_pretrained(chat_model.name),
                tools=[getattr(user, name) for name in TOOLS],
                environment_factory={"Guess": user.Guess, "Quiet": user.Quiet}
                if environments
                else None,
            )
        return kept[environments]

    return make


def by_trl(trainer: Any, inputs: Sequence[dict[str, Any]], turns: list[list[list[int]]]) -> Any:
    """TRL's own rollout of `inputs` where row i's policy writes `turns[i]`: prompt ids, completion
    ids and mask of each row, without padding, and its conversations."""
    written = [0] * len(inputs)
    heads: list[list[int]] = []
    conversations: list[Any] = []

    def single_turn(prompt_ids: Any, *_: Any, **__: Any) -> Any:
        answers = []
        first = not heads
        heads.extend(map(list, prompt_ids) if first else [])
        taken: set[int] = set()
        for place, ids in enumerate(prompt_ids):
            row = (
                place
                if first
                else next(
                    i
                    for i, head in enumerate(heads)
                    if i not in taken
                    and ids[: len(head)] == head
                    and written[i] < len(turns[i])
                    and contains(ids, turns[i][written[i] - 1])
                )
            )
            taken.add(row)
            answers.append(turns[row][written[row]][:BUDGET])
            written[row] += 1
        return answers, None

    def rewarded(rewards_of: Any) -> Any:
        def calculate(inputs: Any, prompts: Any, completions: Any, ids: Any) -> Any:
            conversations.extend(zip(prompts, completions, strict=True))
            return rewards_of(inputs, prompts, completions, ids)

        return calculate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_generate_single_turn", single_turn)
        patch.setattr(trainer, "_calculate_rewards", rewarded(trainer._calculate_rewards))
        found = trainer._generate_and_score_completions([dict(row) for row in inputs])
    rows = []
    for i in range(len(inputs)):
        kept = found["completion_mask"][i].bool()
        rows.append(
            (
                found["prompt_ids"][i][found["prompt_mask"][i].bool()].tolist(),
                found["completion_ids"][i][kept].tolist(),
                found["tool_mask"][i][kept].bool().tolist(),
            )
        )
    return rows, conversations


def contains(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(list(ids[i : i + len(part)]) == list(part) for i in range(len(ids) - len(part) + 1))


def as_row(episode: Episode) -> tuple[list[int], list[int], list[bool]]:
    """Prompt ids, and ids and mask of all that follows."""
    (row,) = rows_of(episode.calls, episode.finish_reason)
    prompt, *rest = row.segments
    ids = [int(token) for segment in rest for token in segment.token_ids]
    mask = [segment.logprobs is not None for segment in rest for _ in segment.token_ids]
    return [int(token) for token in prompt.token_ids], ids, mask


@pytest.fixture(scope="module")
def ours(
    chat_model: ModelSpec, user_folder: Path, tokenizer: Any, loop: Any
) -> Iterator[Callable[..., Episode]]:
    kept: dict[bool, ToolEpisodes] = {}

    def run(turns: Sequence[Any], row: dict[str, Any], environments: bool) -> Episode:
        if environments not in kept:
            names = ("Guess", "Quiet") if environments else ()
            code = EpisodeCode(
                tuple(f"user_tools:{name}" for name in TOOLS),
                {name: f"user_tools:{name}" for name in names},
                rewards={"both": "user_tools:both"} if environments else {},
                search_path=(str(user_folder),),
            )
            kept[environments] = ToolEpisodes(code, LIMITS, chat_model, None)
        episodes = kept[environments]
        episodes._limits = LIMITS
        columns = {name: value for name, value in row.items() if name != "prompt"}
        prompt = prompt_of(row["prompt"], **columns)
        first = loop(episodes.run(prompt, 0, 1, Script(tokenizer, turns)))
        episodes._limits = replace(LIMITS, max_tokens=len(first.calls[0].prompt_ids) + BUDGET)
        return loop(episodes.run(prompt, 0, 1, Script(tokenizer, turns)))

    yield run
    for made in kept.values():
        loop(made.close())


def user_says(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


ADD = call_text("add", a=1, b=2)
CONVERSATIONS = {
    "no call": ["done"],
    "a call": [ADD, "it is 3"],
    "thinking, which Qwen3's own template drops": [thought("hm") + ADD, thought("so") + "3"],
    "text before a call": ["I will add.\n" + ADD, "3"],
    "two calls": [ADD + "\n" + call_text("add", a="a", b="b"), "3"],
    "odd spacing": ['<tool_call>{"name":"add",\n "arguments":{"b": 1,"a":2}}</tool_call>\n\n', "3"],
    "an async tool": [call_text("later", text="  \n<|im_end|>\u00e9\u4e16 <think>"), ADD, "x"],
    "faults": [call_text("add", a=1), call_text("nope"), call_text("add", a=1, c=2), "x"],
    "a cut answer": [ADD, [65] * BUDGET],
    "special tokens in the answer": [ADD, "<think><tool_response></tool_response>\u00e9"],
}


def test_ids_masks_and_conversations_are_those_of_trl(
    trainer_of: Callable[..., Any], ours: Callable[..., Episode], tokenizer: Any
) -> None:
    names = list(CONVERSATIONS)
    inputs = [{"prompt": user_says(name)} for name in names]
    turns = [Script(tokenizer, said).turns for said in CONVERSATIONS.values()]
    rows, conversations = by_trl(trainer_of(environments=False), inputs, turns)
    for i, name in enumerate(names):
        episode = ours(turns[i], inputs[i], False)
        assert as_row(episode) == rows[i], name
        asked = episode.prompt_messages
        assert (episode.messages[:asked], episode.messages[asked:]) == conversations[i], name


def test_environments_rows_and_rewards_are_those_of_trl(
    trainer_of: Callable[..., Any], ours: Callable[..., Episode], tokenizer: Any
) -> None:
    scripts = [
        ["hello"],
        [call_text("guess", n=1) + ADD, call_text("guess", n=5), "5"],
        [call_text("tries_so_far"), call_text("guess"), call_text("nope"), "x"],
        [call_text("say", text="a"), "x"],
    ]
    inputs = [
        {"prompt": user_says("one"), "environment": "Guess", "number": 5},
        {"prompt": user_says("two"), "environment": "Guess", "number": 5},
        {"prompt": user_says("three"), "environment": "Guess", "number": 5},
        {"prompt": user_says("four"), "environment": "Guess", "number": 5},
    ]
    turns = [Script(tokenizer, said).turns for said in scripts]
    trainer = trainer_of(environments=True)
    rows, conversations = by_trl(trainer, inputs, turns)
    rewards = [list(trainer._logs["rewards"][name])[-len(inputs) :] for name in ("Guess", "both")]
    for i, row in enumerate(inputs):
        episode = ours(turns[i], row, True)
        assert as_row(episode) == rows[i]
        asked = episode.prompt_messages
        assert (episode.messages[:asked], episode.messages[asked:]) == conversations[i]
        assert episode.rewards["environment"] == pytest.approx(rewards[0][i])
        assert episode.rewards["both"] == pytest.approx(rewards[1][i])


class TestDifferences:
    def test_a_call_that_cannot_be_read_is_answered_and_not_taken_for_the_last_turn(
        self, trainer_of: Callable[..., Any], ours: Callable[..., Episode], tokenizer: Any
    ) -> None:
        said = ["<tool_call>{</tool_call>", "x"]
        turns, row = Script(tokenizer, said).turns, {"prompt": user_says("hi")}
        (found, _), _ = by_trl(trainer_of(environments=False), [row, row], [turns, turns])
        episode = ours(turns, row, False)
        assert len(found[1]) == len(turns[0]), "TRL ends the rollout"
        assert len(episode.calls) == 2
        assert as_row(episode)[1][: len(turns[0])] == found[1]

    def test_a_list_is_told_as_text(
        self, trainer_of: Callable[..., Any], ours: Callable[..., Episode], tokenizer: Any
    ) -> None:
        said = [call_text("add", a=[1], b=[2]), "x"]
        turns, row = Script(tokenizer, said).turns, {"prompt": user_says("hi")}
        (found, _), conversations = by_trl(trainer_of(environments=False), [row] * 2, [turns] * 2)
        episode = ours(turns, row, False)
        assert conversations[0][1][1]["content"] == [1, 2]
        assert "[1, 2]" not in tokenizer.decode(found[1]), "TRL's template shows nothing of it"
        assert episode.messages[2]["content"] == "[1, 2]"
        assert "[1, 2]" in tokenizer.decode(as_row(episode)[1])

    def test_answers_stand_in_the_order_of_the_calls_where_one_is_async(
        self, trainer_of: Callable[..., Any], ours: Callable[..., Episode], tokenizer: Any
    ) -> None:
        said = [call_text("later", text="a") + ADD, "x"]
        turns, row = Script(tokenizer, said).turns, {"prompt": user_says("hi")}
        _, conversations = by_trl(trainer_of(environments=False), [row, row], [turns, turns])
        told = [m["content"] for m in conversations[0][1] if m["role"] == "tool"]
        episode = ours(turns, row, False)
        assert told == ["3", "a"], "TRL has async ones last"
        assert [m["content"] for m in episode.messages if m["role"] == "tool"] == ["a", "3"]
        assert episode.finish_reason is FinishReason.STOP
