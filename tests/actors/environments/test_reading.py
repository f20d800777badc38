"""What models of each family write is a call, a malformed call or content; no end is content."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from actors.environments.tokens import ChatTokens
from tests.actors.environments.chat import call_text, make_tokenizer

ARGUMENTS = {"a": 1}
CALL = {"type": "function", "function": {"name": "tell", "arguments": ARGUMENTS}}
LLAMA_CALL = '{"name": "tell", "parameters": {"a": 1}}'
GLM_CALL = "<tool_call>tell\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
XML_CALL = "<tool_call>\n<function=tell>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
LFM_CALL = "<|tool_call_start|>[tell(a=1)]<|tool_call_end|>"
GEMMA_CALL = "<|tool_call>call:tell{a:1}<tool_call|>"
# By TRL's name of the template: the ends of the generation config, the tokenizer's `eos_token`
# first; and a call.
FAMILIES = {
    "qwen3": (["<|im_end|>", "<|endoftext|>"], call_text("tell", a=1)),
    "qwen3_5_think": (["<|im_end|>", "<|endoftext|>"], XML_CALL),
    "llama3_1": (["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], LLAMA_CALL),
    "glm4moe": (["<|endoftext|>", "<|user|>", "<|observation|>"], GLM_CALL),
    "lfm2_2_5": (["<|im_end|>", "<|endoftext|>"], LFM_CALL),
    "gemma4": (["<turn|>", "<eos>", "<|tool_response>"], GEMMA_CALL),
    "gptoss": (["<|return|>", "<|endoftext|>", "<|call|>"], ""),
}
OTHERS = {  # special tokens that are no ends
    "llama3_1": ["<|python_tag|>", "<|start_header_id|>", "<|end_header_id|>"],
    "glm4moe": ["[gMASK]", "<sop>", "<|assistant|>"],
    "gptoss": [f"<|{mark}|>" for mark in ("start", "message", "channel", "end", "constrain")],
}
ENDS = [(name, end) for name, (ends, _) in FAMILIES.items() for end in ends]


@cache
def tokens_of(name: str) -> tuple[Any, ChatTokens]:
    from trl import chat_template_utils

    tokenizer = make_tokenizer(getattr(chat_template_utils, f"{name}_chat_template"))
    ends, _ = FAMILIES[name]
    tokenizer.add_special_tokens(
        {"eos_token": ends[0], "additional_special_tokens": [*ends[1:], *OTHERS.get(name, [])]}
    )
    stops = tokenizer.convert_tokens_to_ids(ends)
    return tokenizer, ChatTokens(tokenizer, name, stops=stops)


def read(name: str, said: str, answer_to: str = "x") -> tuple[dict[str, Any], bool]:
    """The message without its role, and whether it is malformed."""
    tokenizer, tokens = tokens_of(name)
    prompt = tokens.prompt([{"role": "user", "content": answer_to}], ())
    turn = tokens.read(prompt, tokenizer.encode(said, add_special_tokens=False))
    assert turn.message["role"] == "assistant"
    return {k: v for k, v in turn.message.items() if k != "role"}, turn.malformed


@pytest.mark.parametrize(("name", "end"), [pair for pair in ENDS if pair[1] != "<|call|>"])
def test_no_end_of_a_turn_is_a_part_of_what_is_said(name: str, end: str) -> None:
    if name == "gptoss":
        heads = ["<|channel|>final<|message|>", "<|channel|>analysis<|message|>"]
        assert read(name, f"{heads[0]}5{end}") == ({"content": "5"}, False)
        assert read(name, f"{heads[1]}hm{end}") == ({"thinking": "hm", "content": ""}, False)
        return
    head = "</think>\n\n" if name == "qwen3_5_think" else ""
    thought = {"reasoning_content": ""} if head else {}
    message, malformed = read(name, f"{head}5{end}")
    assert (thought | message, malformed) == (thought | {"content": "5"}, False)
    message, malformed = read(name, f"{head}I look.\n{FAMILIES[name][1]}{end}")
    assert malformed is False
    assert message["tool_calls"] == [CALL]
    assert message["content"] == "I look."


@pytest.mark.parametrize(("name", "end"), [p for p in ENDS if p[0] in ("qwen3", "glm4moe")])
def test_nor_of_thinking_that_it_ended(name: str, end: str) -> None:
    assert read(name, f"<think>\nhm{end}") == ({"reasoning_content": "hm", "content": ""}, False)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe"])
def test_a_turn_that_is_but_an_end_says_nothing(name: str) -> None:
    for end in FAMILIES[name][0]:
        assert read(name, end) == ({"content": ""}, False)


def test_an_end_that_is_no_special_token_is_left_out_too() -> None:
    """Of a model that calls no tools, and of what is unread: `model.stop_token_ids` names any."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    stop, *_ = tokenizer.encode("!")
    tokens = ChatTokens(tokenizer, tools=False, stops=[stop])
    assert tokens.read([], tokenizer.encode("5!")).message["content"] == "5"
    whole = ChatTokens(make_tokenizer(), stops=[stop])
    assert whole.read([], tokenizer.encode("5!")).message["content"] == "5"
    unread = whole.read([], tokenizer.encode("<tool_call>{!"))
    assert (unread.malformed, unread.message["content"]) == (True, "<tool_call>{")


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe", "gptoss"])
def test_a_prompt_that_is_no_chat_is_no_part_of_what_is_said(name: str) -> None:
    tokenizer, tokens = tokens_of(name)
    head = "<|channel|>final<|message|>" if name == "gptoss" else ""
    said = tokenizer.encode(f"{head}5{FAMILIES[name][0][0]}", add_special_tokens=False)
    assert tokens.read(tokenizer.encode("2+3="), said).message["content"] == "5"


