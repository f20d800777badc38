"""`aligntune rewards`: what there is, what one is, and one tried as a run would call it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from actors.children.code import FunctionNotFound, import_function
from actors.scoring.criteria import RewardCriterion, RewardFailed
from actors.scoring.said import text_of
from actors.specs import RewardFunctionSpec, RewardModelSpec, RewardUrlSpec
from actors.transcript import Transcript
from aligntune import loops
from aligntune.config.tree import parse_override
from aligntune.data.errors import DataError
from aligntune.data.pairs import CHOSEN, REJECTED, PairRows
from aligntune.data.sources import Rows, load_rows, require_column
from aligntune.errors import UserError, nearest, shown
from aligntune.rewards.catalogue import REWARDS, Registered
from aligntune.rewards.options import options_of
from aligntune.rewards.registry import check_columns, resolve, resolve_model, resolve_url
from aligntune.rewards.trial import REMOTE, Group, called, why

if TYPE_CHECKING:
    from actors.scoring.model import RewardModelCriterion

TEXT_CHARACTERS = 48  # of a completion in the table of scores
GIVEN = ("prompts", "completions")


def listing() -> list[str]:
    """A line a reward: name, range, what it is."""
    name = max(map(len, REWARDS))
    width = max(len(registered.range) for registered in REWARDS.values())
    return [
        f"{key:{name}}  {registered.range:{width}}  {registered.description}"
        for key, registered in REWARDS.items()
    ]


def markdown() -> str:
    """The table of all rewards, for the documents."""
    rows = [
        "| name | what it measures | range | reads | options |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, registered in REWARDS.items():
        options = [
            f"`{option}`"
            for option in _options(registered).values()
            if option.name != "column" or not registered.column  # said once, below the table
        ]
        rows.append(
            f"| `{name}` | {registered.description} | {registered.range} | "
            f"{_reads(registered)} | {', '.join(options) or 'none'} |"
        )
    return "\n".join(rows) + "\n"


def describe(name: str) -> list[str]:
    """All that there is to know of a registered reward. Raises UserError."""
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}: {nearest(name, REWARDS)}")
    registered, options = REWARDS[name], _options(REWARDS[name])
    width = max((len(str(option)) for option in options.values()), default=0)
    lines = [f"{name}: {registered.description}", ""]
    lines += (inspect.getdoc(_function(name)) or "").splitlines()
    lines += ["", f"Reads: {_reads(registered) or 'no column'}"]
    if registered.package:
        lines.append(f"Needs: pip install {registered.package}")
    lines += ["Options:" if options else "Options: none"]
    for option in options.values():
        must = "  (must be given)" if option.required else ""
        lines.append(f"  {option!s:{width}}  {option.kind}{must}")
    return lines


def _function(name: str) -> Any:
    try:
        return import_function(REWARDS[name].target)
    except FunctionNotFound as error:
        raise UserError(str(error)) from error


def _options(registered: Registered) -> dict[str, Any]:
    return options_of(import_function(registered.target))


def _reads(registered: Registered) -> str:
    columns = [f"`{column}`" for column in (registered.column, *registered.reads) if column]
    return ", ".join(columns)


def try_reward(
    name: str,
    options: Sequence[str],
    *,
    data: str | None,
    rows: int,
    prompt: str | None,
    completions: Sequence[str],
    columns: Sequence[str],
    completion_column: str,
    timeout_s: float,
) -> Iterator[str]:
    """Lines of a table: a completion and its score each.

    Raises:
        UserError: the reward, its options, the data or the texts are wrong, or it failed on some;
            raised when all lines are out.
    """
    criterion = _criterion(name, _pairs(options, "option"), timeout_s)
    if data is None:
        if not completions:
            raise UserError("give --completion TEXT, or --data FILE with completions to score")
        groups = [Group(prompt or "", tuple(completions), _pairs(columns, "column"))]
    else:
        if prompt is not None or columns:
            raise UserError("--prompt and --column are for a try without --data; leave one out")
        loaded = load_rows(data, split=None, max_rows=rows)
        if _reads_prompt(criterion) and not {"prompt", CHOSEN, "completions"} & {*loaded.columns}:
            raise UserError(
                f"{loaded.origin}: has no column 'prompt', which reward {criterion.name!r} reads "
                f"beside completions; its columns are {', '.join(loaded.columns)}"
            )
        groups = _groups(loaded, completion_column, completions)
    for group in groups:
        try:
            check_columns(criterion, [key for key in group.columns if key not in GIVEN])
        except ValueError as error:
            raise UserError(str(error)) from error
    yield from _table(criterion, groups)


def _criterion(
    name: str, options: Mapping[str, Any], timeout_s: float
) -> RewardCriterion | RewardModelCriterion:
    """A function, a service by its URL, or a reward model by its folder. Raises UserError."""
    try:
        if "://" in name:
            # A second try has time too, however short the try is to be.
            limit = min(RewardUrlSpec.model_fields["request_timeout_s"].default, timeout_s / 2)
            url = {"url": name, "timeout_s": timeout_s, "request_timeout_s": limit, **options}
            return resolve_url(RewardUrlSpec.model_validate(url))
        if os.path.isdir(name):
            model = {"model": name, "timeout_s": timeout_s, **options}
            return resolve_model(RewardModelSpec.model_validate(model))
        spec = RewardFunctionSpec(function=name, options=dict(options), timeout_s=timeout_s)
        return resolve(spec)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{name}: option {key!r}: {first['msg']}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _table(
    criterion: RewardCriterion | RewardModelCriterion, groups: Sequence[Group]
) -> Iterator[str]:
    try:
        said = loops.run(called(criterion, groups))
    except RewardFailed as error:
        raise UserError(*why(criterion, error)) from error
    except ValueError as error:  # ModelError, which to import costs seconds
        if isinstance(criterion, RewardCriterion):
            raise
        raise UserError(str(error)) from error
    yield f"{'row':>4}  {criterion.name:>12}  completion"
    failed: list[tuple[str, str]] = []
    for row, (group, scores) in enumerate(zip(groups, said, strict=True)):
        if isinstance(scores, RewardFailed):
            reason, frames = why(criterion, scores)
            failed.append((f"row {row}: {reason}", frames))
            shown_scores = ["failed"] * len(group.completions)
        else:
            shown_scores = list(map(_number, scores))
        for completion, score in zip(group.completions, shown_scores, strict=True):
            yield f"{row:>4}  {score:>12}  {_cut(text_of(completion))}"
    if failed:
        reason, frames = failed[0]
        more = f"({len(failed)} of {len(groups)} rows failed)" if len(failed) > 1 else ""
        raise UserError(reason, frames + more)


def _number(score: float | None) -> str:
    return "abstains" if score is None else f"{score + 0.0:.6g}"  # no -0


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return (line if len(line) <= TEXT_CHARACTERS else f"{line[: TEXT_CHARACTERS - 3]}...") or "''"


def _groups(rows: Rows, column: str, given: Sequence[str]) -> list[Group]:
    """The rows of a data set; a run's samples.jsonl too. Raises UserError."""
    if "completions" in rows.columns and "columns" in rows.columns:
        return [_sampled(rows[index], rows.where(index)) for index in range(len(rows))]
    if not given:
        require_column(rows, column, "--completions, or give --completion TEXT")
    pairs = PairRows(rows) if {CHOSEN, REJECTED} <= {*rows.columns} else None
    groups = []
    for index in range(len(rows)):
        row, where, transcript = rows[index], rows.where(index), None
        if pairs is None:
            prompt = _source(row.pop("prompt", ""), where)
        else:  # as a run has them: what both sides share, and the two answers
            try:
                pair = pairs.take(index, row)
                prompt, transcript = pair.prompt, pair.both_forms(blanks=True)
            except DataError as error:
                raise UserError(f"{where}: {error}") from error
        if pairs is not None and column in (CHOSEN, REJECTED):
            own = [text_of(row[column])]
        else:
            own = [] if given else _texts(row.pop(column))
        texts = list(given) or own
        _check_texts(texts, where)
        groups.append(Group(prompt, tuple(texts), row, transcript=transcript))
    return groups


