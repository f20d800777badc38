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


WHERE = (
    "a JSONL, JSON or CSV file, gzipped (.gz) or not, a Parquet file, a glob as in data/*.jsonl, a "
    "folder of one kind, or of save_to_disk, or a hub name"
)


class SourceSpec(Spec):
    """One of several sources of the training data."""

    path: str = Field(description=WHERE)
    name: str | None = Field(None, description="configuration or subfolder, as data.name")
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    split: str = Field("train", description="a split or a slice of one, as in train[:95%]")
    weight: float | None = Field(
        None,
        gt=0,
        description="its share of what is drawn, of the sum of all weights; give one to every "
        "source or to none, which draws every row once an epoch",
    )
    max_samples: Positive | None = Field(None, description="its first rows")
    columns: dict[str, str] = Field(
        {},
        description="a column's name in the rest of the config: its name here, or column.field of "
        "what lies in it, as in {prompt: question, answer: reward_model.ground_truth}",
    )


class DatasetSpec(Spec):
    """Where rows come from, for training and held out, and which of them are used."""

    path: str | None = Field(None, description=f"{WHERE}; required, unless train is given")
    train: list[SourceSpec] | None = Field(None, description="several sources, in place of path")
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
        self._one_of_path_and_train()
        if self.eval_samples is not None and not self.evaluates:
            raise ValueError(
                "eval_samples says how many held-out rows to use, but nothing says which: "
                "set eval_path, or split and eval_split (as in train[:95%] and train[95%:])"
            )
        if self.system_prompt is not None and not self.apply_chat_template:
            raise ValueError(
                "system_prompt needs the chat template to say where it goes: "
                "set apply_chat_template: true, or write it into the prompts"
            )
        return self

    def _one_of_path_and_train(self) -> None:
        if self.path is None and not self.train:
            raise ValueError("path is missing; name the data, or several sources in train")
        if not self.train:
            return
        given = {"path", "name", "revision", "split", "max_samples"} & self.model_fields_set
        given = {key for key in given if getattr(self, key) != type(self).model_fields[key].default}
        if given:
            raise ValueError(
                f"train names the sources, and {min(given)} is given beside it; say it of a source"
            )
        weights = [source.weight for source in self.train]
        if None in weights and any(weights):
            raise ValueError(
                f"train.{weights.index(None)} has no weight and another source has; give one to "
                "every source, or to none"
            )
        if self.eval_split is not None and self.eval_path is None:
            raise ValueError(
                "eval_split is of the data in path, and train names several sources; set eval_path"
            )

    @property
    def sources(self) -> list[SourceSpec]:
        """The several sources; none where path names the data."""
        return self.train or []

    @property
    def where(self) -> str:
        """Where the training data lie; of several sources the first."""
        return self.path or self.sources[0].path

    @property
    def places(self) -> dict[str, str]:
        """Where the data lie, by key of this section."""
        named = {f"train.{number}.path": source.path for number, source in enumerate(self.sources)}
        named |= {"path": self.path} if self.path else {}
        return named | ({"eval_path": self.eval_path} if self.eval_path else {})


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
