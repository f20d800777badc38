"""What the policy said, read by the tokenizer's response template.

TRL's templates know the one spelling of a call that the chat template renders, and one end of a
turn. Models sample others too: `amended` adds the spellings, and a turn is read as if it ended by
the end that its response template knows. Ids change nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from actors.environments.chat_messages import unsendable


@dataclass(frozen=True)
class Turn:
    """What the policy said, read."""

    message: dict[str, Any]  # role assistant; `tool_calls` where it calls tools
    malformed: bool = False  # it meant to call a tool, and no parser reads how


_MARKS = ("<tool_call>", "<|tool_call>", "<|tool_call_start|>", "<|python_tag|>", "<|call|>")
"""Tokens that begin or end a call, of any family: where one is left, no call was read there."""

_HARMONY = "<|start|>assistant"
"""Begins a message of GPT-OSS's format, whose header names channel and recipient in any order."""

_REST = r"(?:(?!to=)[^<]|<\|(?:channel|constrain)\|>){0,200}+<\|message\|>"  # of a header
_GPT_OSS = {
    "content": {
        "open_pattern": rf"<\|channel\|>(?:final|commentary){_REST}",
        "close_pattern": r"<\|(?:return|end)\|>\s*",
    },
    "tool_calls": {"open_pattern": rf"to=(?:functions\.)?+(?P<name>[^\s<]{{1,200}}+){_REST}"},
}
_LLAMA_3 = {
    "tool_calls": {
        # Where a turn is a call and nothing else (group 1), as Meta's prompts ask for it; or amid
        # text, as the chat template renders it.
        "open_pattern": (
            r'(?:(\A\s*(?:<\|python_tag\|>\s*)?\{\s*(?:"type":\s*"function",\s*)?)|\{)'
            r'"name":\s*"(?P<name>[^"]+)",\s*"(?:parameters|(?(1)arguments|parameters))":\s*'
        ),
        "close_pattern": r"\}\s*<\|eot_id\|>\s*",
    }
}


def amended(template: Any) -> Any:
    """`template`, with the spellings of calls that it lacks where it is TRL's for GPT-OSS or for
    Llama 3; another one as it is."""
    from trl import chat_template_utils as trl

    if template == trl.gptoss_template:
        changes = _GPT_OSS
    elif template == trl.llama3_template:
        changes = _LLAMA_3
    else:
        return template
    fields = dict(template["fields"])
    for name, patterns in changes.items():
        kept = {key: value for key, value in fields[name].items() if key not in ("open", "close")}
        fields[name] = kept | patterns
    return {**template, "fields": fields}


def plain(tokenizer: Any, ends: Collection[int], sampled: Sequence[int]) -> dict[str, Any]:
    """The message whose content is the text of `sampled`, unread: its end and special tokens are
    left out."""
    written = sampled[:-1] if sampled and sampled[-1] in ends else sampled
    text: str = tokenizer.decode(list(written), skip_special_tokens=True)
    return {"role": "assistant", "content": text}


class Reader:
    """Reads the turns of one model."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        """`tokenizer` has a response template; `ends`: the ids that end a turn.

        Raises:
            ValueError: the response template is none.
        """
        from transformers.utils.chat_parsing.response_templates import load_response_template

        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        template = load_response_template(tokenizer.response_template)
        self._template = template
        self._harmony = tokenizer.response_template.get("start_anchor") == _HARMONY
        closes = [f.close_re for f in template.fields.values() if f.close_re is not None]
        self._known = frozenset(
            end for end in self._ends if any(c.fullmatch(tokenizer.decode([end])) for c in closes)
        )
        """The ends that close a field of the template."""
        eos = tokenizer.eos_token_id
        self._end = [eos] if eos in self._known else []

    def read(self, prompt_ids: Sequence[int], sampled: Sequence[int]) -> Turn:
        """The message in the `sampled` ids that follow `prompt_ids`.

        What cannot be read is text, as in TRL, and `malformed`; so are `unsendable` calls. What
        stands in the prompt is no part of it, where an agent goes on in the same turn neither.
        """
        from trl.chat_template_utils import parse_response

        text = plain(self._tokenizer, self._ends, sampled)
        ids = self._with_known_end(sampled)
        if not ids:
            return Turn(text)
        prefix = self._opening(self._tokenizer.decode(list(prompt_ids)))
        try:
            meant = self._tokenizer.parse_response(ids, prefix=prefix)
            message = parse_response(self._tokenizer, ids, prefix=prefix)
        except (ValueError, TypeError, KeyError, RecursionError):
            return Turn(text, malformed=True)
        calls = meant.get("tool_calls") if isinstance(meant, dict) else None
        if calls and (not message.get("tool_calls") or unsendable(calls)):
            return Turn(text, malformed=True)
        end = self._tokenizer.decode(ids[-1:])
        if not calls and (end in _MARKS or any(mark in message["content"] for mark in _MARKS)):
            return Turn(text, malformed=True)
        if not meant.keys() - self._template.defaults.keys() and self._is_plain(text, sampled):
            return Turn(text)  # in no field: a format whose headers it left out
        if calls and self._harmony and message.get("thinking"):
            message["content"] = ""  # its chat template refuses both beside a call
        return Turn(_without(end, message) if ids[-1] in self._ends else message)

    def _opening(self, prompt: str) -> str:
        """What of `prompt` the parser must see: how the last turn in it begins, and where something
        is said there already, only what opens the field that is not closed yet. Empty where there
        is none."""
        from transformers.utils.chat_parsing import ResponseParser

        anchors = list(self._template.start_anchor_re.finditer(prompt))
        if not anchors:
            return ""  # of no chat
        turn = prompt[anchors[-1].start() :]
        try:
            events = ResponseParser(self._template, prefix=turn).initial_events
        except (ValueError, TypeError, KeyError, RecursionError):  # of a call that was said before
            return ""
        said, opened = False, None
        for event in events:
            if event["type"] == "region_chunk":
                said = said or not event["text"].isspace()
            else:
                is_open = event["type"] == "region_open"
                opened = self._template.fields[event["field"]] if is_open else None
        if not said:
            return turn
        if opened is None or opened.open_re is None:
            return ""
        *_, opener = opened.open_re.finditer(turn)
        # A call that is not whole yet is said by both.
        return anchors[-1].group() + (
            opener.group() if opened.content == "text" else turn[opener.start() :]
        )

    def _is_plain(self, text: dict[str, Any], sampled: Sequence[int]) -> bool:
        """Whether `text` is all of `sampled`: no special token is left out but an end."""
        written = sampled[:-1] if sampled[-1] in self._ends else sampled
        return bool(text["content"] == self._tokenizer.decode(list(written)))

    def _with_known_end(self, sampled: Sequence[int]) -> list[int]:
        """`sampled`, where its end closes no field of the template, with the `eos_token` in its
        place, or with none where the template knows that neither."""
        if sampled and sampled[-1] in self._ends - self._known:
            return [*sampled[:-1], *self._end]
        return list(sampled)


def _without(end: str, message: dict[str, Any]) -> dict[str, Any]:
    """`message`, where its text ends by `end`: the turn ended amid its thinking, say."""
    return {
        key: value.removesuffix(end).rstrip()
        if isinstance(value, str) and value.endswith(end)
        else value
        for key, value in message.items()
    }
