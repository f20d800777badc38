"""Talks to a model on this machine: the conversation so far, and the next answer as it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from actors.models.auto import import_light
from actors.models.templates import give
from aligntune.errors import UserError
from aligntune.runs.reading import open_run


def model_folder(place: Path) -> Path:
    """The model of a run directory, or the folder itself. Raises UserError where it is neither."""
    if (place / "config.json").is_file():
        return place
    if (place / "model" / "config.json").is_file():
        return place / "model"
    if (place / "run" / "model" / "config.json").is_file():  # a quickstart's
        return place / "run" / "model"
    if (place / "checkpoints").is_dir():
        raise UserError(
            f"{place} has no model/ yet; make one of its newest checkpoint: "
            f"aligntune export {place} --out FOLDER"
        )
    raise UserError(f"{place} is neither a run with a model/ nor a model's folder")


def variables_of_run(place: Path) -> dict[str, Any]:
    """`model.chat_template_kwargs` of a run directory, its model/ or a quickstart's; the folder of
    another model says none."""
    own = [place.absolute().parent] if place.absolute().name == "model" else []
    for run in (*own, place, place / "run"):
        if (run / "config.yaml").is_file() and (run / "events.jsonl").is_file():
            model = open_run(run).config.get("model") or {}
            return dict(model.get("chat_template_kwargs") or {})
    return {}


class Conversation:
    """One conversation with the model in `folder`.

    `temperature` 0 takes the likeliest token each time. The chat template gets `variables` too. A
    model without one continues the line as plain text, and remembers nothing.
    """

    def __init__(
        self,
        folder: Path,
        system: str | None,
        temperature: float,
        max_tokens: int,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        import_light()
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        try:
            kinds = AutoConfig.from_pretrained(folder).architectures or []
            if not any("CausalLM" in kind for kind in kinds):
                what = ", ".join(kinds) or "model of no known kind"
                raise UserError(f"the model in {folder} writes no text: it is a {what}")
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError) as error:
            said = str(error).strip().splitlines()[0]
            raise UserError(f"the model in {folder} cannot be loaded: {said}") from error
        give(self._tokenizer, variables or {})
        if system is not None and not self._tokenizer.chat_template:
            raise UserError(f"--system: the model in {folder} has no chat template to put it in")
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, str]] = []
        self._limits: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._limits |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages.clear()

    def answer(self, text: str, say: Callable[[str], None]) -> str:
        """The answer to `text`, which `say` hears as it is made; both stay in the conversation."""
        from transformers import TextStreamer

        class Heard(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                say(text)

        pieces: list[str] = []
        self._messages.append({"role": "user", "content": text})
        self._model.generate(
            **self._inputs(text),
            **self._limits,
            streamer=Heard(self._tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        said = "".join(pieces)
        self._messages.append({"role": "assistant", "content": said})
        return said

    def _inputs(self, text: str) -> dict[str, Any]:
        """Token ids `[1, T]` and their mask."""
        if self._tokenizer.chat_template:
            found = self._tokenizer.apply_chat_template(
                [*self._system, *self._messages],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            found = self._tokenizer(text, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}
