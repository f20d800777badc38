"""The options of a registered reward, as its signature has them: names, types, bounds, defaults."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, ValidationError, create_model

from aligntune.errors import shown


@dataclass(frozen=True)
class Option:
    """One option."""

    name: str
    annotation: Any
    default: Any  # inspect.Parameter.empty where it must be given

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def kind(self) -> str:
        """Its type, for a person."""
        return _kind(self.annotation)

    def __str__(self) -> str:
        return self.name if self.required else f"{self.name}={_value(self.default)}"


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of a registered reward, in order."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: Option(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def check_options(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse a value that is not of an option's type, or out of its bounds (ValueError).

    Names are checked elsewhere, as those of every function are.
    """
    known = options_of(function)
    fields: dict[str, Any] = {key: (known[key].annotation, ...) for key in given if key in known}
    config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
    model = create_model("Options", __config__=config, **{f"o_{k}": v for k, v in fields.items()})
    try:
        model.model_validate({f"o_{key}": given[key] for key in fields})
    except ValidationError as error:
        wrong = error.errors()[0]
        key = str(wrong["loc"][0]).removeprefix("o_")
        raise ValueError(
            f"reward {name!r}: option {key!r} is {shown(given[key])}, and "
            f"{known[key].kind} is wanted ({wrong['msg']})"
        ) from error


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *marks = typing.get_args(annotation)
        bounds = [
            f"{sign} {bound:g}"
            for mark in marks
            for part in getattr(mark, "metadata", ())
            for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
            if (bound := getattr(part, key, None)) is not None
        ]
        return " ".join([_kind(inner), *bounds])
    if origin is Literal:
        return " or ".join(map(str, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        return _kind(next(a for a in typing.get_args(annotation) if a is not types.NoneType))
    if origin is list:
        return f"list of {_kind(typing.get_args(annotation)[0])}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping"}
    return names.get(origin or annotation, str(annotation))


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
