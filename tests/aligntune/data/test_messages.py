"""Messages and tools of a row reach the chat template, the same from every kind of file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl import chat_template_utils

from actors.models.templates import with_arguments
from actors.scoring.model import rendered
from aligntune.data import scored_pairs
from aligntune.data.errors import DataError
from aligntune.data.formats import render
from aligntune.data.messages import check_messages, check_tools, check_unseen, what_is_lost
from aligntune.data.mixture import held_out_data, training_data
from aligntune.data.pairs import PairRows
from aligntune.data.prompt_rows import PromptRows
from aligntune.data.prompts import (
    as_prompts,
    evaluation_prompts,
    training_prompts,
)
from aligntune.data.spec import DataSpec
from aligntune.data.taught_forms import Columns
from aligntune.data.taught_tokens import tokenise_taught
from tests.aligntune.data.conftest import byte_tokenizer
from tests.aligntune.data.test_preference import Table

TOOLS_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = byte_tokenizer(template=TOOLS_TEMPLATE)
AS_TEXT = TOOLS_TEMPLATE.replace(
    "{{ call.function | tojson }}", "{{ call.function.name + ' ' + call.function.arguments }}"
)
FIELD = (
    "{% for m in messages %}{% for call in m.tool_calls or [] %}"
    "{% set it = call.function.arguments %}{{ it }}{% endfor %}{% endfor %}"
)
QWEN3 = chat_template_utils.qwen3_chat_template
QWEN = (QWEN3, chat_template_utils.qwen2_5_chat_template)
GPT_OSS = byte_tokenizer(template=chat_template_utils.gptoss_chat_template)
GEMMA = byte_tokenizer(template=chat_template_utils.gemma_chat_template)
USER = {"role": "user", "content": "How warm is it?"}
SYSTEM, DEVELOPER = ({"role": role, "content": f"As {role}."} for role in ("system", "developer"))


def tool(name: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def called(name: str, **given: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": given}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def answered(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def spelled(message: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its calls as JSON text, as OpenAI has them."""
    calls = [
        {
            **call,
            "function": {**(own := call["function"]), "arguments": json.dumps(own["arguments"])},
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


ROWS = [
    {
        "prompt": [USER, called("weather", city="Oslo"), answered("3"), USER],
        "tools": [tool("weather", "city")],
    },
    {"prompt": [USER, called("clock", zone="UTC"), answered("9"), USER], "tools": []},
    {"prompt": [USER, called("clock", zone="UTC"), answered("9"), USER], "tools": None},
    {"prompt": [USER], "tools": [tool("weather", "city"), tool("clock", "zone")]},
]


def texts(path: Path, tokenizer: Any = TOOLS, **options: Any) -> list[str]:
    spec = DataSpec(path=str(path), shuffle=False)
    rows = as_prompts(spec, training_data(spec), tokenizer, **options)
    source = training_prompts(spec, rows, tokenizer, max_prompt_length=1000, seed=0)
    return [source.prompt_at(row).text for row in range(len(source))]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tools_and_calls_reach_the_template_alike_from_json_lines_and_parquet(
    tmp_path: Path,
) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    found = texts(tmp_path / "d.parquet")
    assert found == texts(lines(tmp_path / "d.jsonl", ROWS))
    assert "null" not in "".join(found)
    assert json.dumps(tool("weather", "city")) in found[0]
    assert '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>' in found[0]
    assert not found[1].startswith("<tools>")


def written(arguments: Any, template: str, **options: Any) -> str:
    """What a template makes of a call of tool f."""
    function = {"name": "f", "arguments": arguments}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    said = check_messages([USER, call], "the conversation")
    return rendered(byte_tokenizer(template=template), said, **options)


def test_arguments_that_are_json_text_are_the_object_in_it(tmp_path: Path) -> None:
    call = called("weather", city="Oslo", days=3)
    as_text = spelled(call)
    bare = {**call, "tool_calls": [as_text["tool_calls"][0]["function"]]}
    assert check_messages([as_text], "the prompt")[0]["tool_calls"] == as_text["tool_calls"]
    before = json.dumps(as_text)
    asked = {"prompt": [USER, call, answered("3"), USER]}
    written_as_text = {"prompt": [USER, as_text, answered("3"), USER]}
    assert texts(lines(tmp_path / "d.jsonl", [written_as_text])) == texts(
        lines(tmp_path / "e.jsonl", [asked])
    )
    (taken,) = with_arguments(TOOLS, [bare])
    assert taken["tool_calls"] == [call["tool_calls"][0]["function"]]
    assert json.dumps(as_text) == before, "the row stays as it is"
    for nothing in ("", " ", "null", "{}"):
        assert '"arguments": {}' in written(nothing, TOOLS_TEMPLATE)


@pytest.mark.parametrize("text", ["{", "3", "[]", "[" * 5000, "city=Oslo"])
def test_arguments_that_are_text_and_no_object_are_refused_with_their_row(
    text: str, tmp_path: Path
) -> None:
    call = called("weather")
    call["tool_calls"][0]["function"]["arguments"] = text
    with pytest.raises(DataError, match=r"row 0.*: 'weather' is called with arguments that"):
        texts(lines(tmp_path / "d.jsonl", [{"prompt": [USER, call, USER]}]))


@pytest.mark.parametrize("text", ['{"a":1.10}', '{"a": 1e400, "a": 2}', "no JSON", '{"a":"\\n"}'])
def test_a_template_that_writes_text_as_it_stands_writes_it_so(text: str) -> None:
    for template in (QWEN3, AS_TEXT, FIELD):
        assert text in written(text, template)
    (found,) = re.findall(r"<tool_call>(.*)</tool_call>", written({"a": 1.1}, QWEN3), re.DOTALL)
    assert json.loads(found) == {"name": "f", "arguments": {"a": 1.1}}


def test_a_template_that_writes_data_in_its_own_form_gets_data() -> None:
    for arguments in ('{"a":1.10}', {"a": 1.1}):
        text = written(arguments, chat_template_utils.qwen2_5_chat_template)
        assert ('"arguments": {"a": 1.1}' in text, '\\"' in text) == (True, False)
        own = "{% if it is string %}{{ it }}{% else %}<{{ it.keys() | first }}>{% endif %}"
        assert written(arguments, FIELD.replace("{{ it }}", own, 1)).endswith("<a>")


def test_the_template_that_is_used_says_how_arguments_are_written() -> None:
    """As TRL's training template of DeepSeek-V3: its own takes text alone."""
    for arguments in ('{"city":"Oslo"}', {"city": "Oslo"}):
        text = written(arguments, AS_TEXT, chat_template=TOOLS_TEMPLATE)
        assert '"arguments": {"city": "Oslo"}' in text


def test_a_template_that_takes_arguments_as_text_gets_text() -> None:
    like_deepseek = byte_tokenizer(template=AS_TEXT)
    call = called("weather", city="Troms\u00f8")
    for message in (call, spelled(call)):
        asked = check_messages([USER, message, answered("3"), USER], "the prompt")
        text = render(asked, like_deepseek)
        arguments = text.split("<call>weather ")[1].split("</call>")[0]
        assert json.loads(arguments) == {"city": "Troms\u00f8"}


def test_tools_may_be_json_text_and_stay_a_column(tmp_path: Path) -> None:
    schemas = [tool("weather", "city")]
    path = lines(tmp_path / "d.jsonl", [{"prompt": "q", "tools": json.dumps(schemas)}])
    assert texts(path) == texts(lines(tmp_path / "e.jsonl", [{"prompt": "q", "tools": schemas}]))
    spec = DataSpec(path=str(path))
    source = training_prompts(
        spec, as_prompts(spec, training_data(spec), TOOLS), TOOLS, max_prompt_length=999, seed=0
    )
    assert source.prompt_at(0).tools == tuple(schemas)
    assert source.prompt_at(0).columns == {"tools": json.dumps(schemas)}


@pytest.mark.parametrize("value", ["[{", "{}x", 3, "3", ["weather"], [{"type": "function"}]])
def test_what_is_no_tool_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match="column 'tools'"):
        check_tools(value)


def test_a_template_that_cannot_carry_tools_or_calls_is_refused(chat: Any, plain: Any) -> None:
    with pytest.raises(DataError, match="leaves out the row's tools"):
        render([USER], chat, tools=[tool("weather", "city")])
    with pytest.raises(DataError, match="leaves out the call of tool 'weather'"):
        render(check_messages([USER, called("weather"), USER], "the prompt"), chat)
    with pytest.raises(DataError, match="no chat template to say where they go"):
        render("q", plain, tools=[tool("weather", "city")])


def test_sharegpt_is_read_and_its_last_answer_stays_a_column(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "How warm?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3 degrees"},
    ]
    path = lines(tmp_path / "d.jsonl", [{"conversations": turns}])
    (text,) = texts(path)
    assert text == (
        '<system>Be brief.</system><user>How warm?</user><assistant><call>{"name": "weather", '
        '"arguments": {"city": "Oslo"}}</call></assistant><tool>3</tool><assistant>'
    )
    spec = DataSpec(path=str(path))
    (prompt,) = training_prompts(
        spec, as_prompts(spec, training_data(spec), TOOLS), TOOLS, max_prompt_length=999, seed=0
    ).epoch()
    assert prompt.columns == {"conversations": turns}
    assert prompt.source[1] == {"role": "user", "content": "How warm?"}


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([{"from": "robot", "value": "x"}], "from 'robot'"),
        ([{"from": "gpt", "value": "x"}], "asks nothing"),
        ([{"from": "human", "value": None}], "content of type NoneType"),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "{"}], "no JSON"),
        (
            [{"from": "human", "value": "q"}, {"from": "function_call", "value": "[" * 5000}],
            "no JSON",
        ),
        ([{"from": "human", "value": "q"}, {"from": "function_call", "value": "3"}], "a name"),
    ],
)
def test_broken_sharegpt_is_refused(turns: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what):
        texts(lines(tmp_path / "d.jsonl", [{"conversations": turns}]))


