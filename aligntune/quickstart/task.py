"""Makes the tiny model and the arithmetic task of `aligntune quickstart`; nothing is downloaded.

The task is the sum of two two-digit numbers where no column carries, such as 42+37. The warm-up
imitates a careless teacher who, where the units come to seven or more, loses one in three of five
sums. The model so learns to add, and learns the carelessness too: greedily it is right on small
units and seldom on large ones. A verifiable reward then teaches it to count to the end.

Invariant: everything made here is a function of the seed alone, and no held-out question is ever
trained on. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aligntune.quickstart.tiny import (
    Assets,
    WarmUp,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from aligntune.runs.disk import write_atomically

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HELD_OUT = 200
"""Questions kept for evaluation, of 1980."""

SLIP_RATE = 0.6
"""How often the warm-up's teacher loses one where the units come to `MANY` or more."""

MANY = 7

WINDOW = (0.32, 0.68)
"""Held-out greedy accuracy at which the warm-up may stop: something known, something to learn.

Inside 0.3 to 0.7 by a margin, for another engine may break a near tie differently."""

SETTLED = 0.98
"""Least share of held-out answers that are the sum or the slip at that point."""

REJECTED = 3
"""Wrong answers to a question among the preference pairs."""

MAX_ANSWER_TOKENS = 8
"""Budget of a completion; a right one takes 3 (two digits and the end)."""

POSITIONS = 64
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Question:
    """A sum, such as 42+37."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        """What the user asks."""
        return f"{self.left}+{self.right}"

    @property
    def answer(self) -> str:
        """The sum in decimal."""
        return str(self.left + self.right)

    @property
    def slip(self) -> str:
        """What the careless teacher says (42+37=78); `answer` where the units are small."""
        units = self.left % 10 + self.right % 10
        return str(self.left + self.right - (units >= MANY))


@dataclass(frozen=True)
class Task:
    """Questions to train on and questions held out, without a common one."""

    train: tuple[Question, ...]
    held_out: tuple[Question, ...]


@dataclass(frozen=True)
class Accuracy:
    """Shares of greedy answers."""

    right: float
    settled: float  # right, or wrong as the teacher is and in no other way


def make_task(seed: int) -> Task:
    """Every sum without a carry, shuffled by `seed`; the last `HELD_OUT` are held out."""
    questions = [
        Question(left, right)
        for left in range(10, 100)
        for right in range(10, 100)
        if left // 10 + right // 10 < 10 and left % 10 + right % 10 < 10
    ]
    random.Random(seed).shuffle(questions)
    return Task(tuple(questions[:-HELD_OUT]), tuple(questions[-HELD_OUT:]))


def preference_pairs(questions: Sequence[Question], seed: int) -> list[dict[str, str]]:
    """Right answers preferred to wrong ones: `REJECTED` rows a question, prompt, chosen, rejected.

    Four of five wrong answers have one digit changed, to any other: what tells them apart is then
    each digit for itself, which a small model learns; answers that are off by one alone teach it
    little. The rest are another number, an operand, or have too many digits or too few.
    """
    rng = random.Random(seed)
    rows = []
    for question in questions:
        wrong: set[str] = set()
        while len(wrong) < REJECTED:
            wrong.add(_wrong_answer(question, rng))
            wrong.discard(question.answer)
        rows += [
            {"prompt": question.prompt, "chosen": question.answer, "rejected": rejected}
            for rejected in sorted(wrong)
        ]
    rng.shuffle(rows)
    return rows


def _wrong_answer(question: Question, rng: random.Random) -> str:
    answer = question.answer
    if rng.random() < 0.8:
        place = rng.randrange(len(answer))
        return answer[:place] + rng.choice(string.digits) + answer[place + 1 :]
    others = [str(rng.randrange(10, 100)), str(question.left), str(question.right)]
    return rng.choice([*others, answer * 2, answer[0], answer + rng.choice(string.digits)])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, and a chat template of one token a role."""
    return tiny_tokenizer(_ROLES, _CHAT_TEMPLATE, POSITIONS)


