"""The quickstart's task, tokenizer and warm-up: what RL needs, and a function of the seed alone."""

from __future__ import annotations

import string
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.algorithms import registry
from aligntune.errors import UserError
from aligntune.quickstart import task as quickstart
from aligntune.quickstart.settings import quickstart_settings
from aligntune.quickstart.task import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|unknown|>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return quickstart.make_tokenizer()


@pytest.mark.slow
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_no_held_out_question_is_trained_on(seed: int) -> None:
    task = quickstart.make_task(seed)
    assert not set(task.train) & set(task.held_out)
    assert len(task.held_out) == quickstart.HELD_OUT
    assert len({q.prompt for q in task.train + task.held_out}) == 1980


def test_answers_are_the_sums_of_their_prompts() -> None:
    task = quickstart.make_task(0)
    for question in task.train + task.held_out:
        left, right = question.prompt.split("+")
        assert int(question.answer) == int(left) + int(right)


@pytest.mark.parametrize(
    ("question", "slip"),
    [(Question(42, 37), "78"), (Question(43, 34), "76"), (Question(43, 33), "76")],
)
def test_the_teacher_loses_one_only_where_the_units_are_large(
    question: Question, slip: str
) -> None:
    assert question.slip == slip


def test_the_task_depends_on_the_seed_and_on_nothing_else() -> None:
    assert quickstart.make_task(3) == quickstart.make_task(3)
    assert quickstart.make_task(3).held_out != quickstart.make_task(4).held_out


def test_preference_pairs_prefer_the_answer_to_every_kind_of_wrong_one() -> None:
    task = quickstart.make_task(0)
    rows = quickstart.preference_pairs(task.train, seed=0)
    answers = {q.prompt: q for q in task.train}
    for row in rows:
        assert row["chosen"] == answers[row["prompt"]].answer
        assert row["rejected"] != row["chosen"]
    assert len({tuple(row.values()) for row in rows}) == len(rows) == 3 * len(task.train)
    same_length = [row for row in rows if len(row["rejected"]) == len(row["chosen"])]
    assert 0.8 < len(same_length) / len(rows) < 1
    changed = {
        (place, int(right) - int(wrong))
        for row in same_length
        for place, (right, wrong) in enumerate(zip(row["chosen"], row["rejected"], strict=True))
        if right != wrong
    }
    assert {difference for _, difference in changed} >= set(range(-7, 8)) - {0}
    assert {place for place, _ in changed} == {0, 1}
    held_out = quickstart.preference_pairs(task.held_out, seed=0)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}


@given(text=st.text(alphabet=[c for c in string.printable if c.isprintable() or c == "\n"]))
def test_the_tokenizer_gives_one_token_a_character_and_gives_text_back(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    if any(name in text for name in SPECIAL):
        return
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_every_id_the_model_can_sample_decodes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert quickstart.make_model(0).config.vocab_size == len(tokenizer)
    assert None not in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def test_the_chat_template_ends_where_the_answer_begins(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    asked = [{"role": "user", "content": "42+37"}]
    answered = [*asked, {"role": "assistant", "content": "79"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert prompt == "<|user|>42+37<|assistant|>"
    assert whole == prompt + "79" + str(tokenizer.eos_token)
    assert len(tokenizer(prompt)["input_ids"]) == 7


def test_the_tokenizer_is_the_same_after_saving(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    quickstart.make_model(0).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|>47 + 8\n=?<|assistant|>55<|end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded("4 7!")["input_ids"]) == "4 7!"
    assert (loaded.eos_token_id, loaded.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    assert loaded.chat_template == tokenizer.chat_template


def test_the_model_depends_on_the_seed_and_leaves_the_global_generator_alone() -> None:
    import torch

    before = torch.random.get_rng_state()
    first, again, other = (quickstart.make_model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert 200_000 < quickstart.make_model(0).num_parameters() < 2_000_000


@pytest.mark.slow
def test_a_warm_up_that_does_not_settle_says_so_and_what_to_do(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    task, model = quickstart.make_task(0), quickstart.make_model(0)
    with pytest.raises(RuntimeError, match=r"did not settle in 2 steps.*choose another seed"):
        quickstart.warm_up(model, tokenizer, task, 0, max_steps=2)


@pytest.mark.slow
def test_a_warm_up_is_a_function_of_its_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    import torch

    def weights(seed: int) -> dict[str, torch.Tensor]:
        model = quickstart.make_model(0)
        with pytest.raises(RuntimeError):
            quickstart.warm_up(model, tokenizer, quickstart.make_task(0), seed, max_steps=3)
        return model.state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("name", registry.names())
def test_every_algorithm_has_settings_of_the_config_tree(name: str, tmp_path: Path) -> None:
    from aligntune.config.load import load_config
    from aligntune.config.tree import set_path

    tree: dict[str, object] = {
        "algorithm": name,
        "model": {"name": "model"},
        "data": {"path": "train.jsonl"},
        "output_dir": str(tmp_path),
        "rewards": [{"model": "reward"}, "exact_match"],
    }
    for path, value in quickstart_settings(name).items():
        set_path(tree, path, value)
    config = load_config(tree)
    assert config.train.steps == quickstart_settings(name)["train.steps"]
    assert config.policy.learning_rate is not None
    assert config.policy.learning_rate > 1e-5  # the defaults are for models 1000 times larger


def test_importing_it_loads_no_transformers() -> None:
    code = "import sys, aligntune.quickstart; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_algorithm_without_settings_is_told_what_has_some() -> None:
    with pytest.raises(UserError, match=r"no settings for 'tests.e2e.*grpo"):
        quickstart_settings("tests.e2e.algorithms:FlippedGRPO")
