"""The quickstart's task for agents: its tokens and its teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.data.formats import render
from aligntune.errors import UserError
from aligntune.quickstart import agent
from aligntune.quickstart.agent import Sum, add, greedy_success, lesson, make_sums
from aligntune.quickstart.settings import quickstart_settings
from aligntune.quickstart.tiny import VOCABULARY_SIZE, tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOOLS = [get_json_schema(add)]
numbers = st.integers(10, 32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return agent.make_agent_tokenizer()


def test_its_template_carries_tools_and_preserves_prefixes(tokenizer: Any) -> None:
    from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert len(tokenizer) == VOCABULARY_SIZE
    assert render("12+13+14", tokenizer, tools=TOOLS) == "<|tools|>add<|user|>12+13+14<|assistant|>"


def test_a_call_is_read_from_the_tokens_that_make_it(tokenizer: Any) -> None:
    from trl.chat_template_utils import parse_response

    conversation = lesson(Sum(12, 13, 14), hasty=False)
    text = tokenizer.apply_chat_template(conversation, tools=TOOLS, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert (len(ids), tokenizer.decode(ids)) == (43, text)
    assistant, end = map(tokenizer.convert_tokens_to_ids, ("<|assistant|>", "<|end|>"))
    turns, sampled = [], 0
    while assistant in ids:
        start = ids.index(assistant) + 1
        stop = ids.index(end) + 1
        turns.append(parse_response(tokenizer, ids[start:stop], prefix=ids[:start]))
        sampled += stop - start
        ids = ids[stop:]
    assert [turn.get("tool_calls", turn["content"]) for turn in turns] == [
        conversation[1]["tool_calls"],
        conversation[3]["tool_calls"],
        "39",
    ]
    assert sampled == 23 <= agent.MAX_SAMPLED_TOKENS


@given(first=numbers, second=numbers, third=numbers)
def test_only_the_patient_teacher_is_always_right(first: int, second: int, third: int) -> None:
    question = Sum(first, second, third)
    for hasty in (False, True):
        messages = lesson(question, hasty)
        for call, told in zip(messages[1:-1:2], messages[2:-1:2], strict=True):
            (wanted,) = call["tool_calls"]
            assert str(add(**wanted["function"]["arguments"])) == told["content"]
        assert messages[-1]["content"] == messages[-2]["content"]
        assert (messages[-1]["content"] == question.answer) == (not hasty)
    assert len(question.answer) == 2


def test_no_held_out_question_is_trained_on_and_the_task_is_a_function_of_the_seed() -> None:
    train, held_out = make_sums(3)
    assert not set(train) & set(held_out)
    assert (train, held_out) == make_sums(3) != make_sums(4)
    assert 0.4 < sum(question.hasty for question in held_out) / len(held_out) < 0.8


def test_a_model_that_knows_nothing_succeeds_never(tokenizer: Any) -> None:
    model = tiny_model(0, tokenizer, agent.POSITIONS)
    assert greedy_success(model, tokenizer, make_sums(0)[1][:8]) == (0.0, 0.0)


def test_a_task_without_settings_is_named() -> None:
    with pytest.raises(UserError, match="no task 'agents'"):
        quickstart_settings("grpo", "agents")


@pytest.mark.parametrize("algorithm", ["grpo", "drgrpo", "dapo", "gspo", "ppo"])
def test_an_agent_is_trained_by_every_algorithm_of_the_quickstart(algorithm: str) -> None:
    settings = quickstart_settings(algorithm, "agent")
    tree = {
        "algorithm": {"name": algorithm},
        "model": {"name": "m"},
        "data": {"path": "d"},
        "rewards": ["exact_match"],
        "output_dir": "run",
    }
    config = load_config(tree, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    assert isinstance(config, RunConfig)
    assert config.tools == ["aligntune.quickstart.agent:add"]
    assert config.policy.learning_rate == quickstart_settings(algorithm)["policy.learning_rate"]


def test_importing_the_task_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import json, sys, aligntune.quickstart.agent\n"
        "print(json.dumps([name for name in ('torch', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