def test_an_environment_may_make_the_prompt(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"seed": 3}, {"seed": 4, "prompt": "q"}, {"seed": 5}])
    asked = ["<user></user><assistant>", "<user>q</user><assistant>", "<user></user><assistant>"]
    assert texts(path, environment=True) == asked
    alone = lines(tmp_path / "e.jsonl", [{"seed": 3}])
    assert texts(alone, environment=True) == asked[:1]
    spec = DataSpec(path=str(alone), eval_path=str(alone))
    held_out = held_out_data(spec)
    assert held_out is not None
    rows = as_prompts(spec, held_out, TOOLS, environment=True)
    prompt = evaluation_prompts(spec, rows, TOOLS, max_prompt_length=99).prompt_at(0)
    assert prompt.source == []
    assert prompt.columns == {"seed": 3}
    with pytest.raises(DataError, match="no column 'prompt'"):
        texts(alone)


def test_nothing_follows_a_prompt_where_the_tokenizer_ends_every_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=True, eos=True)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id, "the tokenizer does so"
    spec = DataSpec(path=str(lines(tmp_path / "d.jsonl", [{"prompt": "1+1"}])))
    rows = as_prompts(spec, training_data(spec), tokenizer)
    source = training_prompts(spec, rows, tokenizer, max_prompt_length=9, seed=0)
    assert tokenizer.decode(source.prompt_at(0).token_ids) == "<bos>1+1"


