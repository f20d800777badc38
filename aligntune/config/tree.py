"""Settings as a tree: read from YAML, changed by `key.path=value`, explained where wrong.

Any settings class can be made from such a tree; `aligntune.config` and
`aligntune.preference_config` hold the two that there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from actors.specs import RewardFunctionSpec, RewardModelSpec
from aligntune.config.yaml_text import parse_yaml
from aligntune.errors import UserError, nearest


def parse_override(text: str) -> tuple[str, Any]:
    """'a.b=3' becomes ('a.b', 3); the value is read as YAML. Raises UserError without '='."""
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise UserError(f"{text!r} is not an override; write key.path=value")
    return path.strip(), parse_yaml(value, f"the value of {path.strip()}")


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `value` at a dotted path, making mappings on the way; list items go by index."""
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        place: Any = _index(node, key, where) if isinstance(node, list) else key
        child = node[place] if isinstance(node, list) else node.get(key)
        child = _long_form(key if depth == 0 else parents[0], child)
        if child is None:
            child = {}
        if not isinstance(child, dict | list):
            raise UserError(f"{where} is a value, not a section; {path} cannot be set")
        node[place] = child
        node = child
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    elif last == "algorithm" and not parents and isinstance(value, str):
        node[last] = {"name": value}
    else:
        node[last] = value


def _long_form(section: str, value: Any) -> Any:
    """The short forms `algorithm: grpo` and `rewards: [math]` as the mappings they stand for."""
    if not isinstance(value, str):
        return value
    match section:
        case "algorithm":
            return {"name": value}
        case "rewards":
            return {"function": value}
    return value


def _index(items: list[Any], key: str, where: str) -> int:
    if not (key.isascii() and key.isdecimal()) or int(key) >= len(items):
        raise UserError(f"{where}: {key!r} is not an index of a list of {len(items)}")
    return int(key)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file. Raises UserError with file and line."""
    if not path.is_file():
        raise UserError(f"no config file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of sections, this is {type(tree).__name__}")
    return tree


def load_tree(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """The tree of a YAML file or a mapping with the overrides on top. Raises UserError."""
    tree = read_yaml(Path(source)) if isinstance(source, str | os.PathLike) else _copy(source)
    for text in overrides:
        set_path(tree, *parse_override(text))
    return tree


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(item) for item in tree] if isinstance(tree, list) else tree


def explain(
    error: ValidationError,
    tree: Mapping[str, Any],
    root: type[BaseModel],
    algorithm_options: Callable[[str], Iterable[str]],
) -> str:
    """The first problem in one line, and how many more there are.

    `root` is what `tree` was to be; `algorithm_options` gives an algorithm's keys by its name.
    """
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    first = problems[0]
    where = ".".join(str(part) for part in _shown(first["loc"]))
    match first["type"]:
        case "extra_forbidden":
            fields = _fields_at(first["loc"][:-1], tree, root, algorithm_options)
            text = f"unknown key {where!r}; {nearest(str(first['loc'][-1]), fields)}"
        case "missing":
            text = f"{where} is missing"
        case "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            text = f"{where}: {reason}" if where else reason
        case _:
            text = f"{where}: {first['msg']}, got {first['input']!r}"
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")


def _shown(path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A path as the user wrote it: pydantic puts the kind of a reward behind its index."""
    return (*path[:2], *path[3:]) if path[:1] == ("rewards",) else path


def _fields_at(
    path: tuple[int | str, ...],
    tree: Mapping[str, Any],
    root: type[BaseModel],
    algorithm_options: Callable[[str], Iterable[str]],
) -> Iterable[str]:
    """Field names of the section at `path`."""
    model: Any = root
    if path[:1] == ("rewards",) and len(path) == 3:
        return (RewardModelSpec if path[2] == "model" else RewardFunctionSpec).model_fields
    for part in path:
        if part == "algorithm":
            chosen = tree["algorithm"]
            name = chosen["name"] if isinstance(chosen, Mapping) else chosen
            return algorithm_options(name)
        if isinstance(part, int):
            continue
        model = _section(model.model_fields[part].annotation)
    return model.model_fields


def _section(annotation: Any) -> type[BaseModel]:
    """The settings class inside an annotation such as `X`, `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        try:
            return _section(inner)
        except TypeError:
            continue
    raise TypeError(f"{annotation} holds no section")


def dump(config: BaseModel) -> str:
    """The tree as YAML that `load_config` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
