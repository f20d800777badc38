"""What of a config differs from the defaults, for people who look at a run. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from actors.settings import is_auto
from aligntune.config.auto import AUTO


def other_than_default(config: BaseModel) -> dict[str, Any]:
    """{dotted path: default} of each key that has another value; `auto` where the machines decide
    it. A key without a default is left out; a list is one value."""
    return dict(_differing(config, None, ""))


def _differing(spec: BaseModel, usual: BaseModel | None, prefix: str) -> Iterator[tuple[str, Any]]:
    """`usual` is what the section is where nobody sets it, if that is of the same kind."""
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if type(usual) is type(spec):
            default = getattr(usual, name)
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            yield from _differing(
                value, default if isinstance(default, BaseModel) else None, f"{prefix}{name}."
            )
        elif is_auto(field):
            if name in spec.model_fields_set:
                yield f"{prefix}{name}", AUTO
        elif not field.is_required() and value != default:
            yield f"{prefix}{name}", to_jsonable_python(default)
