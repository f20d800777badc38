"""The same model, tools and sampled tokens give the same ids, masks, rewards and loss as TRL.

Where TRL differs by definition (`TestDifferences`), a test says how.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.environments.base import Episode
from actors.environments.groups import made_group
from actors.environments.record import rows_of
from actors.environments.specs import EpisodeCode, EpisodeReward
from actors.environments.tool_episodes import ToolEpisodes
from actors.messages import FinishReason, Scores
from actors.specs import ModelSpec
from aligntune.algorithms import advantages
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.groups import ReadyGroup, group_works
from aligntune.online.sharing import plan_step
from tests.actors.environments.chat import LIMITS, Script, call_text, prompt_of
from tests.actors.policy_cases import Probe, logprobs_of, one_rank
from tests.trl_without_vllm import grpo_trainer

pytestmark = pytest.mark.slow  # TRL's trainer takes seconds to be imported and made

TOOLS = ("add", "later")
ENVIRONMENTS = ("Guess", "Quiet", "Shop")
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

    grpo = grpo_trainer()

    kept: dict[bool, Any] = {}

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(said)) for said in completions]

    def make(environments: bool) -> Any:
        if environments not in kept:
            kept[environments] = grpo.GRPOTrainer(
                model=AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(chat_model.name)),
                reward_funcs=[user.both] if environments else [reward],
                args=grpo.GRPOConfig(
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
                environment_factory={name: getattr(user, name) for name in ENVIRONMENTS}
                if environments
                else None,
            )
        return kept[environments]

    return make


def by_trl(trainer: Any, inputs: Sequence[dict[str, Any]], turns: list[list[list[int]]]) -> Any:
    """`scored_by_trl`: prompt ids, completion ids and mask of each row, without padding, and its
    conversations."""
    found, conversations = scored_by_trl(trainer, inputs, turns)
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


def scored_by_trl(
    trainer: Any, inputs: Sequence[dict[str, Any]], turns: list[list[list[int]]]
) -> tuple[dict[str, Any], list[Any]]:
    """TRL's own rollout of `inputs` where row i's policy writes `turns[i]`: what its loss takes,
    and the conversation of each row."""
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
    return found, conversations


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
            names = ENVIRONMENTS if environments else ()
            code = EpisodeCode(
                tuple(f"user_tools:{name}" for name in TOOLS),
                {name: f"user_tools:{name}" for name in names},
                rewards={"both": EpisodeReward("user_tools:both", 30.0)} if environments else {},
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
        for message in conversations[i][1]:
            if thinking := message.get("reasoning_content"):  # an end amid it stays there in TRL
                message["reasoning_content"] = thinking.removesuffix(tokenizer.eos_token)
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


def test_an_environment_that_prints_and_is_async_is_as_in_trl(
    trainer_of: Callable[..., Any], ours: Callable[..., Episode], tokenizer: Any
) -> None:
    """Defaults and lists as arguments, answers that are no text, methods and a reward of both
    kinds, several calls in a turn, a function beside the methods, columns for `reset`."""
    scripts = [
        [
            call_text("prices") + call_text("thank") + ADD,
            call_text("take", things=["apple", "fig"], count=2) + call_text("has", thing="pear"),
            call_text("has", thing="apple") + call_text("pair"),
            "thanks",
        ],
        [call_text("take", things=[], gift=True) + call_text("has"), "no"],
    ]
    inputs = [
        {"prompt": user_says("Buy."), "environment": "Shop", "coins": coins, "number": 5}
        for coins in (3, 4)
    ]
    turns = [Script(tokenizer, said).turns for said in scripts]
    trainer = trainer_of(environments=True)
    rows, conversations = by_trl(trainer, inputs, turns)
    rewards = list(trainer._logs["rewards"]["Shop"])[-len(inputs) :]
    for i, row in enumerate(inputs):
        episode = ours(turns[i], row, True)
        assert as_row(episode) == rows[i]
        asked = episode.prompt_messages
        assert (episode.messages[:asked], episode.messages[asked:]) == conversations[i]
        assert episode.rewards == {"environment": pytest.approx(rewards[i]), "both": None}
    assert rewards == [4.0, 0.0]


LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"name": "grpo"}, {"beta": 0.04}),
    "grpo without KL": ({"name": "grpo", "beta": 0.0}, {}),
    "grpo on the policy": (
        {"name": "grpo", "beta": 0.0, "old": "policy", "correction": "none"},
        {"old_per_token_logps": None},
    ),
    "dapo": (
        {"name": "dapo", "overlong_shaping": False},
        {"loss_type": "dapo", "epsilon_high": 0.28},
    ),
    "drgrpo": ({"name": "drgrpo"}, {"loss_type": "dr_grpo"}),
    "gspo": (
        {"name": "gspo", "clip_low": 0.1, "clip_high": 0.15},
        {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.15},
    ),
}
"""Our algorithm, and what TRL is set to."""

SHORT = [name for name in CONVERSATIONS if name != "a cut answer"][:8]
CUTS = [(10**6, 10**6, False), (1, 64, False), (700, 100, True)]  # micro-batch, chunk, packing


@pytest.fixture(scope="module")
def policy(trainer_of: Callable[..., Any], tokenizer: Any, tmp_path_factory: Any) -> Probe:
    """A rank of ours with the weights of TRL's model, both in float64."""
    model = trainer_of(environments=False).model
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    actor = one_rank(folder)
    model.double()
    actor._strategy.model.double()
    return Probe(actor)


