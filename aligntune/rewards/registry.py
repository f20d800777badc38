"""The way from a config entry to what a reward actor runs.

Invariant: what `resolve` returns can be imported here, and takes every option it is given.
Importing this loads neither torch nor any reward.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from actors.children.code import FunctionNotFound, import_function, in_file, search_path, searching
from actors.scoring.calling import GIVEN, named_parameters
from actors.scoring.criteria import RewardCriterion
from actors.specs import ModelSpec, RewardFunctionSpec, RewardModelSpec, RewardUrlSpec
from aligntune.errors import closest
from aligntune.paths import located
from aligntune.rewards.catalogue import REWARDS
from aligntune.rewards.options import check_options, options_of

if TYPE_CHECKING:
    from actors.reward import Criterion
    from actors.scoring.model import RewardModelCriterion


def resolve(spec: RewardFunctionSpec) -> RewardCriterion:
    """What reward actors run for a registered name, a `package.module:function` or a
    `path/to/file.py:function`.

    The function is imported here once, from `sys.path` and the current folder, to find out.

    Raises:
        ValueError: unknown name (with the nearest), a function that cannot be imported (what
            failed and where it looked), an option the function does not take.
    """
    registered = REWARDS.get(spec.function)
    if registered is None and ":" not in spec.function:
        if "/" in spec.function or os.path.isdir(spec.function):
            raise ValueError(
                f"unknown reward {spec.function!r}: a reward model is given as {{model: NAME}}, by "
                "--reward-model or as reward_model_name; a function of yours as "
                "package.module:function or path/to/file.py:function"
            )
        near = closest(spec.function, REWARDS)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(
            f"unknown reward {spec.function!r}: {hint}registered are {', '.join(REWARDS)}; "
            "your own is given as package.module:function or path/to/file.py:function"
        )
    if registered and registered.library and not importlib.util.find_spec(registered.library):
        raise ValueError(
            f"reward {spec.function!r} needs {registered.package}: pip install {registered.package}"
        )
    model = spec.options.get("model")
    if registered and not registered.remote and isinstance(model, str):
        spec = spec.model_copy(update={"options": {**spec.options, "model": located(model)}})
    target, path = registered.target if registered else spec.function, search_path()
    file, _, function = target.rpartition(":")
    if file.endswith(".py"):
        try:
            target, path = in_file(file, function, path)
        except ValueError as error:
            raise ValueError(f"reward {error}") from error
    name = spec.name or (spec.function if registered else function)
    return _criterion(
        name,
        target,
        _import(target, path),
        spec,
        ignores_unknown=registered is not None,
        search_path=path,
    )


def resolve_model(spec: RewardModelSpec) -> RewardModelCriterion:
    """What reward actors run for a reward model. Its configuration is read here, not its weights.

    Raises:
        ValueError: no such model, or one that is no reward model.
    """
    from actors.models.reward import check_reward_model
    from actors.scoring.model import RewardModelCriterion

    model = ModelSpec(
        name=located(spec.model),
        revision=spec.revision,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
    )
    check_reward_model(model, spec.label)
    return RewardModelCriterion(
        name=spec.name or os.path.basename(os.path.normpath(spec.model)),
        model=model,
        batch_size=spec.batch_size,
        timeout_s=spec.timeout_s,
        max_tokens=spec.max_tokens,
        apply_chat_template=spec.apply_chat_template,
        label=spec.label,
        output=spec.output,
        reads=spec.reads,
    )


def resolve_url(spec: RewardUrlSpec) -> RewardCriterion:
    """What reward actors run for a service over HTTP, which is not asked here. Raises ValueError
    for limits that do not go together."""
    options = spec.model_dump(exclude={"name", "weight", "timeout_s"})
    name = spec.name or urlsplit(spec.url).hostname or spec.url
    check_tries(name, spec.timeout_s, spec.request_timeout_s, spec.retries)
    return RewardCriterion(
        name=name,
        target="aligntune.rewards.remote:remote_scores",
        timeout_s=spec.timeout_s,
        options=options,
        search_path=search_path(),
        hidden=tuple(options),
    )


def resolve_all(
    specs: Sequence[RewardFunctionSpec | RewardModelSpec | RewardUrlSpec],
    given: Mapping[int, Criterion] | None = None,
) -> tuple[Criterion, ...]:
    """`resolve`, `resolve_model` or `resolve_url` for each of a run's rewards, in order; those that
    are resolved already are `given` by their index.

    Raises:
        ValueError: as these, or two of them have the same name in metrics.
    """
    known = given or {}
    criteria = tuple(
        known[index]
        if index in known
        else resolve_model(spec)
        if isinstance(spec, RewardModelSpec)
        else resolve_url(spec)
        if isinstance(spec, RewardUrlSpec)
        else resolve(spec)
        for index, spec in enumerate(specs)
    )
    check_names(criteria)
    return criteria


def check_tries(name: str, timeout_s: float, request_timeout_s: float, retries: int) -> None:
    """Raises ValueError where the time of a group ends before a request is made again that has no
    answer: then no try comes to its end, and nothing says why."""
    if retries and request_timeout_s >= timeout_s:
        raise ValueError(
            f"reward {name!r}: its timeout_s={timeout_s:g}, for a group with all tries, leaves no "
            f"time for a second one where request_timeout_s={request_timeout_s:g}; raise timeout_s "
            f"(all {retries + 1} tries have {request_timeout_s * (retries + 1):g} s), or lower "
            "request_timeout_s"
        )


def check_names(criteria: Sequence[Criterion]) -> None:
    """Raises ValueError where two rewards have the same name in metrics."""
    names = [criterion.name for criterion in criteria]
    for name, count in Counter(names).items():
        if count > 1:
            second = names.index(name, names.index(name) + 1)
            raise ValueError(
                f"{count} rewards are named {name!r}; give each its own 'name', as by "
                f"rewards.{second}.name=OTHER (in Python overrides=['rewards.{second}.name=OTHER'])"
            )


def from_callable(function: Callable[..., Any], spec: RewardFunctionSpec) -> RewardCriterion:
    """What reward actors run for a function object, a lambda or closure too (by cloudpickle).

    `spec.function` only describes it.

    Raises:
        ValueError: it cannot be pickled, or does not take one of `spec.options`.
    """
    from ray import cloudpickle  # Ray: seconds, and only needed here

    own_name: str = getattr(function, "__name__", type(function).__name__)
    name = spec.name or own_name
    try:
        pickled: bytes = cloudpickle.dumps(function)
    except Exception as error:
        raise ValueError(f"reward {name!r} cannot be sent to its process: {error}") from error
    return _criterion(
        name, pickled, function, spec, ignores_unknown=False, search_path=search_path()
    )


def columns_named(criterion: Criterion) -> dict[str, bool]:
    """The data columns that a criterion asks for by name, and whether it cannot do without."""
    if not isinstance(criterion, RewardCriterion):
        return {}
    by_target = {registered.target: registered for registered in REWARDS.values()}
    registered = by_target.get(criterion.target) if isinstance(criterion.target, str) else None
    if registered is not None:
        column = criterion.options.get("column", registered.column)
        own = {column: True} if column else {}
        return own | dict.fromkeys(registered.reads, True)
    named, _ = named_parameters(_function_of(criterion))
    given = {*GIVEN, *criterion.options}
    return {name: required for name, required in named.items() if name not in given}


def takes_every_column(criterion: RewardCriterion) -> bool:
    """Whether a function of the user's own takes any column, by `**kwargs`."""
    if criterion.target in {registered.target for registered in REWARDS.values()}:
        return False
    return named_parameters(_function_of(criterion))[1]


