"""Reward models: what text they score, and the criterion that serves one.

Invariant: a reward model is trained on and asked about the same text. `scored_text` alone makes
that text, for the reward-model job and for reward actors; nothing is ever cut off it.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from actors.messages import Conversations, Messages, Prompt
from actors.models.templates import fitted, without_nulls
from actors.scoring.criteria import RewardFailed, RewardFailure
from actors.scoring.said import text_of
from actors.specs import ModelSpec

NO_ROOM = "CUBLAS_STATUS_ALLOC_FAILED"
"""What a library of a GPU says where the memory for itself is not there."""


class ModelStuck(RuntimeError):
    """A reward model answers no more, or its GPU computes no more; only a new process helps."""


@dataclass(frozen=True)
class RewardModelCriterion:
    """One reward model that scores completions, as reward actors get it."""

    name: str  # in metrics
    model: ModelSpec  # a one-label sequence classification folder or hub name
    batch_size: int  # texts in one forward pass
    timeout_s: float  # per call, one group a call; waiting for earlier calls is not counted
    max_tokens: int | None = None  # of prompt and completion; default: the model's positions
    apply_chat_template: bool = True  # False: prompts are text already in the model's format
    label: str | None = None  # of a classifier with several; None: the only one
    output: Literal["logit", "probability"] = "logit"
    reads: Literal["conversation", "completion"] = "conversation"  # or the completion's text alone

    @property
    def renders(self) -> bool:
        """Whether it applies a chat template of its own, where it has one."""
        return self.apply_chat_template and self.reads == "conversation"

    def on_day(self, day: str | None) -> RewardModelCriterion:
        """The same with the day that its chat template writes, where it writes one."""
        return replace(self, model=self.model.model_copy(update={"chat_template_day": day}))


def scored_text(
    tokenizer: Any,
    prompt: str | Messages,
    completion: str | Messages,
    apply_chat_template: bool,
    tools: Sequence[dict[str, Any]] = (),
) -> tuple[str, bool]:
    """The text a reward model reads, and whether special tokens are added when it is tokenised.

    With the reward model's own chat template: the prompt (a string is one user message) and the
    completion (a string is one assistant message) as one conversation, without a generation prompt.
    Without one: prompt, completion and the end-of-sequence token, one after the other. A completion
    that was cut off by the length limit is so scored as if it had ended there. The policy's own
    template and `data.system_prompt` play no part: the prompt is what the data have, with the row's
    `tools` where it has some.

    Raises:
        ValueError: messages without a chat template to render them, or that it refuses.
    """
    if apply_chat_template and tokenizer.chat_template:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else completion
        )
        return rendered(tokenizer, [*asked, *said], tools=[*tools] or None), False
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(
            "the prompt or completion is messages, but the reward model's tokenizer has no chat "
            "template in use; use a model that has one, or give strings"
        )
    end = tokenizer.eos_token or ""  # encoders may have none, and end texts themselves
    return prompt + completion.removesuffix(end) + end, True


def rendered(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """The text that the tokenizer's chat template makes of `messages`.

    Raises:
        ValueError: the template refuses them, or cannot render what they hold.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            fitted(tokenizer, messages, options.get("chat_template")),
            tokenize=False,
            **options,
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template refuses the messages ({error}); give it messages it knows"
        ) from error
    return text


def scored_ids(
    tokenizer: Any,
    pairs: Sequence[tuple[str | Messages, str | Messages]],
    apply_chat_template: bool,
    tools: Sequence[dict[str, Any]] = (),
) -> list[list[int]]:
    """The tokens of `scored_text` for each (prompt, completion). Raises ValueError as it does."""
    texts = [scored_text(tokenizer, p, c, apply_chat_template, tools) for p, c in pairs]
    return tokens_of(tokenizer, [text for text, _ in texts], any(special for _, special in texts))


def tokens_of(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """The whole texts' tokens, with special tokens in front where `special` says so.

    Some tokenizers put an end-of-sequence token behind every text; here nothing follows it. A text
    that begins with the beginning-of-sequence token, as one that a chat template wrote, gets no
    second one.
    """
    if not texts:
        return []
    options = {
        "truncation": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
    }
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, **options)["input_ids"]
    if special:
        probes = [
            tokenizer("a", add_special_tokens=s, **options)["input_ids"] for s in (True, False)
        ]
        with_end, own = (probe[-1:] == [tokenizer.eos_token_id] for probe in probes)
        if with_end and not own:
            ids = [row[:-1] for row in ids]
        if adds_begin(tokenizer):
            twice = [tokenizer.bos_token_id] * 2
            ids = [row[1:] if row[:2] == twice else row for row in ids]
    return ids