def make_model(seed: int) -> PreTrainedModel:
    """A Qwen3 of 0.34M parameters in float32, initialised by `seed`; global RNG state is kept."""
    return tiny_model(seed, make_tokenizer(), POSITIONS)


def greedy_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> list[str]:
    """The model's most likely answer to each question, without special tokens."""
    import torch

    texts = [_render(tokenizer, question.prompt) for question in questions]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    with torch.no_grad():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_ANSWER_TOKENS,
        )
    width = batch["input_ids"].shape[1]
    return tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> Accuracy:
    """Greedy accuracy by exact match."""
    answers = greedy_answers(model, tokenizer, questions)
    right = sum(a == q.answer for a, q in zip(answers, questions, strict=True))
    settled = sum(a in (q.answer, q.slip) for a, q in zip(answers, questions, strict=True))
    return Accuracy(right / len(questions), settled / len(questions))


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    seed: int,
    *,
    max_steps: int = 500,
) -> float:
    """Supervised learning, in place, on the careless teacher's answers to the training questions.

    Stops when held-out accuracy lies in `WINDOW` and `SETTLED` is reached. On one thread, so that
    the weights do not depend on the number of cores.

    Returns the held-out greedy accuracy.

    Raises:
        RuntimeError: that point was not reached in `max_steps`.
    """
    import torch

    lessons = _lessons(tokenizer, task.train)

    def batch_of(rng: random.Random) -> list[torch.Tensor]:
        rows = torch.tensor(
            [2 * rng.randrange(len(task.train)) + (rng.random() < SLIP_RATE) for _ in range(128)]
        )
        return [part[rows] for part in lessons]

    def reached() -> tuple[float, float]:
        found = accuracy(model, tokenizer, task.held_out)
        return found.right, found.settled

    warm = WarmUp(decay_steps=200, every=10, window=WINDOW, settled=SETTLED, max_steps=max_steps)
    return warm.run(model, batch_of, reached, seed)


def write_assets(directory: str | Path, seed: int) -> Assets:
    """Make the task and the warmed-up model and write both under `directory`.

    Raises:
        RuntimeError: see `warm_up`; nothing of the model is written then.
    """
    assets = Assets(Path(directory))
    assets.root.mkdir(parents=True, exist_ok=True)
    task, tokenizer, model = make_task(seed), make_tokenizer(), make_model(seed)
    reached = warm_up(model, tokenizer, task, seed)
    write_jsonl(assets.train, [{"prompt": q.prompt, "answer": q.answer} for q in task.train])
    write_jsonl(assets.eval, [{"prompt": q.prompt, "answer": q.answer} for q in task.held_out])
    write_jsonl(assets.pairs, preference_pairs(task.train, seed))
    write_jsonl(assets.eval_pairs, preference_pairs(task.held_out, seed))
    model.save_pretrained(assets.model)
    tokenizer.save_pretrained(assets.model)
    write_atomically(assets.accuracy, json.dumps(reached))
    return assets


def _render(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str | None = None) -> str:
    """The chat of one question, up to where the answer begins or with the answer and its end."""
    messages = [{"role": "user", "content": prompt}]
    if answer is None:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _lessons(
    tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and targets, each [2N, T]: question i answered right at row 2i and
    by the careless teacher at 2i+1. Targets are -100 but on the answer and its end."""
    import torch

    answers = [answer for q in questions for answer in (q.answer, q.slip)]
    texts = [
        _render(tokenizer, q.prompt, answer) for q in questions for answer in (q.answer, q.slip)
    ]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    # With padding on the left every answer ends at the right edge.
    lengths = torch.tensor([len(answer) + 1 for answer in answers])
    trained = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    return ids, mask, ids.masked_fill(~trained, -100)
