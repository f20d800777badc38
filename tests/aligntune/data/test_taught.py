"""What a model is taught: every form of a row as tokens, what is trained of it, what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune import cli, create_rl_trainer
from aligntune.data.dropped import RowRules
from aligntune.data.errors import DataError
from aligntune.data.mixture import Sources
from aligntune.data.row_tokens import RowTokens
from aligntune.data.shown import taught_parts
from aligntune.data.taught_forms import Columns
from aligntune.data.taught_tokens import MASKED, packed, tokenise_taught
from aligntune.errors import UserError
from tests.aligntune.data.conftest import TEMPLATE, byte_tokenizer
from tests.aligntune.data.test_messages import DEVELOPER, GPT_OSS, QWEN, SYSTEM, TOOLS, called
from tests.aligntune.data.test_messages import spelled as spelled_call
from tests.aligntune.data.test_pair_messages import DROPS_THINKING
from tests.aligntune.data.test_preference import Table

MARKED = byte_tokenizer(
    template="{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</>{% endgeneration %}{% else %}{{ m.content }}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WANTS_A_USER = byte_tokenizer(
    template="{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('no user query') }}{% endif %}" + MARKED.chat_template
)
UNMARKED, PLAIN = byte_tokenizer(template=TEMPLATE), byte_tokenizer(bos=True, eos=True)
ASK, SAY = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}


def taught(
    tokenizer: Any,
    *rows: dict[str, Any],
    most: int = 999,
    long_rows: Any = "drop",
    loss_on: Any = None,
    columns: Columns | None = None,
    **more: Any,
) -> RowTokens:
    rules = RowRules("drop", long_rows, 0.9, "data.max_length")
    columns, more = columns or Columns(), {"apply_chat_template": True, **more}
    read = tokenise_taught(Table(*rows), tokenizer, columns=columns, loss_on=loss_on, **more)
    return read.within(most, rules)


def spelled(tokenizer: Any, *rows: dict[str, Any], **more: Any) -> list[str]:
    """Rows as text, what is trained in [brackets]."""
    made = taught(tokenizer, *rows, **more)
    found = []
    for ids, labels in zip(made.columns["input_ids"], made.columns["labels"], strict=True):
        assert all(label in (MASKED, token) for token, label in zip(ids, labels, strict=True))
        parts = taught_parts(ids, labels)
        texts = [(part.fate, tokenizer.decode(part.ids)) for part in parts]
        found.append("".join(f"[{t}]" if fate == "trained" else t for fate, t in texts))
    return found


def test_every_form_trains_its_answers_and_their_ends() -> None:
    turns = [
        ASK,
        SAY,
        {"role": "user", "content": "and 2+2"},
        {"role": "assistant", "content": "4"},
    ]
    whole = "<user>1+1</><assistant>[2</>]<user>and 2+2</><assistant>[4</>]"
    assert spelled(MARKED, {"messages": turns}) == [whole]
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in turns
    ]
    assert spelled(MARKED, {"conversations": sharegpt}) == [whole]
    one = "<user>1+1</><assistant>[2</>]"
    assert spelled(MARKED, {"prompt": "1+1", "completion": "2"}) == [one]
    assert spelled(MARKED, {"prompt": [ASK], "completion": [SAY]}) == [one]
    assert spelled(MARKED, {"prompt": [ASK], "completion": turns[1:]}) == [whole]
    assert spelled(MARKED, {"prompt": turns[:3], "completion": turns[3]}) == [
        whole.replace("[2</>]", "2</>")
    ]
    assert spelled(MARKED, {"text": "plain"}) == ["p[lain<eos>]"]
    assert spelled(MARKED, {"messages": turns}, loss_on="all") == [
        f"<[{whole[1:].replace('[', '').replace(']', '')}]"
    ]
    for tokenizer in (MARKED, WANTS_A_USER):
        asked = {"messages": [ASK, SAY]}
        assert spelled(tokenizer, asked, system_prompt="s") == [f"<system>s</>{one}"]


def test_without_a_template_text_is_as_it_stands_and_ends_once() -> None:
    assert spelled(PLAIN, {"prompt": "1+1=", "completion": "2"}) == ["<bos>1+1=[2<eos>]"]
    assert spelled(PLAIN, {"prompt": "1+1=", "completion": "2<eos>"}) == ["<bos>1+1=[2<eos>]"]
    for text in ("so", "<bos>so"):
        assert spelled(PLAIN, {"text": text}) == ["<bos>[so<eos>]"]
        asked = {"prompt": text, "completion": "2"}
        assert spelled(PLAIN, asked) == ["<bos>so[2<eos>]"]
    asked = {"prompt": "a", "completion": "b"}
    assert spelled(MARKED, asked, apply_chat_template=False) == ["a[b<eos>]"]


def test_an_answer_whose_thinking_the_template_drops_is_taught_as_messages() -> None:
    """TRL's training template of the model keeps it."""
    from trl.chat_template_utils import deepseek_r1_distill_chat_template

    like_r1 = byte_tokenizer(template=deepseek_r1_distill_chat_template, bos=True)
    thinks = {"role": "assistant", "content": "<think>one</think>2"}
    good = {"prompt": [ASK], "completion": [SAY]}
    made = taught(like_r1, good, {"prompt": [ASK], "completion": [thinks]})
    (why,) = made.dropped.examples["not whole"]
    assert "leaves thinking out of an answer; give the same rows as messages" in why
    (text,) = spelled(like_r1, {"messages": [ASK, thinks]})
    assert "<think>one</think>2" in text.replace("[", "").replace("]", "")
    made = taught(DROPS_THINKING, good, {"prompt": [ASK], "completion": [thinks]})
    (why,) = made.dropped.examples["not whole"]
    assert "use a model whose template keeps it, or give text" in why, "nothing marks its answers"