@pytest.mark.parametrize("head", ["", "<|start|>assistant"])
def test_gpt_oss_without_a_header_says_its_text(head: str) -> None:
    tokenizer, tokens = tokens_of("gptoss")
    prompt, said = (tokenizer.encode(text) for text in (f"Q: 2+3{head}", "5<|return|>"))
    turn = tokens.read(prompt, said)
    assert (turn.message["content"], turn.malformed) == ("5", False)


TURN = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("before", "said", "message"),
    [
        (f"{TURN}I look.{call_text('tell', a=2)}\n<tool_response>2", "Hm.", {"content": "Hm."}),
        (f"{TURN}<tool_call>{{</tool_call>2", "Hm.", {"content": "Hm."}),
        (f"{TURN}<think>2", "!</think>5", {"content": "5", "reasoning_content": "!"}),
        (f"{TURN}<think>2</think>3", "5", {"content": "5"}),
        (f"{TURN}<think>", "2</think>5", {"content": "5", "reasoning_content": "2"}),
        (
            f"{TURN}I look.{call_text('tell', a=1)[:30]}",
            f"{call_text('tell', a=1)[30:]}5",
            {"content": "5", "tool_calls": [CALL]},
        ),
    ],
)
def test_what_stands_in_the_turn_already_is_no_part_of_what_is_said(
    before: str, said: str, message: dict[str, Any]
) -> None:
    """An agent may go on in one turn, with what its tools told, or with what a limit cut."""
    tokenizer, tokens = tokens_of("qwen3")
    turn = tokens.read(tokenizer.encode(f"{TURN}0<|im_end|>\n{before}"), tokenizer.encode(said))
    assert (turn.message, turn.malformed) == ({"role": "assistant", **message}, False)