def check_columns(criterion: Criterion, columns: Collection[str]) -> None:
    """Refuse, before anything starts, a criterion that needs a column the data do not have, or
    data with a column that is named as an argument every reward gets. A reward model needs none.

    Args:
        columns: every data column but the prompt's.

    Raises:
        ValueError: naming the column and those that exist.
    """
    if not isinstance(criterion, RewardCriterion):
        return
    for name in GIVEN:
        if name in columns:
            raise ValueError(
                f"the data have a column {name!r}, and reward {criterion.name!r} gets an argument "
                "of that name as every reward does; rename the column"
            )
    for name, required in columns_named(criterion).items():
        if required and name not in columns and name.partition(".")[0] not in columns:
            raise ValueError(
                f"reward {criterion.name!r} needs column {name!r}, which the data lack; their "
                f"columns are {', '.join(map(repr, sorted(columns))) or 'none'}"
            )
        if name in criterion.hidden:
            raise ValueError(
                f"reward {criterion.name!r} cannot read column {name!r}, which is the name of one "
                "of its options; rename the column"
            )


def _criterion(
    name: str,
    target: str | bytes,
    function: Callable[..., Any],
    spec: RewardFunctionSpec,
    *,
    ignores_unknown: bool,
    search_path: tuple[str, ...],
) -> RewardCriterion:
    """`ignores_unknown`: its `**kwargs` are for data columns, so an option there is a slip."""
    named, takes_all = named_parameters(function)
    options = [option for option in named if option not in GIVEN]
    for option in spec.options:
        if option not in options and (ignores_unknown or not takes_all):
            near = closest(option, options)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"reward {name!r} takes no option {option!r}{hint}")
    if ignores_unknown:
        for option, required in named.items():
            if required and option in options and option not in spec.options:
                raise ValueError(f"reward {name!r} needs option {option!r}")
        check_options(name, function, spec.options)
        known = options_of(function)
        if {"request_timeout_s", "retries"} <= known.keys():
            given = {key: option.default for key, option in known.items()} | spec.options
            check_tries(name, spec.timeout_s, given["request_timeout_s"], given["retries"])
    return RewardCriterion(
        name=name,
        target=target,
        timeout_s=spec.timeout_s,
        options=dict(spec.options),
        search_path=search_path,
        workers=spec.workers,
        # What is no option of ours is a column. A column of an option's name is not that option.
        hidden=tuple(options) if ignores_unknown else (),
        thoughts=_path_of(function) in {own.target for own in REWARDS.values() if own.thoughts},
    )


def _path_of(function: Callable[..., Any]) -> str:
    """Where a function is defined, however it was named."""
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"


def _import(target: str, path: tuple[str, ...]) -> Callable[..., Any]:
    with searching(path):
        try:
            return import_function(target)
        except FunctionNotFound as error:
            raise ValueError(f"reward {error}") from error


def _function_of(criterion: RewardCriterion) -> Callable[..., Any]:
    if isinstance(criterion.target, str):
        return _import(criterion.target, criterion.search_path)
    from ray import cloudpickle

    function: Callable[..., Any] = cloudpickle.loads(criterion.target)
    return function