@pytest.mark.parametrize("template", QWEN)
def test_what_a_developer_says_is_the_systems_where_a_template_knows_no_developer(
    template: str,
) -> None:
    tokenizer = byte_tokenizer(template=template)
    text = render([DEVELOPER, USER], tokenizer)
    assert "As developer." in text
    assert text == render([{**DEVELOPER, "role": "system"}, USER], tokenizer)


def test_an_instruction_that_a_template_leaves_out_is_refused() -> None:
    obeys = TOOLS_TEMPLATE.replace("{{ m.content }}", "{{ m.content.replace('/no_think', '') }}")
    told = [{"role": "system", "content": "/no_think"}, USER]
    assert "/no_think" not in render(told, byte_tokenizer(template=obeys))
    deaf = byte_tokenizer(template=TOOLS_TEMPLATE.replace("in messages", "in messages[-1:]"))
    for refusal, messages, tokenizer in (
        ("leaves out message 1, of role 'developer'; use", [SYSTEM, DEVELOPER, USER], GPT_OSS),
        ("leaves out message 0, of role 'system'; use", [SYSTEM, USER], deaf),
        ("takes neither a developer's message nor a system's", [DEVELOPER, USER], deaf),
        ("takes neither a developer's message nor a system's", [DEVELOPER, USER], GEMMA),
    ):
        with pytest.raises(DataError, match=refusal):
            render(messages, tokenizer)
    with pytest.raises(DataError, match="leaves out message 0, of role 'system'"):
        render("x", deaf, system_prompt="y")