THOUGHT = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
HEADERS = [
    " to=functions.tell<|channel|>commentary json",
    " to=functions.tell<|channel|>commentary <|constrain|>json",
    "<|channel|>commentary to=functions.tell <|constrain|>json",
    "<|channel|>commentary to=functions.tell json",
    "<|channel|>commentary to=functions.tell",
    "<|channel|>analysis to=functions.tell code",
    "<|channel|>commentary to=tell <|constrain|>json",
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(
    ("before", "more"),
    [
        ("", {"content": ""}),
        (THOUGHT, {"content": "", "thinking": "hm"}),
        (PREAMBLE, {"content": "I look."}),
        (THOUGHT + PREAMBLE, {"content": "", "thinking": "hm"}),
    ],
)
def test_a_call_of_gpt_oss_is_read_whatever_the_order_of_its_header(
    header: str, before: str, more: dict[str, str]
) -> None:
    """With thinking its chat template takes no content beside a call."""
    said = f'{before}{header}<|message|>{{"a": 1}}<|call|>'
    assert read("gptoss", said) == ({**more, "tool_calls": [CALL]}, False)
    tokens = tokens_of("gptoss")[1]
    told = [{"role": "user", "content": "x"}, {"role": "assistant", **more, "tool_calls": [CALL]}]
    assert tokens.prompt([*told, {"role": "tool", "name": "tell", "content": "y"}], ())


@pytest.mark.parametrize(
    "said",
    [
        *(f"{THOUGHT}{header}<|message|>{{<|call|>" for header in HEADERS),
        f'{THOUGHT}{HEADERS[2]}<|message|>{{"a": 1}}<|return|>',
        '<|channel|>commentary<|message|>{"a": 1}<|call|>',
        "<|channel|>analysis<|message|>hm<|call|>",
        " to=python<|channel|>analysis code<|message|>1 + 1<|call|>",
    ],
)
def test_a_call_of_gpt_oss_that_cannot_be_read_is_malformed(said: str) -> None:
    message, malformed = read("gptoss", said)
    assert malformed
    assert "tool_calls" not in message
    assert "<|" not in message["content"]


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ("<|channel|>commentary<|message|>I look.<|return|>", "I look."),
        (f"{PREAMBLE}<|channel|>final<|message|>5<|return|>", "5"),
        ('<|channel|>final <|constrain|>json<|message|>{"to=": 5}<|return|>', '{"to=": 5}'),
        ("<|channel|>final<|message|>say to=functions.tell<|return|>", "say to=functions.tell"),
    ],
)
def test_what_gpt_oss_says_to_the_user_is_content(said: str, content: str) -> None:
    assert read("gptoss", said) == ({"content": content}, False)


@pytest.mark.parametrize("end", FAMILIES["llama3_1"][0])
@pytest.mark.parametrize(
    "said",
    [
        LLAMA_CALL,
        '{"type": "function", "name": "tell", "parameters": {"a": 1}}',
        '{"name": "tell", "arguments": {"a": 1}}',
        f"<|python_tag|>{LLAMA_CALL}",
        '<|python_tag|>{"type": "function", "name": "tell", "parameters": {"a": 1}}',
        f"\n{LLAMA_CALL}\n",
        '{\n "name": "tell",\n "parameters": {"a": 1}\n}',
    ],
)
def test_a_call_of_llama_is_read_in_each_of_its_usual_spellings(said: str, end: str) -> None:
    assert read("llama3_1", said + end) == ({"content": "", "tool_calls": [CALL]}, False)


@pytest.mark.parametrize("end", FAMILIES["llama3_1"][0])
@pytest.mark.parametrize(
    ("said", "malformed"),
    [
        (f"{LLAMA_CALL}; {LLAMA_CALL}", True),  # its chat template takes one alone
        ('{"type": "function", "name": "tell", "parameters": {"a": 1}', True),
        ('<|python_tag|>tell.call(a="1")', True),
        ('Say {"name": "tell", "arguments": {}} and so on.', False),
        ('Say {"type": "function", "name": "tell", "parameters": {}}', False),
        ('{"name": "Ada", "born": 1815}', False),
    ],
)
def test_what_else_llama_writes_is_malformed_or_content(
    said: str, end: str, malformed: bool
) -> None:
    text = said.removeprefix("<|python_tag|>")
    assert read("llama3_1", said + end) == ({"content": text}, malformed)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3_5_think", f"</think>\n\n{call_text('tell', a=1)}<|im_end|>"),
        ("glm4moe", "<tool_call> tell<|observation|>"),
        ("gemma4", "<|tool_call>tell{a:1}<tool_call|><|tool_response>"),
        ("lfm2_2_5", "<|tool_call_start|>tell<|tool_call_end|><|im_end|>"),
    ],
)
def test_a_mark_of_a_call_without_a_call_is_malformed(name: str, said: str) -> None:
    assert read(name, said)[1]


def test_a_response_template_that_is_none_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.response_template = {"fields": {"content": {"close": ""}}}
    with pytest.raises(ValueError, match=r"response_template in .* of model 'x' cannot be read"):
        ChatTokens(tokenizer, "model 'x'")
