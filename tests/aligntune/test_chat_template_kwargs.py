"""`model.chat_template_kwargs`: every text of a run is rendered with them, or they are refused."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.environments.rendered import chat_tokens
from actors.models.loading import load_tokenizer
from actors.models.templates import thinks
from actors.specs import ModelSpec
from aligntune import create_rl_trainer
from aligntune.chat import Asking, Conversation, asked_by_run
from aligntune.errors import UserError
from aligntune.report.card import _usage
from aligntune.tracking.advice import THINKS
from tests.actors.environments.chat import make_model, make_tokenizer

OFF = {"enable_thinking": False}
EMPTY = "<think>\n\n</think>\n\n"  # what Qwen3's template writes for no thoughts
ROW = {"prompt": "2+3", "chosen": "5", "rejected": "6", "completion": "5"}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights that has Qwen3's chat template."""
    folder = tmp_path_factory.mktemp("qwen3")
    make_model(folder, make_tokenizer())
    return folder


@pytest.fixture
def make(qwen3: Path, tmp_path: Path) -> Any:
    def trainer(algorithm: str, kwargs: dict[str, Any], *overrides: str) -> Any:
        (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        return create_rl_trainer(
            algorithm=algorithm,
            dataset_name=str(tmp_path / "rows.jsonl"),
            output_dir=str(tmp_path / "run"),
            config={"model": {"name": str(qwen3), "chat_template_kwargs": kwargs}},
            overrides=list(overrides),
        )

    return trainer


def decoded(trainer: Any, ids: Any) -> str:
    return str(trainer.inputs.tokenizer.decode(ids))


def test_prompts_end_where_the_template_ends_them_with_these(make: Any) -> None:
    assert make("grpo", {}).prompts.prompt_at(0).text.endswith("<|im_start|>assistant\n")
    off = make("grpo", OFF).prompts.prompt_at(0)
    assert off.text.endswith(f"<|im_start|>assistant\n{EMPTY}")


@pytest.mark.parametrize(
    ("kwargs", "overrides", "thinks"),
    [
        ({}, [], True),
        (OFF, [], False),
        ({"enable_thinking": True}, [], False),  # as the user wants it
        ({}, ["data.apply_chat_template=false"], False),
    ],
)
def test_a_run_is_told_that_its_model_thinks_where_it_could_be_switched_off(
    make: Any, kwargs: dict[str, Any], overrides: list[str], thinks: bool
) -> None:
    trainer = make("grpo", kwargs, *overrides, "rollout.max_completion_length=77")
    told = [line for line in trainer.inputs.told() if line.startswith("note: ")]
    assert told == [f"note: {THINKS}. Thoughts and answer have 77 tokens together"] * thinks


def test_a_template_without_the_variable_is_of_no_model_that_could_be_switched_off() -> None:
    assert thinks(make_tokenizer())
    assert not thinks(make_tokenizer("{% for m in messages %}<think>{{ m.content }}{% endfor %}"))
    unused = "{{ messages[0].content }}{% if enable_thinking is false and tools %}off{% endif %}"
    assert not thinks(make_tokenizer(unused))


@pytest.mark.parametrize(("kwargs", "answer"), [({}, f"{EMPTY}5"), (OFF, "5")])
def test_an_answer_of_a_pair_and_one_to_imitate_begin_where_the_prompt_ends(
    make: Any, kwargs: dict[str, Any], answer: str
) -> None:
    dpo = make("dpo", kwargs)
    (chosen,) = dpo.pairs.columns["chosen_ids"]
    assert decoded(dpo, chosen).strip() == f"{answer}<|im_end|>"
    sft = make("sft", kwargs)
    (ids,), (labels,) = sft.pairs.columns["input_ids"], sft.pairs.columns["labels"]
    trained = [token for token, label in zip(ids, labels, strict=True) if label == token]
    assert decoded(sft, trained).strip() == f"{answer}<|im_end|>"


def test_an_episodes_turns_begin_so_too(qwen3: Path) -> None:
    tokens = chat_tokens(ModelSpec(name=str(qwen3), chat_template_kwargs=OFF))
    begin = tokens.prompt([{"role": "user", "content": "2+3"}], ())
    between = tokens.between([{"role": "tool", "name": "add", "content": "5"}])
    decode = load_tokenizer(ModelSpec(name=str(qwen3))).decode
    assert [str(decode(ids)).endswith(EMPTY) for ids in (begin, between)] == [True, True]


@pytest.mark.parametrize(
    ("algorithm", "kwargs", "overrides", "why"),
    [
        ("grpo", {"enable_thinkin": False}, [], "'enable_thinkin' would do nothing"),
        ("dpo", {"tools": []}, [], "'tools' is no variable"),
        ("sft", OFF, ["data.apply_chat_template=false"], "no chat template is applied"),
        ("reward_model", OFF, [], "by the template's own defaults"),
    ],
)
def test_those_that_would_do_nothing_are_refused(
    make: Any, algorithm: str, kwargs: dict[str, Any], overrides: list[str], why: str
) -> None:
    with pytest.raises(UserError, match=r"^model\.chat_template_kwargs.*" + why):
        make(algorithm, kwargs, *overrides).check()


def test_a_tokenizer_with_them_is_copied_and_saved_as_any_other(
    qwen3: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(ModelSpec(name=str(qwen3), chat_template_kwargs=OFF))
    asked = [{"role": "user", "content": "2+3"}]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    for each in (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert each.apply_chat_template(asked, **options).endswith(EMPTY)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert not saved.apply_chat_template(asked, **options).endswith(EMPTY)
    assert saved.chat_template == tokenizer.chat_template


def test_a_talk_with_the_model_of_a_run_has_its_variables(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    begin = "{% if add_generation_prompt %}<|assistant|>"
    assert begin in template
    longer = template.replace(begin, f"{begin}{{{{ first }}}}")
    (folder / "chat_template.jinja").write_text(longer)
    (tmp_path / "config.yaml").write_text("model: {chat_template_kwargs: {first: '12'}}\n")
    assert asked_by_run(folder) == Asking(), "no run: others write such a file too"
    (tmp_path / "events.jsonl").touch()
    told = Asking(variables={"first": "12"})
    assert asked_by_run(folder) == asked_by_run(tmp_path) == told
    (folder / "config.yaml").write_text("model: some-name\n")
    assert asked_by_run(folder) == told
    talks = [Conversation(folder, each.told("1"), 0.0, 1) for each in (Asking(), told)]
    without, having = (talk._inputs("")["input_ids"].shape[1] for talk in talks)
    assert having == without + len("12")


def test_a_card_shows_the_call_with_them() -> None:
    code = _usage(False, OFF).split("```python\n")[1].partition("```")[0]
    (call,) = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("apply_chat_template")
    ]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert given["enable_thinking"] == "False"


def test_a_card_shows_how_the_run_asked() -> None:
    told = _usage(False, {}, system='Say "yes".\nNo more.')
    assert (
        'question = [{"role": "system", "content": \'Say "yes".\\nNo more.\'}, {"role": "us' in told
    )
    plain = _usage(False, {}, template=False)
    assert 'inputs = tokenizer("...", return_tensors="pt")' in plain
    assert "apply_chat_template" not in plain
    for text in (told, plain):
        ast.parse(text.split("```python\n")[1].partition("```")[0])