@pytest.mark.parametrize("template", QWEN)
def test_a_developers_message_is_taught_as_the_systems(template: str) -> None:
    tokenizer, said = byte_tokenizer(template=template), "As developer."
    rows = ([{"role": role, "content": said}, ASK, SAY] for role in ("developer", "system"))
    one, other = (spelled(tokenizer, {"messages": messages}) for messages in rows)
    assert said in one[0]
    assert one == other
    row = {"prompt": [DEVELOPER, ASK], "completion": [SAY]}
    assert said in spelled(tokenizer, row)[0]


def test_a_row_with_an_instruction_that_the_template_leaves_out_is_not_whole() -> None:
    good, bad = ({"messages": [*said, ASK, SAY]} for said in ([DEVELOPER], [SYSTEM, DEVELOPER]))
    made = taught(GPT_OSS, good, bad, loss_on="all")
    assert made.dropped.reasons == {"not whole": 1}


def test_calls_are_taught_alike_with_arguments_as_text() -> None:
    call = called("weather", city="Oslo")
    rows = [{"prompt": [ASK], "completion": [message]} for message in (call, spelled_call(call))]
    one, other = spelled(TOOLS, *rows)
    assert one == other
    assert '[<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call></assistant>]' in one


def test_calls_are_taught_as_the_training_template_writes_them() -> None:
    """TRL's of DeepSeek-V3 takes data, and its own text alone."""
    from trl.chat_template_utils import deepseekv3_chat_template

    like_v3 = byte_tokenizer(template=deepseekv3_chat_template)
    call = {**called("weather", city="Oslo"), "content": ""}
    for message in (call, spelled_call(call)):
        (text,) = spelled(like_v3, {"messages": [ASK, message]})
        assert ('{"city": "Oslo"}' in text, '\\"' in text) == (True, False)


@pytest.mark.slow
def test_a_template_without_marks_teaches_what_follows_a_prompt_and_nothing_else() -> None:
    assert spelled(UNMARKED, {"prompt": "1+1", "completion": "2"}) == [
        "<user>1+1</user><assistant>[2</assistant>]"
    ]
    with pytest.raises(DataError, match="does not mark what the assistant writes") as refused:
        taught(UNMARKED, {"messages": [ASK, SAY]})
    assert "\n" not in str(refused.value)
    assert spelled(UNMARKED, {"messages": [ASK, SAY]}, loss_on="all") == [
        "<[user>1+1</user><assistant>2</assistant>]"
    ]


def test_a_template_that_trl_knows_gets_its_marks() -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    qwen = byte_tokenizer(template=qwen2_5_chat_template)
    assert "generation %}" not in qwen2_5_chat_template
    (text,) = spelled(qwen, {"messages": [ASK, SAY]})
    assert text.endswith("<|im_start|>assistant[\n2<|im_end|>\n]")  # the marks are TRL's


