"""What a run directory says of a run that ended: whether anything is left to do, and which model
of it an evaluation scores."""

from __future__ import annotations

import os
import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from actors.specs import OptimizerSpec
from aligntune.errors import UserError
from aligntune.runs.jsonl import Row, readable
from aligntune.runs.measure import KEY, scored_by
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind
from aligntune.tracking.output import say

if TYPE_CHECKING:
    from aligntune.decisions import Decision

Origin = Literal["export", "checkpoint", "best", "start"]

# What the trained weights come from, with what is below each in the tree, beside the keys that make
# a run the same run: after the last step a change of it would train nothing, and config.yaml would
# say that it had. The rest (export, evaluation, trackers, machines) still has a use then.
TRAINED_BY = (
    "algorithm",
    "backend",
    "model.load_in_4bit",
    "rewards",
    "tools",
    "environment",
    "agent",
    "episodes.max_turns",
    "episodes.max_tool_calls",
    "episodes.max_tokens",
    "episodes.max_output_characters",
    "episodes.discount",
    "train.groups_per_minibatch",
    "train.epochs_per_batch",
    "train.max_staleness",
    "rollout.temperature",
    "rollout.max_completion_length",
    "reference.model",
    *(
        f"{part}.{key}"
        for part in ("policy", "critic", "train")
        for key in OptimizerSpec.model_fields
    ),
)


@dataclass(frozen=True)
class Scored:
    """What is scored, said before its figures."""

    model: str  # folder, hub name or URI; of a checkpoint its folder, which is to be exported
    step: int  # steps that trained it in this run
    origin: Origin
    why: str = ""  # what else there is to say of it

    @property
    def is_checkpoint(self) -> bool:
        """Whether a model is yet to be made of it."""
        return self.origin in ("checkpoint", "best")


def started_with(scored: Scored, decided: Sequence[Decision]) -> Scored:
    """`scored`, which says why it is not the model that the config names, where it is one that a
    run begins with and that was `decided`."""
    why = next((one.why for one in decided if one.path == "model.name"), None)
    return scored if scored.origin != "start" or why is None else replace(scored, why=why)


def finished_at(rundir: RunDir) -> int | None:
    """The last step of the run that ended here well, or None where none did, or where the run has
    gone back since: what it exported is then another model than the one it trains."""
    finished: int | None = None
    for event in readable(rundir.file("events.jsonl")):
        kind, step = event.get("kind"), event.get("step")
        if type(step) is not int:
            continue
        if kind == EventKind.RUN_FINISHED:
            finished = step
        elif finished is not None and goes_back(event, finished):
            finished = None
    return finished


def goes_back(event: Mapping[str, Any], reached: int) -> bool:
    """Whether an event tells of steps up to `reached` that are trained again, where it came after
    the run had reached that step."""
    kind, step = event.get("kind"), event.get("step")
    if type(step) is not int:
        return False
    if kind == EventKind.CHECKPOINT_SAVED:  # one that began anew has not resumed
        return step <= reached
    return kind == EventKind.RESUMED and step < reached


def is_over(rundir: RunDir, total_steps: int) -> bool:
    """Whether the run here has ended at `total_steps` and nothing of its config has changed since:
    there is nothing left to do."""
    ended = rundir.model.is_dir() and finished_at(rundir) == total_steps
    return ended and not rundir.changed and rundir.last_step() == total_steps


def tell_over(rundir: RunDir, total_steps: int) -> None:
    """Say that a call trains nothing, and what it cannot see."""
    say(
        f"the run in {rundir.path} has ended at step {total_steps} and its config is the same, so "
        "nothing is trained, with changed code of rewards neither: for that name another output_dir"
    )


