"""What a job over a table is made of before it starts: its settled config and its tokenised rows.

Invariant: nothing reads a setting that the user left open before it is settled, and everything here
is checked without starting Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from actors.models.configuration import ModelError
from actors.models.loading import check_place
from actors.models.positions import Bound, model_bound, model_positions
from actors.scoring.criteria import RewardCriterion
from aligntune.config.preference import PreferenceConfig
from aligntune.config.warm_up import SFTSpec
from aligntune.data.dropped import Dropped
from aligntune.data.held_out import ReadData
from aligntune.data.mixture import mixed
from aligntune.data.pair_tokens import TokenisedPairs, tokenise_pairs
from aligntune.data.row_tokens import RowTokens
from aligntune.data.scored_pairs import ScoredPairs, scored_pairs
from aligntune.data.sources import Rows, many_rows
from aligntune.data.taught_forms import Columns
from aligntune.data.taught_tokens import TaughtRows, packed, tokenise_taught
from aligntune.decisions import Decision, events, lora_note, told
from aligntune.errors import UserError
from aligntune.preference.settle import beyond_note, settle_max_length
from aligntune.preference.settle_workers import settle_workers
from aligntune.preference.storage import JobStorage
from aligntune.rewards.registry import check_columns, check_names, from_callable, resolve
from aligntune.runs.rundir import RunDir
from aligntune.template_settings import settle_template
from aligntune.tokenizer import read_tokenizer
from aligntune.tracking.metrics import EventKind
from aligntune.tracking.output import say
from aligntune.whole_weights import check_whole, settle_model


class PairInputs:
    """The inputs of one job, read when they are asked for, and once."""

    def __init__(self, config: PreferenceConfig, objects: Mapping[str, Callable[..., Any]]) -> None:
        """`objects` is the rewards that were given as Python objects, by place in the config."""
        self.config = config  # settled once `settle` was called
        self.data = ReadData(config.data)
        self._objects = dict(objects)
        self._decisions: tuple[Decision, ...] | None = None
        self._of_model: tuple[Decision, ...] | None = None

    def check_places(self) -> None:
        """Whether rewards, model and data are where the config says: told before texts are scored,
        and before the seconds of imports that reading a tokenizer takes. Raises UserError."""
        _ = self.criteria
        try:
            check_place(self.config.model)
        except ModelError as error:
            raise UserError(f"model.name: {error}") from error
        _ = self.data.training, self.data.held_out

    def settle(self) -> tuple[Decision, ...]:
        """Fill in `data.max_length` where it is open, the first time; returns what was decided.

        A run that goes on keeps the value it has. Raises UserError.
        """
        if self._decisions is None:
            of_model = (*self.settle_model(), *self._settle_template())
            rundir = RunDir(Path(self.config.output_dir))
            self.config, of_length = settle_max_length(
                self.config,
                self._tokenised.lengths.values(),
                self._positions(),
                rundir.previous() if rundir.trained else None,
                self._bound,
            )
            self._decisions = (*of_model, *of_length)
        return self._decisions

    def settle_model(self) -> tuple[Decision, ...]:
        """Take whole weights where the config names packed ones, and the attention that the model
        needs, the first time; returns what was decided. Raises UserError where there are no whole
        ones, and where others are quantised."""
        if self._of_model is None:
            model, decided = settle_model(self.config.model, self.config.backend)
            check_whole("model.name", model)
            self.config = self.config.model_copy(update={"model": model})
            self._of_model = decided
        return self._of_model

    def _settle_template(self) -> tuple[Decision, ...]:
        """Decide by what ends a turn of the exported model, and which day the chat template writes.
        Raises UserError."""
        config = self.config
        if not config.data.apply_chat_template:
            return ()

        def before() -> Mapping[str, Any] | None:
            rundir = RunDir(Path(config.output_dir))
            if rundir.trained:
                return rundir.previous()
            return JobStorage(config.checkpoint.storage, rundir.path).config()

        writes = config.algorithm_name != "reward_model"
        own, others = (self.tokenizer, []) if writes else (None, [self.tokenizer])
        model, decided = settle_template(config.model, own, others, before)
        self.config = config.model_copy(update={"model": model})
        return decided

    def settle_workers(self, elsewhere: Mapping[str, Any] | None = None) -> None:
        """Fill in what the workers take of the machines, where that is open.

        `elsewhere` is the config tree of the run in `checkpoint.storage`, where none is here. This
        connects to the cluster that the config names, if it names one. Raises UserError.
        """
        before, rundir = self.settle(), RunDir(Path(self.config.output_dir))
        previous = rundir.previous() if rundir.trained else elsewhere
        self.config, decided = settle_workers(self.config, self.max_length, previous)
        self._decisions = (*before, *decided)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises UserError."""
        causal = self.config.algorithm_name != "reward_model"
        return read_tokenizer(self.config.model, causal)

    @cached_property
    def criteria(self) -> tuple[RewardCriterion, ...]:
        """The functions that score texts, where the data are texts. Raises UserError."""
        try:
            found = tuple(
                from_callable(self._objects[place], spec)
                if (place := f"rewards.{index}.function") in self._objects
                else resolve(spec)
                for index, spec in enumerate(self.config.rewards)
            )
            check_names(found)
            return found
        except ValueError as error:
            raise UserError(f"rewards: {error}") from error

    @cached_property
    def rows(self) -> Rows:
        """The training pairs as rows; formed here where they are to be made of scored texts."""
        return self._rows(self.data.training)

    @property
    def things(self) -> str:
        """What the rows are, in words."""
        return "rows" if isinstance(self.config.algorithm, SFTSpec) else "pairs"

    @cached_property
    def pairs(self) -> RowTokens:
        """The training pairs, or what is taught, all checked. Raises DataError, a UserError."""
        self.check_places()
        self.settle()
        kept = self._tokenised.within(self.max_length, self.config.data.rules)
        return kept.drawn(mixed(self.rows, kept.rows, self.config.train.seed))

    @cached_property
    def table(self) -> RowTokens:
        """What the workers go over: the rows, or sequences of them where they are packed."""
        return self._laid_out(self.pairs)

    @cached_property
    def digest(self) -> str:
        """What changes with any row of `table`, and with their order."""
        return self.table.digest()

    @cached_property
    def eval_table(self) -> RowTokens | None:
        """The same of what is held out."""
        return None if self.eval_pairs is None else self._laid_out(self.eval_pairs)

    def _laid_out(self, tokens: RowTokens) -> RowTokens:
        algorithm = self.config.algorithm
        packing = isinstance(algorithm, SFTSpec) and algorithm.packing
        return packed(tokens, self.max_length) if packing else tokens

    @cached_property
    def eval_pairs(self) -> RowTokens | None:
        """The held-out pairs, if the config names any. Raises DataError, a UserError."""
        self.settle()
        data = self.config.data
        if self.data.held_out is None:
            return None
        rows = self._rows(self.data.held_out)
        return self._tokens(rows).within(self.max_length, data.rules)

    @property
    def max_length(self) -> int:
        """Tokens of the longest pair that is trained on, once settled."""
        length = self.config.data.max_length
        assert length is not None, "settled before"
        return length

    @property
    def dropped(self) -> dict[str, Dropped]:
        """What became of the rows that are not used as they are, by what they are for."""
        found = {"train": self.pairs.dropped}
        if isinstance(self.rows, ScoredPairs):
            found = {"texts": self.rows.dropped, **found}
        return found if self.eval_pairs is None else {**found, "eval": self.eval_pairs.dropped}

    def told(self) -> list[str]:
        """What was decided and what was dropped, for a person."""
        scored = [self.rows.describe()] if isinstance(self.rows, ScoredPairs) else []
        config, key = self.config, "train.learning_rate"
        usual = config.algorithm.learning_rate
        of_lora = lora_note(config.model, key, config.train.learning_rate, usual)
        decided = told(self.settle(), self.dropped)
        long = beyond_note(self.config, self.pairs.longest, self._bound)
        return scored + decided + of_lora + long

    def events(self) -> list[tuple[EventKind, dict[str, Any]]]:
        """The same for events.jsonl."""
        return events(self.settle(), self.dropped)

    @cached_property
    def _tokenised(self) -> TokenisedPairs | TaughtRows:
        """The training pairs of whatever length."""
        return self._tokens(self.rows)

    def _positions(self) -> int | None:
        try:
            return model_positions(self.config.model)
        except ModelError as error:
            raise UserError(f"model.name: {error}") from error

    @cached_property
    def _bound(self) -> Bound | None:
        """As far as a row's numbers depend on that row alone."""
        try:
            return model_bound(self.config.model, vllm=False)
        except ModelError as error:
            raise UserError(f"model.name: {error}") from error

    def _rows(self, read: Rows) -> Rows:
        data = self.config.data
        if not self.criteria:
            return read
        given = {*read.columns} - {data.prompt_column, data.completion_column}
        try:
            for criterion in self.criteria:
                check_columns(criterion, given)
        except ValueError as error:
            raise UserError(str(error)) from error
        return scored_pairs(
            read,
            self.criteria,
            [spec.weight for spec in self.config.rewards],
            data.rules,
            prompt_column=data.prompt_column,
            completion_column=data.completion_column,
        )

    def _tokens(self, rows: Rows) -> TokenisedPairs | TaughtRows:
        data = self.config.data
        if (told := many_rows(rows)) is not None:
            say(told)
        if isinstance(self.config.algorithm, SFTSpec):
            return tokenise_taught(
                rows,
                self.tokenizer,
                columns=Columns(
                    data.messages_column,
                    data.prompt_column,
                    data.completion_column,
                    data.text_column,
                ),
                loss_on=self.config.algorithm.loss_on,
                apply_chat_template=data.apply_chat_template,
                system_prompt=data.system_prompt,
            )
        scored = isinstance(rows, ScoredPairs)
        return tokenise_pairs(
            rows,
            self.tokenizer,
            self.config.algorithm.name,
            prompt_column="prompt" if scored else data.prompt_column,
            chosen_column="chosen" if scored else data.chosen_column,
            rejected_column="rejected" if scored else data.rejected_column,
            apply_chat_template=data.apply_chat_template,
            system_prompt=data.system_prompt,
        )
