"""Conversations of models that the `renderers` library knows by name, where TRL cannot carry them.

The library has the rules of each model in code: how messages are rendered, how a turn is gone on
from, and how what was sampled is read. Invariant as in `actors.environments.tokens`, and checked at
every turn: a prompt begins with the last turn's ids.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from actors.engines.base import configured_ends
from actors.environments.chat_messages import unsendable
from actors.environments.reading import Turn, plain
from actors.environments.tokens import ChatTokens, Tools
from actors.messages import Messages
from actors.models.templates import day_is_given, given, with_roles
from actors.specs import ModelSpec

_DUMMY = [{"role": "user", "content": "dummy"}]
_ANSWER = [{"role": "tool", "name": "dummy", "content": "dummy"}]


def chat_tokens(model: ModelSpec, tools: bool = True) -> ChatTokens:
    """Those of the model that `model` names. Raises ValueError as `ChatTokens` does."""
    from actors.models.loading import load_tokenizer

    tokenizer, name = load_tokenizer(model), f"model {model.name!r}"
    stops = (*configured_ends(model), *(model.stop_token_ids or ()))
    try:
        tokens = ChatTokens(tokenizer, name, tools, stops)
    except ValueError as error:
        if (rendered := known(tokenizer, str(error), stops)) is None:
            raise
        return rendered
    why = tokens.without
    return (None if why is None else known(tokenizer, why, stops)) or tokens


def known(tokenizer: Any, why: str, stops: Collection[int] = ()) -> ChatTokens | None:
    """The tokens of a model that the library knows by its exact name; None where it is not
    installed, or does not know it, or where the chat template is given variables or a day, which
    the library does not take. `why`: what TRL says of the model; `stops` as in `ChatTokens`."""
    try:
        from renderers import AutoRendererConfig, create_renderer
        from renderers.base import MODEL_RENDERER_MAP
    except ImportError:
        return None
    if tokenizer.name_or_path not in MODEL_RENDERER_MAP:
        return None
    if given(tokenizer) or day_is_given(tokenizer):
        return None
    # Thinking stays in the history, as with TRL's training templates.
    config = AutoRendererConfig(thinking_retention="all")
    try:
        tokens = RenderedTokens(tokenizer, create_renderer(tokenizer, config), stops)
        tokens.after(tokens.prompt(_DUMMY, ()), tokenizer.encode("dummy"), _ANSWER)
    except (AssertionError, ValueError):  # it is not the tokenizer that the name promises
        return None
    tokens.notes.append(f"conversations are rendered by the renderers library, for {why}")
    return tokens


class RenderedTokens(ChatTokens):
    """The tokens of one model's conversations, by its renderer."""

    def __init__(self, tokenizer: Any, renderer: Any, stops: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = frozenset(stops)
        self._renderer = renderer
        self.notes: list[str] = []

    def prompt(self, messages: Messages, tools: Tools) -> list[int]:
        """As `ChatTokens.prompt`."""

        def render(said: Messages) -> list[int]:
            ids: list[int] = self._renderer.render_ids(
                said, tools=list(tools) or None, add_generation_prompt=True
            )
            return ids

        def write(said: Messages) -> str | None:
            try:
                text: str = self._tokenizer.decode(render(said))
            except (ValueError, TypeError, KeyError):
                return None
            return text

        messages = with_roles(messages, write)
        try:
            ids = render(messages)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"the model's renderer refuses the prompt ({error}); give it the messages that the "
                "model knows"
            ) from error
        self._check_instructions(messages, render)
        return ids

    def read(self, prompt_ids: Sequence[int], sampled: Sequence[int], tools: Tools = ()) -> Turn:
        """As `ChatTokens.read`, by the renderer's parser."""
        from renderers.base import ToolCallParseStatus

        unread = Turn(plain(self._tokenizer, self.ends, sampled), malformed=True)
        # The run may name ends that the renderer does not know.
        others = self.ends.difference(self._renderer.get_stop_token_ids())
        said = sampled[:-1] if sampled and sampled[-1] in others else sampled
        try:
            found = self._renderer.parse_response(
                list(said), prompt_ids=list(prompt_ids), tools=list(tools) or None
            )
        except RecursionError:
            return unread
        readable = {ToolCallParseStatus.OK, ToolCallParseStatus.UNKNOWN_TOOL}
        calls = found.tool_calls
        if any(call.status not in readable for call in calls):
            return unread
        message: dict[str, Any] = {"role": "assistant", "content": found.content}
        if found.reasoning_content is not None:
            message["reasoning_content"] = found.reasoning_content
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
            if unsendable(message["tool_calls"]):
                return unread
        return Turn(message)

    def after(
        self,
        prompt_ids: Sequence[int],
        sampled: Sequence[int],
        messages: Messages,
        tools: Tools = (),
        cut: bool = False,
    ) -> list[int]:
        """As `ChatTokens.after`; the renderer sees by itself whether the turn was cut."""
        try:
            found = self._renderer.bridge_to_next_turn(
                list(prompt_ids), list(sampled), messages, tools=list(tools) or None
            )
        except (TypeError, KeyError) as error:
            raise ValueError(str(error)) from error
        before = [*prompt_ids, *sampled]
        ids: list[int] | None = None if found is None else found.token_ids
        if ids is None or ids[: len(before)] != before:
            raise ValueError("the model's renderer cannot go on from what was sampled")
        return ids
