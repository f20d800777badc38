"""What `aligntune evaluate` does: which trainer and model are meant, and what is kept of it."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aligntune.config.tree import load_tree, override
from aligntune.errors import UserError
from aligntune.evaluation.answers import reader_of
from aligntune.evaluation.statistics import CONFIDENCE
from aligntune.evaluation.store import EVALUATIONS, Decoded, Summary, check_place
from aligntune.evaluation.summary import Row, figures, judged, read_success
from aligntune.names import algorithm_of, preference_name
from aligntune.runs.choice import NEWEST, START
from aligntune.runs.ended import Scored, model_to_score
from aligntune.runs.rundir import RunDir, installed_versions
from aligntune.trainers import create_rl_trainer

if TYPE_CHECKING:
    from aligntune.online.trainer import OnlineTrainer
    from aligntune.preference.trainer import PreferenceTrainer


class Told(Protocol):
    """Who hears how far an evaluation is."""

    def stage(self, text: str) -> None:
        """Something of the start is done."""

    def heard(self, decoding: str, done: int, total: int) -> None:
        """`done` of `total` prompts have their completions and scores."""


@dataclass(frozen=True)
class Target:
    """What is to be evaluated."""

    trainer: OnlineTrainer | PreferenceTrainer
    run: Path | None  # None: a model that is of no run
    model: str | None = None
    written: Scored | None = None  # by a job over a table, whose model the trainer's config names


def target_of(target: str, config: Path | None, overrides: Sequence[str]) -> Target:
    """A run directory, a config file, or with `config` a model or the run of a job over a table.
    Raises UserError."""
    place = Path(target)
    inside = next((p for p in (place, place / "run") if (p / "config.yaml").is_file()), None)
    if config is not None:
        if inside is not None:
            written = _written_by_job(inside)
            return Target(_sampling(config, written.model, overrides), inside, written=written)
        if place.is_file():
            raise UserError(f"--config goes with a model; {target} has a config of its own")
        return Target(_sampling(config, target, overrides), None, target)
    if inside is not None:
        own = [override("output_dir", str(inside.absolute())), *overrides]
        return Target(create_rl_trainer(config=inside / "config.yaml", overrides=own), inside)
    if place.is_file():
        trainer = create_rl_trainer(config=place, overrides=overrides)
        return Target(trainer, Path(trainer.config.output_dir))
    raise UserError(
        f"{target} is neither a run directory nor a config; of a model say with --config which "
        "data and rewards it is evaluated by"
    )


def _written_by_job(run: Path) -> Scored:
    """The language model that a DPO or SFT job has written. Raises UserError."""
    tree = load_tree(run / "config.yaml")
    kind = preference_name(algorithm_of(tree))
    if kind is None:
        raise UserError(
            f"--config goes with a model; {run} has data and rewards of its own. Take its model by "
            f"{run / 'model'}"
        )
    if kind == "reward_model":
        raise UserError(
            f"{run} has a reward model, which writes no completions; without --config it is "
            "evaluated by its pairs"
        )
    return model_to_score(RunDir(run.absolute()), tree["model"]["name"])


def _sampling(config: Path, model: str, overrides: Sequence[str]) -> OnlineTrainer:
    """The trainer of a config with prompts and rewards, for another model. Raises UserError."""
    from aligntune.online.trainer import OnlineTrainer

    section = load_tree(config).get("model")
    same = isinstance(section, Mapping) and section.get("name") == model
    of_model = ("model.revision", "model.stop_token_ids")  # they are of the config's own model
    other = [] if same else [override(path, None) for path in of_model]
    named = [*other, *overrides, override("model.name", model)]
    trainer = create_rl_trainer(config=config, overrides=named)
    if not isinstance(trainer, OnlineTrainer):
        raise UserError(
            f"{config} is of a job over a table, and --config is to say which prompts and rewards; "
            f"of its table: aligntune evaluate {config} model.name={model} output_dir=NEW"
        )
    return trainer


def evaluated(
    target: Target,
    which: str,
    samples: int | None,
    temperature: float | None,
    success: str | None,
    out: Path | None,
    told: Told,
) -> tuple[Summary, list[Row], Path]:
    """Evaluate; returns the summary, its rows, and the folder that a folder with both belongs in.
    Raises UserError, also where nothing can be written there, before anything starts."""
    from aligntune.online.evaluating import decodings
    from aligntune.online.trainer import OnlineTrainer

    trainer = target.trainer
    assert isinstance(trainer, OnlineTrainer)
    in_run = target.run is not None and RunDir(target.run).config.is_file()
    own_place = target.run / EVALUATIONS if in_run and target.run is not None else Path(EVALUATIONS)
    place = (own_place if out is None else out).absolute()
    check_place(place)
    if target.model is not None and which != NEWEST:
        raise UserError(f"--checkpoint {which} is of a run, and {target.model} is a model")
    if target.written is not None and which != NEWEST:
        raise UserError(f"--checkpoint {which}: a job over a table has one model, the last one")
    if target.written is not None and target.written.origin != "start":
        scored = target.written
    else:  # the model that the trainer's config names is a job's that has trained none
        own = target.model is None and target.written is None
        scored = trainer.scored(which if own else START)
    origin = "model" if target.model is not None else scored.origin
    step = None if target.model is not None else scored.step
    of = "" if step is None else f", step {step}"
    told.stage(f"evaluating {scored.model} ({origin}{of}{scored.why and f': {scored.why}'})")
    passes = read_success(success, [criterion.name for criterion in trainer.criteria])
    ways = decodings(trainer.config, samples, temperature)
    began = time.monotonic()
    rows = trainer.evaluated(scored, ways, told.heard, told.stage)
    config = trainer.config
    reader, read = reader_of(config.rewards[0])
    told.stage("computing the figures")
    rows = [judged(row, passes, reader) for row in rows]
    seed = config.train.seed
    name = Path(scored.model).name if step is None else f"{origin}-{step:06d}"
    summary = Summary(
        name=name,
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=scored.model,
        origin=origin,
        step=step,
        run=None if target.run is None else str(target.run.absolute()),
        data=f"{config.data.eval_path or config.data.path}"
        + (f" [{config.data.eval_split}]" if config.data.eval_split else ""),
        prompts=len(trainer.eval_prompts),
        failed=sum("failed" in row for row in rows),
        success=passes,
        weights={
            criterion.name: spec.weight
            for criterion, spec in zip(trainer.criteria, config.rewards, strict=True)
        },
        answers=read,
        confidence=CONFIDENCE,
        seed=seed,
        seconds=round(time.monotonic() - began, 3),
        versions=[f"{name} {version}" for name, version in installed_versions().items()],
        decodings={
            way: Decoded(
                completions=decoding.completions,
                temperature=decoding.temperature,
                figures=figures([row for row in rows if row["decoding"] == way], seed),
            )
            for way, decoding in ways.items()
        },
    )
    return summary, rows, place