def test_what_a_rendering_lost_is_named() -> None:
    said = [{"role": "assistant", "content": "<think>a  b</think>\nc"}]
    assert what_is_lost("<think>\na b\n</think>\n\nc", said) is None
    assert what_is_lost("c", said) == "thinking"
    assert what_is_lost("c", [{"role": "assistant", "content": "d"}]) == "its content"
    apart = [{"role": "assistant", "content": "c", "reasoning_content": "a"}]
    assert what_is_lost("c", apart) == "thinking"
    assert what_is_lost("ca", apart) is None


PICTURE = {"bytes": b"GIF", "path": None}


@pytest.mark.parametrize(
    ("row", "said", "refused"),
    [
        ({"images": [PICTURE]}, "Find x", True),
        ({"image": PICTURE}, "Find x", True),
        ({"image": object()}, "Find x", True),  # a decoded one
        ({"videos": ["v.mp4"]}, "Find x", True),
        ({"image": "a.png"}, "<image>\nFind x", True),
        ({"image": "a.png"}, [{"from": "human", "value": "<image>\nFind x"}], True),
        ({"image": "python:3.12"}, "Mend the bug", False),
        ({"images": [], "image": None, "videos": None}, "<image> is a tag", False),
        ({"answer": [PICTURE]}, "Find x", False),
    ],
)
def test_what_a_model_would_have_to_see_is_told_from_text(
    row: dict[str, Any], said: Any, refused: bool
) -> None:
    if not refused:
        check_unseen(row, said)
        return
    with pytest.raises(DataError, match=r"has what no model here sees, which reads text alone; "):
        check_unseen(row, said)


def test_a_row_with_an_image_cannot_be_used_for_anything() -> None:
    plain, said = {"prompt": "p"}, r"column 'images' has what no model here sees"
    pair = {**plain, "chosen": "c", "rejected": "r"}
    text = {**plain, "completion": "c"}

    def rows(row: dict[str, Any]) -> Table:
        return Table({**row, "images": [PICTURE]}, {**row, "images": []}, {**row, "images": None})

    prompts = PromptRows(rows(plain), TOOLS)
    assert [*prompts.usable] == [1, 2]
    taught = tokenise_taught(
        rows(text), TOOLS, columns=Columns(), loss_on=None, apply_chat_template=True
    )
    assert [*taught.taught] == [1, 2]
    for wrong in (prompts.wrong, taught.wrong):
        assert re.match(said, str(wrong[0]))
    with pytest.raises(DataError, match=said):
        PairRows(rows(pair)).pair(0)
    assert PairRows(rows(pair)).pair(1).prompt == "p"
    assert re.match(said, str(scored_pairs._wrong(rows(text)[0], "prompt", "completion")))
    assert scored_pairs._wrong(rows(text)[1], "prompt", "completion") is None
    shown = PromptRows(rows(plain), TOOLS, environment=True)
    assert [*shown.usable] == [0, 1, 2], "an environment may show them"