def check_ends(
    steps: int | None, total: int, reached: int, changed: Mapping[str, tuple[Any, Any]]
) -> None:
    """Whether a config ends after what was trained, or with it and with the settings by which it
    was trained. `steps` is train.steps, `changed` what differs from the run that reached its
    checkpoint. Raises UserError."""
    key = "steps" if steps else "epochs"
    if reached > total:
        raise UserError(
            f"train.{key} makes {total} steps and the run's checkpoint is of step {reached}; raise "
            "it, or go back with --resume and an earlier checkpoint folder"
        )
    late = [
        f"{at} was {reprlib.repr(old)} there and is {reprlib.repr(new)} here"
        for path, both in changed.items()
        if any(path == own or path.startswith(f"{own}.") for own in TRAINED_BY)
        for at, old, new in _apart(path, *(map(_scores, both) if path == "rewards" else both))
    ]
    if reached == total and late:
        raise UserError(
            f"all {total} steps are trained, and {', '.join(late)}, which would train nothing any "
            f"more; raise train.{key} to go on with it, go back with --resume and an earlier "
            "checkpoint folder, or name another output_dir"
        )


def _apart(path: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The keys in which two values differ, and how; two spellings of one local path are the same,
    and an option of a reward is a path where it names a model."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _apart(f"{path}.{key}", was.get(key), now.get(key))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, both in enumerate(zip(was, now, strict=True)):
            yield from _apart(f"{path}.{index}", *both)
    elif was != now and not _spells(path, was, now):
        yield path, was, now


def _spells(path: str, was: Any, now: Any) -> bool:
    """Whether two values are two spellings of one local path."""
    may = ".options." not in path or path.endswith(".options.model")
    both = isinstance(was, str) and isinstance(now, str)
    return may and both and os.path.abspath(was) == os.path.abspath(now)


def _scores(rewards: Any) -> Any:
    """What of them is trained on. Limits, names and where a service or a judge listens are not."""
    if not isinstance(rewards, list):
        return rewards
    told = [scored_by(reward) for reward in rewards]
    for reward in told:
        reward.pop("dtype", None)
        reward.pop("url", None)
        if reward.get("function") == "judge" and "options" in reward:
            reward["options"] = {k: v for k, v in reward["options"].items() if k != "url"}
    return told


def how_it_ended(already: bool) -> str:
    """The first words of a result."""
    return "done before (a higher train.steps or train.epochs goes on)" if already else "done"


def last_figures(rundir: RunDir) -> dict[str, float]:
    """The figures of the last step, and those of its evaluation."""
    found, evaluated = [
        _last(row for row in readable(rundir.file(name)) if "step" in row)
        for name in ("metrics.jsonl", "evals.jsonl")
    ]
    found = dict(found or {"step": 0})
    if evaluated and evaluated["step"] == found["step"]:
        found |= evaluated
    return {name: value for name, value in found.items() if name not in ("step", "version", KEY)}


def _last(rows: Iterable[Row]) -> Row | None:
    found = deque(rows, maxlen=1)
    return found[0] if found else None


def said_by_roles(rundir: RunDir, key: str) -> str:
    """What the actors said last of themselves under `key`, such as `engine`."""
    rows = readable(rundir.file("events.jsonl"))
    said = [row[key] for row in rows if row.get("kind") == EventKind.ROLE_STARTED and key in row]
    return str(said[-1]) if said else ""


def model_to_score(rundir: RunDir, start: str) -> Scored:
    """The export of the run, or `start`, the model it begins with, where no step was trained.

    Raises UserError where the run has gone further than what it exported, or has gone back: neither
    would be its model.
    """
    trained, exported = rundir.last_step(), finished_at(rundir)
    if rundir.model.is_dir() and exported is not None and exported >= trained:
        return Scored(str(rundir.model), exported, "export")
    if not rundir.trained:
        return Scored(start, 0, "start")
    if not rundir.model.is_dir():
        there = "it has no model/ yet"
    elif exported is None:
        there = "its model/ may be an older one"
    else:
        there = f"its model/ is of step {exported}"
    raise UserError(
        f"the run in {rundir.path} stands at step {trained} and {there}; call `aligntune train` "
        "with its config again to end it, which writes the model, or score another model by "
        "model.name=FOLDER and an output_dir of its own"
    )
