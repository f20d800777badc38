"""What the user says about the data: where it lies, what a prompt is, how it is ordered."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from actors.specs import Positive, Spec
from aligntune.data.dropped import RowRules

BadRows = Annotated[
    Literal["drop", "error"],
    Field(
        description="what becomes of rows that are empty, equal or unreadable; what is dropped is "
        "counted and shown"
    ),
]
DroppedFraction = Annotated[
    float,
    Field(ge=0, le=1, description="of the rows of a data set; more of them end the run"),
]


class DatasetSpec(Spec):
    """Where rows come from, for training and held out, and which of them are used."""

    path: str = Field(
        description="a JSONL, JSON or CSV file, gzipped (.gz) or not, a Parquet file, a folder of "
        "one kind, or a hub name"
    )
    name: str | None = Field(
        None,
        description="configuration of a hub data set (as gsm8k's main) or subfolder of path",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    split: str = Field("train", description="a split or a slice of one, as in train[:95%]")
    eval_path: str | None = Field(None, description="default: path, where eval_split is given")
    eval_split: str | None = Field(
        None, description="default: the only split there is, where eval_path is given"
    )
    prompt_column: str = Field("prompt", description="a string or messages")
    chosen_column: str = Field("chosen", description="the better answer")
    rejected_column: str = Field("rejected", description="the worse one")
    system_prompt: str | None = Field(None, description="first message of every prompt")
    apply_chat_template: bool = Field(
        True, description="false: prompts are strings that are already in the model's format"
    )
    max_samples: Positive | None = Field(None, description="the first rows of the training data")
    eval_samples: Positive | None = Field(None, description="the first rows of the held-out data")
    bad_rows: BadRows = "drop"
    max_dropped_fraction: DroppedFraction = 0.1

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


class DataSpec(DatasetSpec):
    """Training prompts or preference pairs, and optionally held-out ones."""

    prompt_column: str = Field(
        "prompt",
        description="a string or messages ([{role, content}], or ShareGPT's, whose last answer is "
        "left out); default too: conversations; preference data may lack it",
    )
    chosen_column: str = Field(
        "chosen",
        description="of preference data, whose prompt is what both sides share: the better answer, "
        "which rewards get as `chosen`",
    )
    rejected_column: str = Field("rejected", description="the worse one, likewise `rejected`")
    long_rows: Literal["drop", "error", "keep_end"] = Field(
        "drop",
        description="what becomes of prompts over rollout.max_prompt_length; keep_end keeps the "
        "last tokens (and a leading beginning-of-sequence token), for there the question ends",
    )
    fold_duplicates: bool = Field(
        False,
        description="rows of one prompt become one, with the columns of the first of them",
    )
    shuffle: bool = Field(True, description="a new seeded order every epoch")

    @property
    def rules(self) -> RowRules:
        """What becomes of rows that cannot be used."""
        return RowRules(
            self.bad_rows, self.long_rows, self.max_dropped_fraction, "rollout.max_prompt_length"
        )
