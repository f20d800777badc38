"""What an online run is made of before it starts: its settled config, rewards and prompts.

Invariant: nothing reads a setting that the user left open before it is settled, and everything here
is checked without starting Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from actors.environments.specs import EpisodeCode
from actors.models.configuration import ModelError
from actors.models.loading import check_place, load_tokenizer
from actors.models.positions import Bound
from actors.models.templates import thinks, turn_ends
from actors.reward import Criterion
from actors.scoring.criteria import EpisodeCriterion
from actors.scoring.model import RewardModelCriterion
from actors.specs import RewardFunctionSpec
from aligntune.algorithms.base import SCORE
from aligntune.config.episodes import ENVIRONMENT, scores_itself
from aligntune.config.online import RunConfig
from aligntune.data.dropped import Dropped
from aligntune.data.held_out import ReadData
from aligntune.data.prompt_rows import PromptRows
from aligntune.data.prompts import (
    PromptSource,
    as_prompts,
    evaluation_prompts,
    training_prompts,
)
from aligntune.data.sources import many_rows
from aligntune.decisions import Decision, events, lora_note, told
from aligntune.errors import UserError
from aligntune.online.criteria import for_actors
from aligntune.online.episodes import UserCode, check_rows
from aligntune.online.first_prompt import NOTE, check_read, try_rewards
from aligntune.online.measured import measure_of
from aligntune.online.settle import bound, settle_data
from aligntune.online.settle_resources import settle_resources
from aligntune.rewards.registry import check_columns, from_callable, resolve_all
from aligntune.runs.mirror import mirror_of
from aligntune.runs.rundir import RunDir, run_of
from aligntune.template_settings import settle_template
from aligntune.tokenizer import read_tokenizer
from aligntune.tracking.advice import THINKS
from aligntune.tracking.metrics import EventKind
from aligntune.tracking.output import say
from aligntune.whole_weights import check_whole, settle_model


class RunInputs:
    """The inputs of one run, read when they are asked for, and once."""

    def __init__(self, config: RunConfig, objects: Mapping[str, Callable[..., Any]]) -> None:
        """`objects` is what was given as Python objects, by place in the config: rewards, tools,
        environments and the agent."""
        self.config = self._given = config  # settled once `settle` was called
        self.data = ReadData(config.data)
        self.objects = dict(objects)
        self._decisions: tuple[Decision, ...] | None = None
        self._start: str | None = None  # for which they are settled: auto, or a checkpoint folder
        self._of_model: tuple[Decision, ...] | None = None
        self._notes: list[str] = []  # on the tools
        self._tried: list[str] | None = None

    def check_places(self) -> None:
        """Whether rewards, model and data are where the config says: told before the seconds of
        imports that reading a model's configuration or tokenizer takes. Raises UserError."""
        if self.config.rewards:
            self._resolve()
        try:
            check_place(self.config.model)
        except ModelError as error:
            raise UserError(f"model.name: {error}") from error
        _ = self.data.training, self.data.held_out

    def of_start(self, resume: str) -> RunInputs:
        """These inputs where they may be settled for a start with `resume`; where they are settled
        for another one, new ones of the same data."""
        if self._start in (None, _start(resume)):
            return self
        anew = RunInputs(self._given, self.objects)
        of_all = {"data"}
        if self.config.model.chat_template_day is None:
            of_all |= {"tokenizer", "_rows"}  # nothing of them is settled
        vars(anew).update({name: read for name, read in vars(self).items() if name in of_all})
        return anew

    def settle(self, resume: str = "auto") -> tuple[Decision, ...]:
        """Fill in what the config leaves open, the first time; returns what was decided.

        A run that goes on keeps the values it has. Raises UserError.
        """
        if self._decisions is None:
            self._start = _start(resume)
            # Wrong names are told before data are read.
            criteria = self._resolve() if self.config.rewards else ()
            of_model = (*self.settle_model(), *self._settle_template(resume, criteria))
            asks_data = not self.config.rewards or self.config.rollout.max_prompt_length is None
            positions, bounded_by = self._bound or (None, "")
            self.config, of_data = settle_data(
                self.config,
                self._rows.lengths if asks_data else (),
                self._rows.pairs if asks_data else False,
                positions,
                _recorded(self.config, resume),
                self._itself,
                bounded_by,
            )
            self._decisions = (*of_model, *of_data)
        return self._decisions

    def settle_model(self) -> tuple[Decision, ...]:
        """Take whole weights where the config names packed ones, and the attention that the model
        needs, the first time; returns what was decided. Raises UserError where there are none."""
        if self._of_model is None:
            model, decided = settle_model(self.config.model, self.config.backend)
            self.config = self.config.model_copy(update={"model": model})
            self._of_model = decided
        return self._of_model

    def check_weights(self) -> None:
        """Whether what is trained has whole weights, and what it is held to; an evaluation needs
        none, where its engine reads others. Raises UserError."""
        self.settle_model()
        config, needs = self.config, self.config.algorithm.needs
        check_whole("model.name", config.model)
        others = {"critic": config.critic.model, "reference": config.reference.model}
        for role, other in others.items():
            if getattr(needs, role) and other:
                check_whole(f"{role}.model", config.model.renamed(other))

    def _settle_template(
        self, resume: str, criteria: tuple[Criterion, ...]
    ) -> tuple[Decision, ...]:
        """Decide by what ends a turn, and which day chat templates write, the policy's and those of
        reward models. Raises UserError."""
        config = self.config
        render = [c for c in criteria if isinstance(c, RewardModelCriterion) and c.renders]
        try:
            others = [load_tokenizer(c.model, writes=False) for c in render]
        except ModelError as error:
            raise UserError(f"rewards: {error}") from error
        self._by_template = {c.name for c, t in zip(render, others, strict=True) if t.chat_template}
        own = self.tokenizer if config.data.apply_chat_template or config.plays else None

        def before() -> Mapping[str, Any] | None:
            known = _recorded(config, resume)
            mirror = mirror_of(config.checkpoint, Path(config.output_dir).absolute())
            return mirror.config() if known is None and mirror is not None else known

        model, decided = settle_template(config.model, own, others, before)
        self.config = config.model_copy(update={"model": model})
        return decided

    def settle_resources(
        self,
        resume: str,
        elsewhere: Mapping[str, Any] | None = None,
        steps: Callable[[], int] | None = None,
    ) -> None:
        """Fill in what the roles take of the machines, where that is open.

        `elsewhere` is the config tree of the run in `checkpoint.storage`, where none is here;
        `steps` gives those of a run that is about to start. This connects to the cluster that the
        config names, if it names one. Raises UserError.
        """
        before = self.settle(resume)
        previous = _recorded(self.config, resume) or elsewhere
        self.config, decided = settle_resources(self.config, previous, steps=steps)
        self._decisions = (*before, *decided)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises UserError."""
        return read_tokenizer(self.config.model)

    @cached_property
    def _resolved(self) -> tuple[Criterion, ...]:
        """The rewards that are settled. Raises UserError."""
        self.settle()
        return self._resolve()

    def _resolve(self) -> tuple[Criterion, ...]:
        try:
            specs, objects = self.config.rewards, self.objects
            given: dict[int, Criterion] = {}
            for index, spec in enumerate(specs):
                if not isinstance(spec, RewardFunctionSpec):
                    continue
                if scores_itself(spec):
                    given[index] = EpisodeCriterion(spec.name or ENVIRONMENT, ENVIRONMENT)
                if (place := f"rewards.{index}.function") in objects:
                    given[index] = from_callable(objects[place], spec)
            found = resolve_all(specs, given)
            if any(criterion.name == SCORE for criterion in found):
                raise ValueError(f"{SCORE!r} is the sum of all; give the reward another 'name'")
            return found
        except ValueError as error:
            raise UserError(f"rewards: {error}") from error

    @cached_property
    def criteria(self) -> tuple[Criterion, ...]:
        """The rewards as the reward actors get them. Raises UserError."""
        self.settle()
        return for_actors(self._resolved, self.config, self._code)

    @cached_property
    def _code(self) -> UserCode | None:
        """The tools, environments or agent, found here; None where there are none."""
        return UserCode.of(self.config, self.objects) if self.config.plays else None

    @property
    def _itself(self) -> str | None:
        """Why the run is rewarded by what its environment or agent says, where it is."""
        return self._code.says_rewards(self.config) if self._code is not None else None

    @cached_property
    def code(self) -> EpisodeCode | None:
        """The tools, environments or agent as the environment actors get them, all checked; None
        where there are none. Raises UserError."""
        if self._code is None:
            return None
        criteria, config = self._resolved, self.config
        code, self._notes = self._code.checked(config.model, criteria, config.episodes)
        return code

    @cached_property
    def prompts(self) -> PromptSource:
        """The training prompts, all checked. Raises DataError, a UserError."""
        self.check_places()
        self.settle()
        source = training_prompts(
            self.config.data,
            self._rows,
            self.tokenizer,
            max_prompt_length=self._longest,
            seed=self.config.train.seed,
        )
        self._check_rows(source)
        return source

    def _check_rows(self, source: PromptSource, key: str = "") -> None:
        """Whether rows have what rewards and episodes read. Raises UserError, behind `key`."""
        columns = source.prompt_at(0).columns
        try:
            for criterion in self.criteria:
                check_columns(criterion, columns)
            check_read(self.criteria, self._by_template, source)
        except ValueError as error:
            raise UserError(f"{key}{error}") from error
        check_rows(self.config, source)

    def tried(self, log: Path | None = None) -> list[str]:
        """What every reward function says of the first prompt, called now, the first time.

        `log` is a file for what it prints; default: standard output. Raises UserError.
        """
        if self._tried is None:
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
            to = None if log is None else str(log)
            first = self.prompts.prompt_at(0)
            self._tried = try_rewards(self.config, self.criteria, first, to)
        return self._tried

    @cached_property
    def held_out(self) -> PromptSource | None:
        """The held-out prompts, all checked; None where the config names none. Raises DataError."""
        self.settle()
        if self.data.held_out is None:
            return None
        data, tokenizer = self.config.data, self.tokenizer
        rows = as_prompts(data, self.data.held_out, tokenizer, self._may_ask)
        source = evaluation_prompts(data, rows, tokenizer, max_prompt_length=self._longest)
        self._check_rows(source, f"data.eval_{'path' if data.eval_path else 'split'}: ")
        return source

    @property
    def measure(self) -> str:
        """What held-out figures are made by, as `runs.measure` has it; empty without held-out
        prompts."""
        config, held_out = self.config, self.held_out
        if held_out is None:
            return ""
        positions, _ = self._bound or (None, "")
        writes = config.data.apply_chat_template or config.plays
        ends = turn_ends(self.tokenizer) if writes else ()
        return measure_of(config, held_out.fingerprint, positions, ends)

    @property
    def dropped(self) -> dict[str, Dropped]:
        """What became of the rows that are not used as they are, by what they are for."""
        read = {"train": self.prompts, "eval": self.held_out}
        return {name: source.dropped for name, source in read.items() if source is not None}

    def told(self) -> list[str]:
        """What was decided and what was dropped, for a person."""
        lines = told(self.settle(), self.dropped) + self._notes
        config, usual = self.config, self.config.algorithm.defaults.learning_rate
        lines += lora_note(config.model, "policy.learning_rate", config.policy.learning_rate, usual)
        if self.thinks:
            most = config.rollout.max_completion_length
            lines.append(f"{NOTE}{THINKS}. Thoughts and answer have {most} tokens together")
        return lines

    @cached_property
    def thinks(self) -> bool:
        """Whether the model thinks before it answers, and the config could switch that off."""
        applied = self.config.data.apply_chat_template or self.config.plays
        return applied and thinks(self.tokenizer)

    def events(self) -> list[tuple[EventKind, dict[str, Any]]]:
        """The same for events.jsonl."""
        return events(self.settle(), self.dropped)

    @cached_property
    def _rows(self) -> PromptRows:
        """The training data as prompts of whatever length."""
        rows = self.data.training
        if (told := many_rows(rows)) is not None:
            say(told)
        return as_prompts(self.config.data, rows, self.tokenizer, self._may_ask)

    @property
    def _may_ask(self) -> bool:
        """Whether rows may leave the prompt to the environment or agent."""
        return self.config.environment is not None or self.config.agent is not None

    @property
    def _longest(self) -> int:
        longest = self.config.rollout.max_prompt_length
        assert longest is not None, "settled before"
        return longest

    @cached_property
    def _bound(self) -> Bound | None:
        """As far as every model reads which reads the policy's tokens; None: no bound."""
        return bound(self.config)


def _start(resume: str) -> str:
    """What a start keeps the values of: `never` differs from `auto` in what it refuses alone."""
    return "auto" if resume == "never" else resume


def _recorded(config: RunConfig, resume: str) -> dict[str, Any] | None:
    """The config tree of the run that is to go on, or None."""
    here = RunDir(Path(config.output_dir))
    if here.trained or resume in ("auto", "never"):
        return here.previous() if here.trained else None
    return run_of(Path(resume))
