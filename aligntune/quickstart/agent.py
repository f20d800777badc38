"""Makes the tiny model and the task of `aligntune quickstart --task agent`; nothing is downloaded.

The task is the sum of three two-digit numbers, such as 21+14+38, with a tool that adds two. The
model adds nothing itself: it calls the tool, calls it again with what it said and the third number,
and repeats what it says then. The warm-up imitates a hasty teacher who, where the third number ends
in four or more, leaves the second call out of three of five answers. Greedily the model so forgets
the third number where it ends high, and an answer that is checked teaches it to call again.

Invariant: everything made here is a function of the seed alone, and no held-out question is ever
trained on. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligntune.quickstart.tiny import (
    END,
    Assets,
    WarmUp,
    logits_of,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from aligntune.runs.disk import write_atomically

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from actors.messages import Messages

TRAINED, HELD_OUT = 2000, 200
"""Questions of each kind, of 12,167."""

HASTE = 0.6
"""How often the warm-up's teacher leaves the second call out where the third number ends high."""

HIGH = 4

WINDOW = (0.32, 0.58)
"""Held-out greedy success at which the warm-up may stop."""

SETTLED = 0.98
"""Least share of held-out episodes that end as one of the teacher's does at that point."""

MAX_TURNS = 4
MAX_SAMPLED_TOKENS = 48
"""Of an episode; one that is right takes 23."""

POSITIONS = 128
_CALL, _CALL_END = "<|tool_call|>", "<|/tool_call|>"
_PIECES = ("add", '{"name": "add", "arguments": {"a": ', ', "b": ', "}}")
_CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool.function.name }}"
    "{% if not loop.last %},{% endif %}{% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] or '' }}"
    "{% if message['role'] == 'assistant' %}{% for call in message['tool_calls'] or [] %}"
    '<|tool_call|>{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}<|/tool_call|>{% endfor %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": _CALL,
            "close": _CALL_END,
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their sum.
    """
    return a + b


@dataclass(frozen=True)
class Sum:
    """A sum of three numbers, such as 21+14+38."""

    first: int
    second: int
    third: int

    @property
    def prompt(self) -> str:
        """What the user asks."""
        return f"{self.first}+{self.second}+{self.third}"

    @property
    def answer(self) -> str:
        """The sum in decimal."""
        return str(self.first + self.second + self.third)

    @property
    def hasty(self) -> bool:
        """Whether the teacher may leave the second call out."""
        return self.third % 10 >= HIGH


def make_sums(seed: int) -> tuple[list[Sum], list[Sum]]:
    """Questions to train on and held out, without a common one; every sum has two digits."""
    numbers = range(10, 33)
    every = [Sum(a, b, c) for a in numbers for b in numbers for c in numbers]
    chosen = random.Random(seed).sample(every, TRAINED + HELD_OUT)
    return chosen[:TRAINED], chosen[TRAINED:]


def make_agent_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character or piece of a call; its chat template carries tools and
    preserves prefixes, and its response template reads their calls."""
    special = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>", _CALL, _CALL_END)
    tokenizer = tiny_tokenizer(special, _CHAT_TEMPLATE, POSITIONS, pieces=_PIECES)
    tokenizer.response_template = _RESPONSE_TEMPLATE
    return tokenizer


def lesson(question: Sum, hasty: bool) -> Messages:
    """The conversation of one question as the teacher plays it."""
    first = question.first + question.second
    turns = [
        {"role": "user", "content": question.prompt},
        _called(question.first, question.second),
        {"role": "tool", "name": "add", "content": str(first)},
    ]
    if hasty:
        return [*turns, {"role": "assistant", "content": str(first)}]
    return [
        *turns,
        _called(first, question.third),
        {"role": "tool", "name": "add", "content": question.answer},
        {"role": "assistant", "content": question.answer},
    ]


