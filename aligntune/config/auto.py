"""Settings that are decided by the machines unless somebody has set them: `auto`.

A field that says so (`json_schema_extra`) holds the value of a run without a GPU until it is
decided. Whether it was set is what pydantic keeps of every settings object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

AUTO = "auto"


def is_auto(field: FieldInfo) -> bool:
    """Whether a field is decided where it is not set."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get(AUTO))


def open_settings(config: BaseModel) -> frozenset[str]:
    """The dotted paths of everything that is still to be decided."""
    return frozenset(_open(config, ""))


def _open(spec: BaseModel, prefix: str) -> Iterator[str]:
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if is_auto(field) and name not in spec.model_fields_set:
            yield f"{prefix}{name}"
        elif isinstance(value, BaseModel):
            yield from _open(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _open(item, f"{prefix}{name}.{index}.")


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


def without_auto(tree: Any) -> Any:
    """A tree without what it leaves to be decided: keys whose value is `auto`, or a choice of that
    name without options. The address of a cluster may be `auto`, which is another thing."""
    if isinstance(tree, Mapping):
        return {
            key: without_auto(value)
            for key, value in tree.items()
            if key in ("address", "name") or value not in (AUTO, {"name": AUTO})
        }
    return [without_auto(item) for item in tree] if isinstance(tree, list) else tree