def _reads_prompt(criterion: RewardCriterion | RewardModelCriterion) -> bool:
    """Whether the reward scores a completion as the answer to its prompt."""
    if isinstance(criterion, RewardCriterion):
        return criterion.target in REMOTE
    return criterion.reads == "conversation"


def _sampled(row: Mapping[str, Any], where: str) -> Group:
    """A line of samples.jsonl, as the run's rewards got it: of an episode what was said from the
    policy's first message on. Raises UserError."""
    asked = row.get("source")
    if asked is None:  # an older run wrote only what the model sees
        asked = row.get("prompt")
    source, said, forms = _source(asked, where), row["completions"], row.get("transcript")
    transcript = None if forms is None else Transcript(**forms)
    if not any(each.get("messages") for each in said):
        texts = [each.get("text") for each in said]
        _check_texts(texts, where)
        prompt = str(row.get("prompt") or "")
        return Group(source, tuple(texts), row["columns"], rendered=prompt, transcript=transcript)
    cut = [(each.get("messages"), each.get("asked")) for each in said]
    if not all(isinstance(talk, list) and type(first) is int for talk, first in cut):
        raise UserError(
            f"{where}: not every episode has its `messages` and, as `asked`, how many stood before "
            "the model's first; they are lost, or an older aligntune wrote them: leave this row out"
        )
    return Group(
        source,
        tuple(talk[first:] for talk, first in cut),
        row["columns"],
        asked=tuple(talk[:first] for talk, first in cut),
        transcript=transcript,
    )


def _check_texts(texts: Sequence[Any], where: str) -> None:
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where}: no text to score but {shown(texts)}; name the column of completions by "
            "--completions"
        )


def _source(prompt: Any, where: str) -> Any:
    if not isinstance(prompt or "", str | list):
        raise UserError(f"{where}: its prompt is no text and no list of messages")
    return prompt or ""


def _texts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _pairs(texts: Sequence[str], what: str) -> Mapping[str, Any]:
    """KEY=VALUE each, the value as YAML has it. Raises UserError."""
    found: dict[str, Any] = {}
    for text in texts:
        if not text.partition("=")[0].strip() or "=" not in text:
            raise UserError(f"{what} {text!r}: write it as KEY=VALUE")
        key, value = parse_override(text)
        found[key] = value
    return found
