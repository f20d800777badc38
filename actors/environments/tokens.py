"""How a conversation becomes tokens: append, and never tokenise what was sampled again.

Invariant: the ids of a turn's prompt begin with the ids of the last turn, prompt and answer, bit
for bit. What stands between two answers is cut from a dummy conversation, as TRL does it, with a
chat template that renders earlier messages the same whatever follows; there is no run with another.
Models that TRL cannot carry may be known to the renderers library: `actors.environments.rendered`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from typing import Any

from actors.environments.reading import Reader, Turn, amended, plain
from actors.messages import Messages
from actors.models.templates import check_given, fitted, unwritten

Tools = Sequence[dict[str, Any]]


class ChatTokens:
    """The tokens of one model's conversations with tools."""

    def __init__(
        self,
        tokenizer: Any,
        name: str = "the model",
        tools: bool = True,
        stops: Collection[int] = (),
    ) -> None:
        """Settle the policy for `tokenizer`, which gets a response template where it has none.
        `stops`: the ids that end a turn beside its `eos_token`, as Gemma's `<end_of_turn>`.

        `tools`: whether there are any for sure. Where they are not (an agent brings its own, or
        none), a model that cannot carry them is refused when it is told of one.

        Raises:
            ValueError: it cannot carry tools, or it cannot chat; one line says what to do.
        """
        self._tokenizer = tokenizer
        self._stops = frozenset(stops)
        self._reader: Reader | None = None  # None where `without`
        self.without: str | None = None  # why the model is told of no tools
        self.notes: list[str] = []  # what a user should know, a line each
        self._template: str | None = None  # of TRL; None: the tokenizer's own
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {name} has no chat template, so nothing says how tools are "
                "shown and called; use a model that was trained for chat and tools"
            )
        try:
            self._settle(name)
        except ValueError as error:
            if tools:
                raise
            self.without = str(error)
            self.notes = [f"an agent that offers tools will be refused: {error}"]
        if not tools:
            self._note_forks(name)

    def _settle(self, name: str) -> None:
        """See to it that tools can be carried. Raises ValueError."""
        from trl import chat_template_utils as trl

        tokenizer = self._tokenizer
        if not trl.supports_tool_calling(tokenizer):
            raise ValueError(
                f"the chat template of {name} does not render tool calls and their answers; use a "
                "model that was trained for tools, such as Qwen3, or give it such a template"
            )
        if getattr(tokenizer, "response_template", None) is None:
            try:
                trl.add_response_schema(tokenizer)
            except ValueError as error:
                raise ValueError(
                    f"nothing says how tool calls are read from what {name} writes: TRL does not "
                    "know its chat template; set response_template in its tokenizer_config.json"
                ) from error
        tokenizer.response_template = amended(tokenizer.response_template)
        try:
            reader = Reader(tokenizer, self.ends)
        except ValueError as error:
            raise ValueError(
                f"response_template in the tokenizer_config.json of {name} cannot be read ({error})"
                "; mend it, or leave it out where TRL knows the chat template"
            ) from error
        if not trl.is_chat_template_prefix_preserving(tokenizer):
            refusal = (
                f"the chat template of {name} renders earlier messages another way when more "
                "follow, so what is trained would not be what was sampled, and TRL has no training "
                "template for it; give the model a template that only appends"
            )
            try:
                template = trl.get_training_chat_template(tokenizer)
            except ValueError as error:
                raise ValueError(refusal) from error
            check_given(tokenizer, template)
            self._template = template
            self.notes.append(
                f"the chat template of {name} changes earlier messages when more follow; TRL's "
                "training template, which only appends, takes its place"
            )
        try:
            self.between([{"role": "tool", "name": "dummy", "content": "dummy"}])
        except ValueError as error:
            raise ValueError(
                f"the chat template of {name} cannot add a tool's answer to a conversation "
                f"({error}); give the model a template that only appends"
            ) from error
        self._reader = reader

    def _note_forks(self, name: str) -> None:
        """Note where an agent's further message of the user cannot follow what was sampled."""
        try:
            self.between([{"role": "user", "content": "dummy"}])
        except ValueError as error:
            self.notes.append(
                f"each further message of the user begins another row of the episode: the chat "
                f"template of {name} cannot go on with it from a sampled answer ({error})"
            )

    @property
    def ends(self) -> frozenset[int]:
        """The ids that end a turn."""
        eos = self._tokenizer.eos_token_id
        return self._stops if eos is None else self._stops | {eos}

    def prompt(self, messages: Messages, tools: Tools) -> list[int]:
        """The ids of a conversation's beginning, up to where the policy's first turn begins.

        Raises:
            ValueError: the template refuses the messages, or leaves out a system's or developer's.
        """
        from jinja2 import TemplateError

        if tools and self.without is not None:
            raise ValueError(self.without)
        render = partial(self._rendered, tools=list(tools) or None, add_generation_prompt=True)
        try:
            ids = render(messages)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the model's chat template refuses the prompt ({error}); give it the messages "
                "the template knows"
            ) from error
        self._check_instructions(messages, render)
        return ids

    def _check_instructions(
        self, messages: Messages, render: Callable[[Messages], list[int]]
    ) -> None:
        """Raise ValueError where what `render` makes lacks a system's or developer's message."""

        def write(said: Messages) -> str:
            text: str = self._tokenizer.decode(render(said))
            return text

        if lost := unwritten(messages, write):
            raise ValueError(
                f"the model's chat template leaves out {lost}; say it in a message that is carried"
            )

    def read(self, prompt_ids: Sequence[int], sampled: Sequence[int], tools: Tools = ()) -> Turn:
        """The message in the sampled ids, by the tokenizer's response template; `tools` are those
        that the prompt shows. No end of a turn is a part of it.

        What it cannot read is text, as in TRL, and `malformed`; so are calls nested too deep.
        """
        if self._reader is None:
            return Turn(plain(self._tokenizer, self.ends, sampled))
        return self._reader.read(prompt_ids, sampled)

    @cached_property
    def vocabulary(self) -> int:
        """The number after the tokenizer's greatest token id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def after(
        self,
        prompt_ids: Sequence[int],
        sampled: Sequence[int],
        messages: Messages,
        tools: Tools = (),
        cut: bool = False,
    ) -> list[int]:
        """The ids of the next turn's prompt: those of the last turn, prompt and answer, and what
        follows it: `messages` of tools or of the user. Raises ValueError as `between`."""
        return [*prompt_ids, *sampled, *self.between(messages, cut)]

    def between(self, messages: Messages, cut: bool = False) -> list[int]:
        """The ids after the end of the policy's turn up to where its next one begins: those of the
        `messages` that stand between, of tools or of the user. `cut`: a limit cut that turn, so
        they bring the end that it lacks.

        Raises:
            ValueError: the template does not append, or refuses the messages.
        """
        from jinja2 import TemplateError

        said: dict[str, Any] = {"role": "assistant", "content": ""}
        if messages[0]["role"] == "tool":
            # Some templates head an answer with the name in the call.
            call = {"name": messages[0]["name"], "arguments": {}}
            said["tool_calls"] = [{"type": "function", "function": call}]
        before = [{"role": "user", "content": "dummy"}, said]
        try:
            prefix = self._rendered(before)
            begun = len(self._rendered(before[:1], add_generation_prompt=True))
            whole = self._rendered([*before, *messages], add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(str(error)) from error
        # Where the template writes something after the end of a turn, such as a newline, that
        # belongs to what follows: the policy has not sampled it.
        ends = [i for i, token in enumerate(prefix) if token == self._tokenizer.eos_token_id]
        if not ends:  # another token ends its turns
            ends = [i for i, t in enumerate(prefix) if i >= begun and t in self._stops]
        if cut and not ends:
            raise ValueError("it does not end a turn as the policy does")
        if ends:
            prefix = prefix[: ends[-1] + (not cut)]
        if whole[: len(prefix)] != prefix:
            raise ValueError("it renders earlier messages another way when more follow")
        return whole[len(prefix) :]

    def _rendered(self, messages: Messages, **options: Any) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            fitted(self._tokenizer, messages, self._template),
            tokenize=True,
            return_dict=False,
            chat_template=self._template,
            **options,
        )
        return ids