def warm_up_agent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    train: Sequence[Sum],
    held_out: Sequence[Sum],
    seed: int,
    *,
    max_steps: int = 600,
) -> float:
    """Supervised learning, in place, on the hasty teacher's conversations, on one thread.

    Stops when held-out success lies in `WINDOW` and `SETTLED` is reached; returns the success.

    Raises:
        RuntimeError: that point was not reached in `max_steps`.
    """
    import torch

    patient, hasty = (_lessons(tokenizer, train, haste) for haste in (False, True))

    def batch_of(rng: random.Random) -> list[torch.Tensor]:
        rows = [rng.randrange(len(train)) for _ in range(32)]
        leaves_out = torch.tensor([train[r].hasty and rng.random() < HASTE for r in rows])
        return [
            torch.where(leaves_out[:, None], with_haste[rows], without[rows])
            for without, with_haste in zip(patient, hasty, strict=True)
        ]

    warm = WarmUp(decay_steps=150, every=20, window=WINDOW, settled=SETTLED, max_steps=max_steps)
    return warm.run(model, batch_of, lambda: greedy_success(model, tokenizer, held_out), seed)


def greedy_success(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Sum]
) -> tuple[float, float]:
    """Shares of greedy episodes that are the patient teacher's, and that are one of the two's.

    An episode is greedily a lesson where each token of the lesson is the likeliest after those
    before it, so nothing is sampled here.
    """
    patient, hasty = (
        _followed(model, *_lessons(tokenizer, questions, haste)) for haste in (False, True)
    )
    return float(patient.float().mean()), float((patient | hasty).float().mean())


def write_agent_assets(directory: Path, seed: int) -> Assets:
    """Make the task and the warmed-up model and write both under `directory`.

    Raises:
        RuntimeError: see `warm_up_agent`; nothing of the model is written then.
    """
    assets = Assets(directory)
    directory.mkdir(parents=True, exist_ok=True)
    train, held_out = make_sums(seed)
    tokenizer = make_agent_tokenizer()
    model = tiny_model(seed, tokenizer, POSITIONS)
    success = warm_up_agent(model, tokenizer, train, held_out, seed)
    for path, questions in ((assets.train, train), (assets.eval, held_out)):
        write_jsonl(
            path,
            [
                {"prompt": [{"role": "user", "content": q.prompt}], "answer": q.answer}
                for q in questions
            ],
        )
    model.save_pretrained(assets.model)
    tokenizer.save_pretrained(assets.model)
    write_atomically(assets.accuracy, json.dumps(success))
    return assets


def _called(a: int, b: int) -> dict[str, Any]:
    call = {"name": "add", "arguments": {"a": a, "b": b}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }


def _lessons(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Sum], hasty: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and targets, each [N, T], T that of a patient lesson. Targets are
    -100 but on what the assistant writes and its ends."""
    import torch
    from transformers.utils import get_json_schema

    tools = [get_json_schema(add)]
    texts: list[str] = [
        tokenizer.apply_chat_template(lesson(q, hasty), tools=tools, tokenize=False)
        for q in questions
    ]
    longest = len(
        tokenizer(
            tokenizer.apply_chat_template(lesson(questions[0], False), tools=tools, tokenize=False)
        ).input_ids
    )
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding="max_length",
        max_length=longest,
        padding_side="left",
        add_special_tokens=False,
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    begins = (ids == tokenizer.convert_tokens_to_ids("<|assistant|>")).long().cumsum(1)
    ends = (ids == tokenizer.convert_tokens_to_ids(END)).long().cumsum(1)
    # A turn's tokens lie behind its role and up to its end, that one included.
    before = torch.nn.functional.pad(ends, (1, 0))[:, :-1]
    written = (begins > before) & (ids != tokenizer.convert_tokens_to_ids("<|assistant|>"))
    return ids, mask, ids.masked_fill(~written, -100)


def _followed(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """[N] bool: every target is the likeliest token at its place."""
    import torch

    with torch.no_grad():
        likeliest = logits_of(model, ids, mask)[:, :-1].argmax(-1)
    wanted = targets[:, 1:]
    return ((likeliest == wanted) | (wanted == -100)).all(1)
