"""Settings that are decided by the machines unless somebody has set them: `auto`.

A field that says so (`json_schema_extra`) holds the value of a run without a GPU until it is
decided. Whether it was set is what pydantic keeps of every settings object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from actors.settings import is_auto

AUTO = "auto"
Settings = TypeVar("Settings", bound=BaseModel)


def open_settings(config: BaseModel) -> frozenset[str]:
    """The dotted paths of everything that is still to be decided."""
    return frozenset(path for path, is_set in _of_machines(config, "") if not is_set)


def settings_of_machines(config: BaseModel) -> frozenset[str]:
    """The dotted paths of everything that the machines decide where nobody sets it."""
    return frozenset(path for path, _ in _of_machines(config, ""))


def _of_machines(spec: BaseModel, prefix: str) -> Iterator[tuple[str, bool]]:
    """(path, whether it is set); what is open is not looked into."""
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        is_set = name in spec.model_fields_set
        if is_auto(field):
            yield f"{prefix}{name}", is_set
            if not is_set:
                continue
        if isinstance(value, BaseModel):
            yield from _of_machines(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _of_machines(item, f"{prefix}{name}.{index}.")


def with_open(spec: Settings, name: str, value: Any) -> Settings:
    """The settings with a value of one that stays open: it is of these machines and this start, so
    it is not written, and is decided anew wherever what is written is read."""
    made = spec.model_copy(update={name: value})
    made.model_fields_set.discard(name)
    return made


def tree_of(config: BaseModel) -> dict[str, Any]:
    """The config as plain data, `auto` where it is still to be decided."""
    tree = config.model_dump(mode="json")
    for path in open_settings(config):
        _put(tree, path, AUTO)
    return tree


def settled_tree(config: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with what is open at these paths filled in."""
    tree = tree_of(config)
    for path, value in values.items():
        _put(tree, path, value)
    return tree


def _put(tree: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    tree[last] = value