@pytest.fixture(scope="module")
def step(
    trainer_of: Callable[..., Any], ours: Callable[..., Episode], tokenizer: Any, policy: Probe
) -> tuple[dict[str, Any], list[ReadyGroup]]:
    """The conversations as a step of groups of two: as TRL's loss takes it, and as ours does. The
    policy has moved since: the log-probs of the rollouts are a little off."""
    said = [CONVERSATIONS[name] for name in SHORT]
    inputs = [{"prompt": user_says(f"pair {i // 2}")} for i in range(len(said))]
    turns = [Script(tokenizer, one).turns for one in said]
    trainer = trainer_of(environments=False)
    found, _ = scored_by_trl(trainer, inputs, turns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "scale_rewards", "none")
        found["centred"] = scored_by_trl(trainer, inputs, turns)[0]["advantages"]
    groups = []
    for number in range(0, len(said), 2):
        places = (number, number + 1)
        episodes = [ours(turns[i], inputs[i], False) for i in places]
        record, tensors, talks = made_group(number // 2, episodes, 1.0, 0.1, "rollout-0")
        (own,) = logprobs_of(policy.actor, [tensors], temperature=1.0)
        drift = np.random.default_rng(number).normal(0, 0.15, (2, len(own)))
        tensors = replace(tensors, logprobs=(own + drift[0]).astype(np.float32))
        lengths = [(float(len(e.messages) - e.prompt_messages),) for e in episodes]
        scores = Scores(record.group_id, ("turns",), tuple(lengths), 0.0)
        frozen = (own + drift[1]).astype(np.float32)
        groups.append(ReadyGroup(None, record, scores, None, tensors, talks, frozen))  # type: ignore[arg-type]
    shape = found["completion_ids"].shape
    for name, of in (
        ("old_per_token_logps", lambda group: group.tensors.logprobs),
        ("ref_per_token_logps", lambda group: group.reference),
    ):
        found[name] = torch.zeros(shape, dtype=torch.float64)
        for i in range(len(said)):
            values = of(groups[i // 2])[groups[i // 2].tensors.completion(i % 2)]
            found[name][i, : len(values)] = torch.from_numpy(values)
    return found, groups


def settings_of(algorithm: dict[str, Any]) -> RunConfig:
    """Of a run whose ratios are against the rollouts' log-probs, unless `algorithm` says else."""
    groups = len(SHORT) // 2
    config = load_config(
        {
            "algorithm": {"old": "rollout", **algorithm},
            "model": {"name": "m"},
            "data": {"path": "d"},
            "rewards": ["length"],
            "output_dir": "out",
            "tools": ["user_tools:add"],
            "rollout": {"max_completion_length": BUDGET},
            "train": {"groups_per_step": groups, "groups_per_minibatch": groups},
        }
    )
    assert isinstance(config, RunConfig)
    return config


def loss_of_trl(
    trainer: Any, found: dict[str, Any], settings: dict[str, Any]
) -> tuple[float, torch.Tensor]:
    """The loss of one step, and its gradient [parameters]."""
    settings = dict(settings)
    usual = {
        "beta": 0.0,
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
    }
    with pytest.MonkeyPatch.context() as patch:
        corrected = settings.pop("use_bias_correction_kl", False)
        patch.setattr(trainer.args, "use_bias_correction_kl", corrected)
        for name, value in {**usual, **settings}.items():
            patch.setattr(trainer, name, value)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, found)
        loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    return float(loss.detach()), torch.cat(
        [gradients[name].flatten() for name in sorted(gradients)]
    )


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_trl(
    trainer_of: Callable[..., Any],
    step: tuple[dict[str, Any], list[ReadyGroup]],
    policy: Probe,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the same rewards, whatever our micro-batches."""
    monkeypatch.setattr(advantages, "STD_EPSILON", 1e-4)  # see TestDifferences
    (algorithm, settings), (found, groups) = LOSSES[name], step
    trainer, config = trainer_of(environments=False), settings_of(algorithm)
    works = group_works(config, config.algorithm, groups)
    (job,) = plan_step(config, 1, config.algorithm, works)["policy"]
    if name == "drgrpo":
        found = {**found, "advantages": found["centred"]}
    old = "old_per_token_logps"
    found = {**found, old: settings.get(old, found[old])}
    settings = {k: v for k, v in settings.items() if k != old}
    loss, wanted = loss_of_trl(trainer, found, settings)
    assert float(wanted.norm()) > 1e-3
    for cut in CUTS:
        gradient, metrics = policy.gradient(job, *cut)
        got = torch.cat([gradient[n].flatten() for n in sorted(gradient)])
        assert metrics["loss/total"] == pytest.approx(loss, rel=1e-6, abs=1e-9), cut
        assert float((got - wanted).norm()) <= 1e-6 * float(wanted.norm()), cut


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

    def test_advantages_are_divided_by_a_deviation_with_less_added(
        self, step: tuple[dict[str, Any], list[ReadyGroup]]
    ) -> None:
        found, groups = step
        config = settings_of({"name": "grpo"})
        ours = torch.tensor(
            [a for w in group_works(config, config.algorithm, groups) for a in w.advantages]
        )
        deviations = [torch.tensor([v for (v,) in g.scores.values]).std() for g in groups]
        deviation = torch.stack(deviations).repeat_interleave(2)
        torch.testing.assert_close(
            ours * (deviation + 1e-6) / (deviation + 1e-4), found["advantages"], rtol=1e-5, atol=0
        )
        assert not torch.allclose(ours, found["advantages"], rtol=1e-5, atol=0)

    def test_the_kl_is_not_weighted_by_the_ratio(
        self,
        trainer_of: Callable[..., Any],
        step: tuple[dict[str, Any], list[ReadyGroup]],
    ) -> None:
        """TRL's `use_bias_correction_kl`, which it sets by default, is not GRPO's eq. 3."""
        trainer, (found, _) = trainer_of(environments=False), step
        assert trainer.args.use_bias_correction_kl
        plain, _ = loss_of_trl(trainer, found, {"beta": 0.04})
        weighted, _ = loss_of_trl(trainer, found, {"beta": 0.04, "use_bias_correction_kl": True})
        assert abs(weighted - plain) > 1e-7

    def test_tools_of_a_row_are_shown_to_nobody(
        self, trainer_of: Callable[..., Any], tokenizer: Any
    ) -> None:
        """Here such a row is refused (test_a_row_with_tools_of_its_own_is_refused)."""
        schema = {"type": "function", "function": {"name": "weather", "parameters": {}}}
        row = {"prompt": user_says("hi"), "tools": [schema]}
        turns = Script(tokenizer, ["x"]).turns
        (found, _), _ = by_trl(trainer_of(environments=False), [row] * 2, [turns] * 2)
        shown = tokenizer.decode(found[0])
        assert "weather" not in shown
        assert "add" in shown
