"""Talks to a model on this machine: the conversation so far, and the next answer as it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.models.auto import import_light
from actors.models.caps import caps_scores
from actors.models.positions import positions_of
from actors.models.templates import give
from actors.scoring.model import tokens_of
from aligntune.errors import UserError
from aligntune.heads import writes_text
from aligntune.runs.reading import open_run

NO_ROOM = "\n(the GPU has no room, or cannot be used; on the CPU, from the beginning)\n"


class TooLong(UserError):
    """The conversation has more tokens than the model reads."""


@dataclass(frozen=True)
class Asking:
    """What makes the text of a prompt out of what a person says."""

    system: str | None = None  # the first message
    template: bool = True  # whether the chat template is applied, where the model has one
    variables: Mapping[str, Any] = field(default_factory=dict)  # for the chat template
    day: str | None = None  # for one that writes today's date

    def told(self, system: str | None) -> Asking:
        """The same with another first message; None keeps this one, and "" leaves it out."""
        return self if system is None else replace(self, system=system or None)


def model_folder(place: Path) -> Path:
    """The model of a run directory, or the folder itself. Raises UserError where it is neither."""
    if (place / "config.json").is_file():
        return place
    if (place / "model" / "config.json").is_file():
        return place / "model"
    if (place / "run" / "model" / "config.json").is_file():  # a quickstart's
        return place / "run" / "model"
    if (place / "config.yaml").is_file() and open_run(place).is_preference:
        raise UserError(
            f"{place} has no model/ yet: a job over a table writes it at its end; where it was "
            "stopped, call `aligntune train` with its config again to end it"
        )
    if (place / "checkpoints").is_dir():
        raise UserError(
            f"{place} has no model/ yet; make one of its newest checkpoint: "
            f"aligntune export {place} --out FOLDER"
        )
    raise UserError(f"{place} is neither a run with a model/ nor a model's folder")


def asked_by_run(place: Path) -> Asking:
    """How a run asked its model, by its directory, its model/ or a quickstart's; the folder of
    another model says nothing of it."""
    own = [place.absolute().parent] if place.absolute().name == "model" else []
    for run in (*own, place, place / "run"):
        if (run / "config.yaml").is_file() and (run / "events.jsonl").is_file():
            config = open_run(run).config
            model, data = config.get("model") or {}, config.get("data") or {}
            return Asking(
                data.get("system_prompt"),
                bool(data.get("apply_chat_template", True)),
                model.get("chat_template_kwargs") or {},
                model.get("chat_template_day"),
            )
    return Asking()


class Conversation:
    """One conversation with the model in `folder`.

    `temperature` 0 takes the likeliest token each time. Without a chat template the model continues
    the line as plain text, and remembers nothing. It computes on the GPU, where there is one, until
    that has no room.
    """

    def __init__(self, folder: Path, asking: Asking, temperature: float, max_tokens: int) -> None:
        """Raises UserError where the model cannot be loaded, writes no text, or cannot be told
        what it is to be told first."""
        import_light()
        import torch
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            GenerationConfig,
        )

        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise _not_loaded(folder, error) from error
        if not writes_text(config.architectures):
            what = ", ".join(config.architectures or ()) or "model of no known kind"
            raise UserError(f"the model in {folder} writes no text: it is a {what}")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="eager" if caps_scores(config) else None
            )
        except (OSError, ValueError) as error:
            raise _not_loaded(folder, error) from error
        # The folder's own may hold more than a temperature, such as a penalty of repetition.
        self._model.generation_config = GenerationConfig(
            eos_token_id=_ends(self._tokenizer, self._model.generation_config),
            pad_token_id=self._tokenizer.pad_token_id,
        )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        give(self._tokenizer, asking.variables, asking.day)
        self._folder, self._positions = folder, positions_of(config)
        self._template = asking.template and bool(self._tokenizer.chat_template)
        self._system: list[dict[str, str]] = []
        self._messages: list[dict[str, str]] = []
        self._max_tokens = max_tokens
        self._sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            self._sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        if asking.system is not None:
            if not self._template:
                who = f"the model in {folder} has" if asking.template else "the run applied"
                raise UserError(f"--system: {who} no chat template to put it in")
            self._system = [{"role": "system", "content": asking.system}]
            asked = [{"role": "user", "content": ""}]
            self._rendered(asked, "; leave --system out")  # some templates refuse it

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages.clear()

    def answer(self, text: str, say: Callable[[str], None]) -> str:
        """The answer to `text`, which `say` hears as it is made; both stay in the conversation.

        It ends where the model has no more positions. Where the GPU has no room, `say` hears so,
        and the answer anew. Raises TooLong where the model has no positions for an answer; the
        conversation is as before then.
        """
        import torch
        from transformers import TextStreamer

        class Heard(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                say(text)

        pieces: list[str] = []
        inputs = self._inputs(text)
        length, limit = inputs["input_ids"].shape[1], self._max_tokens
        if self._positions is not None:
            limit = min(limit, self._positions - length)
        if limit < 1:
            raise TooLong(
                f"the conversation has {length} tokens now, and the model reads {self._positions}; "
                "an empty line starts anew"
            )

        def generate() -> None:
            self._model.to(self._device).generate(
                **{name: tensor.to(self._device) for name, tensor in inputs.items()},
                **self._sampling,
                max_new_tokens=limit,
                streamer=Heard(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
            )

        try:
            generate()
            full = False
        except RuntimeError:  # no room for weights, a context or a library, or no kernels for it
            if self._device == "cpu":
                raise
            full = True
        if full:  # with nothing of the failed call left
            say(NO_ROOM)
            pieces.clear()
            self._device = "cpu"
            self._model.to("cpu")
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
            generate()
        said = "".join(pieces)
        self._messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": said},
        ]
        return said

    def _inputs(self, text: str) -> dict[str, Any]:
        """Token ids `[1, T]` of the conversation with `text` at its end, and their mask."""
        if self._template:
            found = self._rendered([*self._messages, {"role": "user", "content": text}])
        else:
            import torch

            ids = torch.tensor(tokens_of(self._tokenizer, [text], special=True))
            found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    def _rendered(self, messages: list[dict[str, str]], cure: str = "") -> Any:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [*self._system, *messages],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the chat template of the model in {self._folder} refuses the messages "
                f"({error}){cure}"
            ) from error


def _ends(tokenizer: Any, own: Any) -> list[int] | None:
    """The token ids that end an answer: the tokenizer's and those of the generation config `own`;
    None without one."""
    named = own.eos_token_id
    ids = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}
    return sorted(ids) or None


def _not_loaded(folder: Path, error: Exception) -> UserError:
    said = str(error).strip().splitlines()[0]
    return UserError(f"the model in {folder} cannot be loaded: {said}")