def adds_begin(tokenizer: Any) -> bool:
    """Whether the special tokens of a text are a beginning-of-sequence token first."""
    ids: list[int] = tokenizer("a", add_special_tokens=True)["input_ids"]
    return ids[:1] == [tokenizer.bos_token_id]


class ModelScorer:
    """A reward model in this process. Calls are served one after the other, a group a call, so that
    a score does not depend on what else is being scored."""

    def __init__(self, criterion: RewardModelCriterion) -> None:
        self.name = criterion.name
        self._criterion = criterion
        self._model: Any = None
        self._tokenizer: Any = None
        self._limit = 0  # tokens of one text; 0: nothing bounds them
        self._cure = ""  # of a text that is over it
        self._padding: int | None = None  # the model's own; a tokenizer's may end each text
        self._turn = asyncio.Lock()
        self._running: asyncio.Future[list[float]] | None = None

    async def start(self) -> None:
        """Load the model and its tokenizer, onto the GPU that this actor was given, if any.

        Raises:
            ModelError: it cannot be loaded or is no reward model.
        """
        if self._model is None:
            await asyncio.to_thread(self._load)

    async def score(
        self, prompt: Prompt, completions: Sequence[str], conversations: Conversations | None = None
    ) -> list[float]:
        """The model's scores of one group. Where there are conversations, of the whole of each if
        the model has a chat template, else of what the policy says last.

        Raises:
            RewardFailed: a text over the limit, a score that is not finite, no answer in time, a
                model that raises, as where its GPU has no memory left.
            ModelStuck: an earlier group has taken twice the time that it may take, or CUDA has
                failed, which does not mend in this process.
        """
        async with self._turn:
            if self._running is not None:  # a forward pass that ran out of time cannot be stopped
                await self._rest_of(self._running)
            self._running = asyncio.ensure_future(
                asyncio.to_thread(
                    self._scores, self._pairs(prompt, completions, conversations), prompt.tools
                )
            )
            done, _ = await asyncio.wait({self._running}, timeout=self._criterion.timeout_s)
            if not done:
                raise RewardFailed(
                    self.name,
                    RewardFailure.TIMEOUT,
                    f"no scores within {self._criterion.timeout_s:g} s for a group of "
                    f"{len(completions)}",
                )
            return self._running.result()

    async def _rest_of(self, running: asyncio.Future[list[float]]) -> None:
        done, _ = await asyncio.wait({running}, timeout=self._criterion.timeout_s)
        if not done:
            raise ModelStuck(
                f"{self.name}: one group has had the model for {2 * self._criterion.timeout_s:g} s"
            )

    async def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _load(self) -> None:
        import torch

        from actors.models.loading import load_tokenizer
        from actors.models.positions import positions_in_table
        from actors.models.reward import load_reward_model

        self._tokenizer = load_tokenizer(self._criterion.model, writes=False)
        model = load_reward_model(self._criterion.model, self._criterion.label)
        for part in model.modules():  # which remote code may know no keyword for
            own: Any = getattr(part, "config", None)
            if hasattr(own, "use_cache"):  # of keys and values, which nobody reads
                own.use_cache = False
        config = model.config.get_text_config()
        padding, vocabulary = config.pad_token_id, config.vocab_size
        self._tokens = sys.maxsize
        with suppress(NotImplementedError):  # remote code may have a table of any kind, or none
            tokens = getattr(model.get_input_embeddings(), "num_embeddings", None)
            self._tokens = tokens or sys.maxsize
        self._padding = padding if padding in range(vocabulary) else None  # also -1, of old configs
        positions = getattr(config, "max_position_embeddings", None)
        self._limit = self._criterion.max_tokens or positions or 0
        self._cure = f"max_tokens is {self._limit}; raise it if the model can read more, or"
        table = positions_in_table(model)
        if table is not None and not 0 < self._limit < table:
            self._limit, self._cure = table, f"the model reads {table};"
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def _pairs(
        self, prompt: Prompt, completions: Sequence[str], conversations: Conversations | None
    ) -> list[tuple[str | Messages, str | Messages]]:
        """What is scored: prompt and completion of each, the prompt without its null fields; a
        transcript in the form, and the turn of it without the blanks, that pairs are trained in."""
        texts = completions if conversations is None else map(text_of, conversations.answers)
        if self._criterion.reads == "completion":
            return [("", text) for text in texts]
        template = self._criterion.apply_chat_template and self._tokenizer.chat_template
        if conversations is None or not template:
            asked = without_nulls(prompt.source)
            if prompt.transcript is not None and template:
                asked, texts = prompt.transcript.spoken, [text.strip() for text in texts]
            elif prompt.transcript is not None:
                asked = prompt.transcript.written
            return [(asked, text) for text in texts]
        cut = zip(conversations.messages, conversations.asked, strict=True)
        return [(without_nulls(said[:first]), said[first:]) for said, first in cut]

    def _scores(
        self, pairs: list[tuple[str | Messages, str | Messages]], tools: Sequence[dict[str, Any]]
    ) -> list[float]:
        if self._model is None:
            raise RuntimeError("ModelScorer.score was called before start or after close")
        try:
            rows = scored_ids(
                self._tokenizer,
                pairs,
                self._criterion.renders,
                tools,
            )
        except ValueError as error:
            raise RewardFailed(self.name, RewardFailure.RAISED, str(error)) from error
        for index, ids in enumerate(rows):
            if self._limit and len(ids) > self._limit:
                raise RewardFailed(
                    self.name,
                    RewardFailure.TOO_LONG,
                    f"prompt and completion {index} are {len(ids)} tokens and {self._cure} shorten "
                    "rollout.max_prompt_length or max_completion_length",
                )
        size = self._criterion.batch_size
        scores = [
            score
            for first in range(0, len(rows), size)
            for score in self._tried(rows[first : first + size])
        ]
        for index, score in enumerate(scores):
            if not math.isfinite(score):
                raise RewardFailed(
                    self.name,
                    RewardFailure.NOT_FINITE,
                    f"the model's score for completion {index} is {score}",
                )
        return scores

    def _tried(self, rows: list[list[int]]) -> list[float]:
        """The scores of `rows`. Whatever the model raises is no score and ends no run."""
        import torch

        if (last := max(map(max, filter(None, rows)), default=0)) >= self._tokens:
            said = f"its tokenizer gives token {last}, and its table of tokens has {self._tokens}"
            raise RewardFailed(self.name, RewardFailure.RAISED, said)
        try:
            return self._forward(rows)
        except torch.OutOfMemoryError:
            pass  # what the pass held is let go with its frames, which the error has
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if "CUDA error" in said and NO_ROOM not in said:
                raise ModelStuck(f"{self.name}: {said}") from error
            if NO_ROOM not in said:
                raise RewardFailed(self.name, RewardFailure.RAISED, said) from error
        torch.cuda.empty_cache()
        cure = f"lower this reward's batch_size below {len(rows)}"
        if len(rows) == 1:
            cure = "name a smaller reward model, or lower the lengths of rollout"
        raise RewardFailed(
            self.name,
            RewardFailure.RAISED,
            f"{len(rows)} texts of up to {max(map(len, rows))} tokens do not fit the memory of its "
            f"GPU at once: {cure}, or raise reward.resources.gpus where it shares one",
        )

    def _forward(self, rows: list[list[int]]) -> list[float]:
        import torch

        from actors.models.reward import score_of

        criterion, config = self._criterion, self._model.config
        # Padding is on the right, where no earlier token sees it. A decoder's score is that of the
        # last token which is not the padding's in its config.
        pad = self._padding
        if pad is None:  # of a single text it is the last token's: no text here ends with this id
            pad = min(set(range(len(rows) + 1)) - {row[-1] for row in rows if row})
            config.get_text_config().pad_token_id = pad
        width = max(map(len, rows))
        ids = [row + [pad] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        with torch.no_grad():
            logits = self._model(
                input_ids=torch.tensor(ids, device=self._model.device),
                attention_mask=torch.tensor(mask, device=self._model.device),
            ).logits
        scored = score_of(logits.float(), config, criterion.label, criterion.output)
        scores: list[float] = scored.cpu().tolist()
        return scores