def test_rows_that_teach_nothing_are_dropped_and_counted_by_reason() -> None:
    good = {"messages": [ASK, SAY]}
    made = taught(
        MARKED,
        good,
        good,
        {"messages": [ASK]},
        {"messages": []},
        {"messages": "1+1"},
        {"messages": [{"role": "narrator", "content": "x"}, SAY]},
        {"messages": [ASK, {"role": "assistant", "content": "long" * 99}]},
        most=99,
    )
    assert made.rows == [0, 1]
    assert made.dropped.reasons == {"empty": 2, "unreadable": 2, "too long": 1}
    completion = taught(
        MARKED, {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}
    )
    assert completion.dropped.reasons == {"empty": 1}
    assert "row 1: the completion is empty" in completion.dropped.examples["empty"][0]


@pytest.mark.parametrize(
    ("columns", "row", "options", "why"),
    [
        ({}, {"question": "a"}, {}, "has no column 'messages' or 'conversations'"),
        ({"completion": "answr"}, {"prompt": "a", "answer": "b"}, {}, "did you mean 'answer'"),
        ({"messages": "chat"}, {"messages": [ASK, SAY]}, {}, "no column 'chat'"),
        (
            {"prompt": "q", "text": "t"},
            {"q": "a", "completion": "b", "t": "c"},
            {},
            "data.prompt_column and data.text_column name columns of several forms",
        ),
        (
            {},
            {"text": "a"},
            {"system_prompt": "s"},
            "data.system_prompt has no place in column 'text'",
        ),
        ({}, {"text": "a"}, {"loss_on": "answers"}, "does not say which they are"),
        ({}, {"messages": [ASK, SAY]}, {"apply_chat_template": False}, "no chat template is in"),
    ],
)
def test_what_fits_no_form_is_refused_by_name(
    columns: dict[str, str], row: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        taught(MARKED, row, columns=Columns(**columns), **options)


def test_columns_that_are_named_are_taken_before_those_that_are_there() -> None:
    row = {"messages": [ASK, SAY], "conversations": [ASK, SAY], "text": "t", "note": "n"}
    row |= {"prompt": "1+1", "completion": "3", "answer": "4"}
    for columns, wanted in {
        Columns(): "<user>1+1</><assistant>[2</>]",
        Columns(completion="answer"): "<user>1+1</><assistant>[4</>]",
        Columns(text="note"): "n[<eos>]",
    }.items():
        assert spelled(MARKED, row, columns=columns) == [wanted]


def test_a_prompt_that_the_completion_repeats_is_taught_once() -> None:
    one = "<user>1+1</><assistant>[2</>]"
    both = [ASK, SAY]
    for prompt in ("1+1", [ASK]):
        assert spelled(MARKED, {"prompt": prompt, "completion": both}) == [one]
    asked = [{"role": "system", "content": "s"}, ASK]
    for prompt in ("1+1", asked):
        repeated = {"prompt": prompt, "completion": [*asked, SAY]}
        assert spelled(MARKED, repeated) == [f"<system>s</>{one}"]
    for prompt, why in (("2+2", "none of its questions"), ([SAY, ASK], "ends with a question")):
        rows = {"prompt": prompt, "completion": both}, *[{"prompt": "1+1", "completion": both}] * 2
        assert why in taught(MARKED, *rows).dropped.examples["unreadable"][0]
    nothing = {"prompt": [ASK], "completion": [ASK]}, {"prompt": "1+1", "completion": [ASK]}
    made = taught(MARKED, *nothing, {"prompt": "a", "completion": "b"})
    assert made.dropped.reasons == {"empty": 2}


def test_strings_that_repeat_the_prompt_have_it_once_where_most_rows_of_a_source_do() -> None:
    joined = [{"prompt": f"Q{n}:", "completion": f"Q{n}: a"} for n in range(2)]
    assert spelled(PLAIN, *joined) == [f"<bos>Q{n}:[ a<eos>]" for n in range(2)]
    assert spelled(MARKED, *joined)[0] == "<user>Q0:</><assistant>[ a</>]"
    other = {"prompt": "p", "completion": "b"}
    made = taught(PLAIN, *joined, other, {"prompt": "Q:", "completion": "Q: "})
    assert made.dropped.reasons == {"unreadable": 1, "empty": 1}
    assert "most rows repeat the prompt" in made.dropped.examples["unreadable"][0]
    assert made.dropped.repeating == 2
    greeting = {"prompt": "Hello", "completion": "Hello! What is it?"}
    assert spelled(PLAIN, greeting, other)[0] == "<bos>Hello[Hello! What is it?<eos>]"
    assert taught(PLAIN, greeting, other).dropped.lines() == []
    as_messages = {**greeting, "completion": [{"role": "assistant", "content": "Hello!"}]}
    assert spelled(MARKED, as_messages) == ["<user>Hello</><assistant>[Hello!</>]"]
    sources = Sources([Table(*joined), Table(other, other, other)], [None, None])
    read = tokenise_taught(
        sources, PLAIN, columns=Columns(), loss_on=None, apply_chat_template=True
    )
    texts = [PLAIN.decode(read.taught[row]["input_ids"]) for row in range(5)]
    assert texts == [*(f"<bos>Q{n}: a<eos>" for n in range(2)), *["<bos>pb<eos>"] * 3]


def test_answers_that_are_mostly_their_questions_are_taught_whole() -> None:
    same = [{"prompt": f"Q{n}", "completion": f"Q{n}"} for n in range(6)]
    mended = [{"prompt": f"q{n}", "completion": f"Q{n}."} for n in range(4)]
    wanted = [f"<bos>Q{n}[Q{n}<eos>]" for n in range(6)]
    assert spelled(PLAIN, *same, *mended) == wanted + [f"<bos>q{n}[Q{n}.<eos>]" for n in range(4)]


def test_long_rows_are_cut_where_an_answer_is_left() -> None:
    row, asks = {"prompt": "p", "completion": "xyz"}, {"prompt": "p" * 30, "completion": "xyz"}
    start = spelled(MARKED, row, asks, most=24, long_rows="keep_start")
    assert start == ["<user>p</><assistant>[xyz]"]
    end = spelled(MARKED, row, asks, most=6, long_rows="keep_end")
    assert end == ["[xyz</>]"[1:].replace("x", "x[", 1)] * 2


@pytest.mark.slow
@given(st.lists(st.integers(2, 12), min_size=1, max_size=30))
def test_packing_loses_no_token_and_cuts_no_row(sizes: list[int]) -> None:
    rows = [{"text": "a" * size} for size in sizes]
    made = taught(PLAIN, *rows, most=16)
    table = packed(made, 16)
    found = []
    for ids, labels, lengths in zip(*(table.columns[n].to_pylist() for n in table.columns)):  # type: ignore[attr-defined]  # noqa: B905
        assert len(ids) <= 16
        at = 0
        for length in lengths:
            found.append((ids[at : at + length], labels[at : at + length]))
            at += length
        assert at == len(ids)
    wanted = zip(made.columns["input_ids"], made.columns["labels"], strict=True)
    assert sorted(found) == sorted((ids.tolist(), labels.tolist()) for ids, labels in wanted)


@pytest.mark.slow
def test_the_command_shows_what_the_trainer_gets(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "chats.jsonl"
    chats = [[ASK, SAY, {"role": "user", "content": f"{n}+1"}, SAY] for n in range(20)]
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    given_: dict[str, Any] = {
        "algorithm": "sft",
        "model_name": str(tiny_model),
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "run"),
    }
    trainer = create_rl_trainer(**given_, overrides=["algorithm.packing=true"])
    table = trainer.inputs.table.columns  # type: ignore[union-attr]
    trained = sum(label != MASKED for row in table["labels"].to_pylist() for label in row)
    assert trained == 20 * 4  # a digit and the end, twice a row
    config = {
        "algorithm": {"name": "sft", "packing": True},
        "model": {"name": str(tiny_model)},
        "data": {"path": str(data)},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", str(tmp_path / "config.yaml"), "-n", "1"])
    out = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert out[1] == f"Used: 20 rows, packed into {len(table['input_ids'])} sequences"
    assert out[2].startswith("Trained: 80 of ")
    at = out.index("  given (masked, not trained), 5 tokens:")
    assert out[at + 1].strip() == "«<|user|>»·1·+·1·«<|assistant|>»·"
    assert out[at + 2 : at + 4] == ["  taught (trained), 2 tokens:", "    2·«<|end|>»·"]
    assert "packed into" in trainer.summary()


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["data.chosen_column=a"], "sft ignores it"),
        (["rewards=[math]"], "sft takes no rewards"),
        (["algorithm.packing=true", "backend=unsloth"], "does not go with backend=unsloth"),
        (["algorithm.beta=1"], "unknown key 'algorithm.beta'"),
        (["algorithm=dpo", "data.text_column=a"], "dpo ignores it"),
    ],
)
def test_settings_that_sft_would_ignore_are_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        create_rl_trainer(algorithm="sft", model_name="m", dataset_name="d", overrides=overrides)
