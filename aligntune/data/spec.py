"""What the user says about the data: where it lies, what a prompt is, how it is ordered."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from actors.specs import Positive, Spec


class DataSpec(Spec):
    """Training prompts, and optionally held-out ones."""

    path: str = Field(
        description="a JSONL, JSON, CSV or Parquet file, a folder of one kind, or a hub name"
    )
    name: str | None = Field(
        None, description="configuration of a hub data set, as in gsm8k's main"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    split: str = Field("train", description="a split or a slice of one, as in train[:95%]")
    eval_path: str | None = Field(None, description="default: path, where eval_split is given")
    eval_split: str | None = Field(
        None, description="default: the only split there is, where eval_path is given"
    )
    prompt_column: str = Field("prompt", description="a string or messages ([{role, content}])")
    system_prompt: str | None = Field(None, description="first message of every prompt")
    apply_chat_template: bool = Field(
        True, description="false: prompts are strings that are already in the model's format"
    )
    max_samples: Positive | None = Field(None, description="the first rows of the training data")
    eval_samples: Positive | None = Field(None, description="the first rows of the held-out data")
    long_prompts: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="what becomes of prompts over rollout.max_prompt_length; truncate keeps the "
        "last tokens (and a leading beginning-of-sequence token), for there the question ends",
    )
    shuffle: bool = Field(True, description="a new seeded order every epoch")

    @property
    def evaluates(self) -> bool:
        """Whether held-out prompts are given."""
        return self.eval_path is not None or self.eval_split is not None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.eval_samples is not None and not self.evaluates:
            raise ValueError(
                "eval_samples says how many held-out rows to use, but nothing says which: "
                "set eval_path or eval_split (as in train[95%:])"
            )
        if self.system_prompt is not None and not self.apply_chat_template:
            raise ValueError(
                "system_prompt needs the chat template to say where it goes: "
                "set apply_chat_template: true, or write it into the prompts"
            )
        return self
