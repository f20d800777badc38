"""The order of prompts is a function of seed and position; every row is checked beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.environments.tool_episodes import EVERY_ROW, row_of
from actors.messages import Conversations
from actors.scoring.model import ModelScorer, RewardModelCriterion, scored_text
from actors.specs import ModelSpec
from aligntune.data import prompt_rows as prompt_rows_module
from aligntune.data import prompts as prompts_module
from aligntune.data.dropped import RowRules
from aligntune.data.errors import DataError
from aligntune.data.mixture import held_out_data, training_data
from aligntune.data.prompt_rows import PromptRows
from aligntune.data.prompts import (
    PromptSource,
    as_prompts,
    evaluation_prompts,
    training_prompts,
)
from aligntune.data.sources import load_rows
from aligntune.data.spec import DataSpec
from tests.aligntune.data.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()
LIMIT = "rollout.max_prompt_length"
RULES = ("bad_rows", "long_rows", "max_dropped_fraction")
READING = ("system_prompt", "apply_chat_template", "fold_duplicates")


class Table:
    """Rows held in memory."""

    origin = "table"

    def __init__(self, values: list[Any]) -> None:
        self.values = values
        self.columns: tuple[str, ...] = ("prompt", "answer")
        self.reads = 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return {"prompt": self.values[index], "answer": index}

    def where(self, index: int) -> str:
        return f"table, row {index}"


def source(values: list[Any] | int, tokenizer: Any = TOKENIZER, **options: Any) -> PromptSource:
    if isinstance(values, int):
        values = [f"p{n}" for n in range(values)]
    return made(Table(values), tokenizer, **options)


def made(rows: Any, tokenizer: Any = TOKENIZER, **options: Any) -> PromptSource:
    """The prompts of `rows`, where nothing may be dropped unless an option says so."""
    given = {"bad_rows": "error", "long_rows": "error", "max_dropped_fraction": 1.0} | options
    rules = RowRules(**{key: given.pop(key) for key in RULES}, length_key=LIMIT)
    reading = {key: given.pop(key) for key in READING if key in given}
    budget = {"max_prompt_length": 32, "seed": 0} | given
    return PromptSource(PromptRows(rows, tokenizer, **reading), tokenizer, rules, **budget)


def order(of: PromptSource, start: int, stop: int) -> list[int]:
    return [of.prompt_at(position).row for position in range(start, stop)]


sizes = st.integers(1, 40)
seeds = st.integers(0, 2**63)


@pytest.mark.slow
@given(rows=sizes, seed=seeds, epoch=st.integers(0, 10**6))
def test_each_epoch_is_a_permutation(rows: int, seed: int, epoch: int) -> None:
    prompts = source(rows, seed=seed)
    assert sorted(order(prompts, epoch * rows, (epoch + 1) * rows)) == list(range(rows))


@pytest.mark.slow
@given(rows=sizes, seed=seeds, cut=st.integers(0, 100), length=st.integers(1, 60))
def test_resuming_anywhere_gives_the_same_sequence(
    rows: int, seed: int, cut: int, length: int
) -> None:
    whole = order(source(rows, seed=seed), 0, cut + length)
    assert order(source(rows, seed=seed), cut, cut + length) == whole[cut:]


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    forwards, backwards = source(7), source(7)
    expected = order(forwards, 0, 50)
    assert [backwards.prompt_at(n).row for n in reversed(range(50))][::-1] == expected


@pytest.mark.slow
@given(seed=seeds)
def test_seeds_and_epochs_differ(seed: int) -> None:
    prompts = source(30, seed=seed)
    first = order(prompts, 0, 30)
    assert first != order(prompts, 30, 60)
    assert first != order(source(30, seed=seed + 1), 0, 30)


def test_the_order_is_the_documented_one_for_ever() -> None:
    seeds = np.random.SeedSequence([5, 1])
    expected = np.random.Generator(np.random.PCG64(seeds)).permutation(9).tolist()
    assert order(source(9, seed=5), 9, 18) == expected
    assert expected == [5, 6, 2, 4, 0, 8, 7, 3, 1]


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    assert order(source(3, shuffle=False), 0, 7) == [0, 1, 2, 0, 1, 2, 0]


def test_epochs_and_positions() -> None:
    prompts = source(4)
    assert (prompts.positions_in(2), prompts.positions_in(0.3)) == (8, 2)
    assert [prompt.row for prompt in prompts.epoch(1)] == order(prompts, 4, 8)
    with pytest.raises(ValueError, match="from 0"):
        prompts.prompt_at(-1)


def test_a_prompt_carries_its_source_text_tokens_and_columns(chat: Any) -> None:
    messages = [{"role": "user", "content": "é"}]
    (prompt,) = source([messages], chat, system_prompt="S", max_prompt_length=64).epoch()
    assert prompt.source is messages
    assert prompt.text == "<system>S</system><user>é</user><assistant>"
    assert prompt.token_ids.dtype == np.int32
    assert chat.decode(prompt.token_ids) == prompt.text
    assert prompt.columns == {"answer": 0}


def test_special_tokens_are_added_only_where_no_template_writes_them(plain_bos: Any) -> None:
    (prompt,) = source(["abc"], plain_bos).epoch()
    assert (prompt.token_ids[0], len(prompt.token_ids)) == (plain_bos.bos_token_id, 4)
    templated = byte_tokenizer(template="{{ messages[0].content }}", bos=True)
    (prompt,) = source(["abc"], templated).epoch()
    assert len(prompt.token_ids) == 3
    for text in ("<bos>abc", "<bos><bos>abc"):  # it is in the model's format already
        (prompt,) = source([text], plain_bos).epoch()
        assert plain_bos.decode(prompt.token_ids) == text
    (prompt,) = source(["<bos><bos>abc"], byte_tokenizer()).epoch()
    assert prompt.token_ids[:2].tolist() == [plain_bos.bos_token_id] * 2, "nothing was added"


def test_the_fingerprint_knows_prompts_that_earlier_versions_began_twice(plain_bos: Any) -> None:
    def mark(text: str, tokenizer: Any) -> str:
        return source([text], tokenizer, max_prompt_length=9).fingerprint

    assert mark("<bos>abc", plain_bos) != mark("<bos>abc", byte_tokenizer())
    assert mark("abc", plain_bos) == mark("abc", byte_tokenizer()), "no other run changes"


def test_user_code_gets_messages_as_the_data_have_them_and_templates_without_nulls() -> None:
    """Columnar files have `tool_calls: null` where no tool is called, which templates take for
    calls."""
    picky = byte_tokenizer(
        template="{% for m in messages %}{% if 'tool_calls' in m %}"
        "{% set f = m.tool_calls[0].function %}{{ f.name }}{{ f.arguments.x }}{% endif %}"
        "{% if 'content' in m %}{{ m.content }}{% endif %}{% endfor %}"
    )
    call = {"id": None, "function": {"name": "f", "arguments": '{"x": 3}'}}
    messages = [
        {"role": "user", "content": "1+1", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_calls": None},
    ]
    before = json.dumps(messages)
    (prompt,) = source([messages], picky).epoch()
    assert prompt.text == "1+1f34"
    assert row_of(prompt, EVERY_ROW)["prompt"] is prompt.source is messages
    scorer = ModelScorer(RewardModelCriterion("rm", ModelSpec(name="m"), 1, 1.0))
    scorer._tokenizer = picky
    said = {"role": "assistant", "content": "2"}
    episode = Conversations(messages=([*messages, said],), asked=(3,), last_rows=(0,))
    for conversations in (None, episode):
        (pair,) = scorer._pairs(prompt, ["2"], conversations)
        assert scored_text(picky, *pair, True) == ("1+1f342", False)
    assert json.dumps(messages) == before


LONG = ["short", "x" * 33, "x" * 32, "y" * 40 + "é end"]


def test_long_prompts_are_an_error_that_counts_them_and_names_the_first() -> None:
    with pytest.raises(DataError) as caught:
        source(LONG)
    message = str(caught.value)
    assert "table, row 1: the prompt has 33 tokens" in message
    assert "rollout.max_prompt_length is 32" in message
    assert "rows 3 too (2 of 4)" in message
    assert "data.long_rows: drop" in message


def test_long_prompts_are_dropped_and_counted() -> None:
    prompts = source(LONG, long_rows="drop")
    assert sorted(order(prompts, 0, 2)) == [0, 2]
    assert (len(prompts), prompts.dropped.rows, prompts.longest) == (2, 4, 46)
    assert prompts.dropped.reasons == {"too long": 2}


def test_dropping_all_is_an_error() -> None:
    with pytest.raises(DataError, match="none is left"):
        source(["x" * 33], long_rows="drop")


def test_truncation_keeps_the_end_of_the_source_as_it_was() -> None:
    prompts = source(LONG, long_rows="keep_end", shuffle=False)
    cut = prompts.prompt_at(3)
    assert len(cut.token_ids) == 32
    assert cut.text == "y" * 26 + "é end"
    assert cut.source == LONG[3]
    assert prompts.prompt_at(2).text == LONG[2]
    assert (len(prompts), prompts.dropped.cut) == (4, 2)


def test_truncation_keeps_a_leading_beginning_of_sequence_token(plain_bos: Any) -> None:
    (prompt,) = source(["0123456789"], plain_bos, long_rows="keep_end", max_prompt_length=4).epoch()
    assert prompt.text == "<bos>789"
    assert prompt.token_ids[0] == plain_bos.bos_token_id


@pytest.mark.parametrize("bad", [None, "", 4, [{"role": "user"}], "\ud800"])
@pytest.mark.parametrize("row", [0, prompt_rows_module.BATCH + 3])
def test_the_row_without_a_usable_prompt_is_named(bad: Any, row: int) -> None:
    values: list[Any] = ["ok"] * (row + 2)
    values[row] = bad
    with pytest.raises(DataError, match=rf"^table, row {row}: "):
        source(values)


def test_a_prompt_the_tokenizer_has_no_tokens_for_is_named(chat: Any) -> None:
    blank = byte_tokenizer(template="{{ '' }}")
    with pytest.raises(DataError, match="table, row 0: the prompt has no tokens"):
        source(["x"], blank)


def test_a_system_prompt_without_a_template_is_no_rows_fault(plain: Any) -> None:
    with pytest.raises(DataError, match=r"^data\.system_prompt"):
        source(["x"], plain, system_prompt="S")


def test_tokenised_prompts_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "CACHED", 2)
    table = Table(["a", "b", "c"])
    prompts = made(table, max_prompt_length=9, shuffle=False)
    table.reads = 0
    for position in (0, 1, 0, 1):
        prompts.prompt_at(position)
    assert table.reads == 2
    for position in (2, 0):
        prompts.prompt_at(position)
    assert table.reads == 4


@settings(max_examples=20)
@given(values=st.lists(st.text("ab", min_size=1), min_size=1), seed=st.integers(0, 5))
def test_the_fingerprint_tells_runs_over_other_prompts_apart(values: list[str], seed: int) -> None:
    options: dict[str, Any] = {"max_prompt_length": 10**6, "seed": seed}
    mark = source(values, **options).fingerprint
    assert mark == source(list(values), **options).fingerprint
    assert mark != source([*values, "a"], **options).fingerprint
    assert mark != source(["b" + values[0], *values[1:]], **options).fingerprint
    assert mark != source(values, **(options | {"seed": seed + 1})).fingerprint


def test_the_fingerprint_knows_the_columns_that_rewards_read(tmp_path: Path) -> None:
    def mark(answer: object) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": "a", "answer": answer}) + "\n")
        rows = load_rows(str(path))
        return made(rows, max_prompt_length=9).fingerprint

    assert mark("1") == mark("1")
    assert len({mark("1"), mark("2"), mark(1), mark(None)}) == 4


def write(path: Path, prompts: list[str]) -> str:
    path.write_text("".join(json.dumps({"q": prompt, "a": 1}) + "\n" for prompt in prompts))
    return str(path)


def test_training_and_evaluation_prompts_of_a_config(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [str(n) for n in range(20)])
    spec = DataSpec(
        path=path,
        prompt_column="q",
        split="train[:80%]",
        eval_split="train[80%:]",
        max_samples=10,
        eval_samples=3,
    )
    train = training_prompts(
        spec,
        as_prompts(spec, training_data(spec), TOKENIZER),
        TOKENIZER,
        max_prompt_length=4,
        seed=1,
    )
    assert sorted(prompt.text for prompt in train.epoch()) == [str(n) for n in range(10)]

    def held_out(spec: DataSpec) -> list[str] | None:
        data = held_out_data(spec)
        if data is None:
            return None
        rows = as_prompts(spec, data, TOKENIZER)
        prompts = evaluation_prompts(spec, rows, TOKENIZER, max_prompt_length=4)
        return [prompt.text for prompt in prompts.epoch()]

    assert held_out(spec) == ["16", "17", "18"]
    other = DataSpec(path=path, prompt_column="q", eval_path=write(tmp_path / "e.jsonl", ["x"]))
    assert held_out(other) == ["x"]
    assert held_out(DataSpec(path=path, prompt_column="q")) is None


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"eval_samples": 3}, "eval_path, or split and eval_split"),
        ({"system_prompt": "x", "apply_chat_template": False}, "apply_chat_template"),
        ({"promt_column": "x"}, "promt_column"),
        ({"max_samples": 0}, "max_samples"),
        ({"long_rows": "cut"}, "long_rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        DataSpec.model_validate({"path": "x"} | options)
