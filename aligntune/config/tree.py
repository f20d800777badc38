"""Settings as a tree: read from YAML, changed by `key.path=value`, explained where wrong.

Any settings class can be made from such a tree; `config/online.py` and `config/preference.py` hold
the two that there are.
"""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from actors.settings import OneKind, OneOf
from aligntune.config.auto import tree_of
from aligntune.config.yaml_text import comment_behind, parse_yaml
from aligntune.errors import UserError, nearest, shown
from aligntune.names import same_choice


def parse_override(text: str) -> tuple[str, Any]:
    """'a.b=3' becomes ('a.b', 3); the value is read as YAML. Raises UserError without '=', and
    where the value's end would be dropped as a comment."""
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise UserError(f"{text!r} is not an override; write key.path=value")
    path = path.strip()
    read = parse_yaml(value, f"the value of {path}")
    if dropped := comment_behind(value):
        raise UserError(
            f"the value of {path}: {shown(dropped)} would be dropped as a comment of YAML; put the "
            "value in quotes, inside of those for the shell"
        )
    return path, read


def override(path: str, value: Any) -> str:
    """The override that sets `path` to this very value: what `parse_override` reads back."""
    written = yaml.safe_dump([value], default_flow_style=True, width=sys.maxsize)
    return f"{path}={written.strip()[1:-1]}"


def set_path(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `value` at a dotted path, making mappings on the way; list items go by index."""
    *parents, last = path.split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        place: Any = _index(node, key, where) if isinstance(node, list) else key
        child = node[place] if isinstance(node, list) else node.get(key)
        child = _long_form(where, child)
        if child is None:
            child = {}
        if not isinstance(child, dict | list):
            raise UserError(f"{where} is a value, not a section; {path} cannot be set")
        node[place] = child
        node = child
    if isinstance(node, list):
        node[_index(node, last, path)] = value
    elif SHORT_FORMS.get(path) == "name" and isinstance(value, str):
        node[last] = _chosen(node.get(last), value)
    else:
        node[last] = value


# What a text alone is the value of, where a mapping is meant; `*` is any index of a list. The
# sections say it themselves, which a test holds this table to: it is here as no section is known
# yet when overrides are put on top of a file.
SHORT_FORMS = {
    "algorithm": "name",
    "policy.strategy": "name",
    "critic.strategy": "name",
    "rollout.engine": "name",
    "rollout.weight_sync": "name",
    "rewards.*": "function",
}


def _chosen(before: Any, name: str) -> dict[str, Any]:
    """The choice `name`, with its options where it was chosen before; another's go with it."""
    if isinstance(before, Mapping) and same_choice(before.get("name", name), name):
        return {**before, "name": name}
    return {"name": name}


def _long_form(where: str, value: Any) -> Any:
    """The short forms `algorithm: grpo` and `rewards: [math]` as the mappings they stand for."""
    place = ".".join("*" if part.isdecimal() else part for part in where.split("."))
    if isinstance(value, str) and place in SHORT_FORMS:
        return {SHORT_FORMS[place]: value}
    return value


def _index(items: list[Any], key: str, where: str) -> int:
    if not (key.isascii() and key.isdecimal()) or int(key) >= len(items):
        raise UserError(f"{where}: {key!r} is not an index of a list of {len(items)}")
    return int(key)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file. Raises UserError with file and line."""
    try:
        if not path.is_file():
            raise UserError(f"no config file at {path}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return _sections(content, str(path))


def _sections(content: bytes, where: str) -> dict[str, Any]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error
    tree = parse_yaml(text, where)
    if tree is None:
        raise UserError(f"{where} is empty; a config is a mapping of sections, as in examples/")
    if not isinstance(tree, dict):
        raise UserError(
            f"{where}: a config is a mapping of sections, as in `train: {{steps: 10}}`, and this "
            f"is {shown(tree)}"
        )
    return tree


def tree_of_a_run(content: bytes, where: str) -> dict[str, Any]:
    """The tree in the config.yaml that a run has left at `where`. Raises UserError."""
    try:
        return _sections(content, where)
    except UserError as error:
        raise UserError(
            f"{where} is damaged ({error}), and it says which run is there: restore it from a "
            "copy, or name another folder"
        ) from error


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
    where = ".".join(str(part) for part in first["loc"])
    match first["type"]:
        case "extra_forbidden":
            text = _unknown(first["loc"], where, tree, root, algorithm_options)
        case "missing":
            text = f"{where} is missing"
        case "value_error":
            reason = first["msg"].removeprefix("Value error, ")
            text = f"{where}: {reason}" if where else reason
        case "model_type":
            text = f"{where} is a section of keys, not {shown(first['input'])}"
        case _:
            text = f"{where}: {first['msg']}, got {shown(first['input'])}"
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")


def _unknown(
    path: tuple[int | str, ...],
    where: str,
    tree: Mapping[str, Any],
    root: type[BaseModel],
    algorithm_options: Callable[[str], Iterable[str]],
) -> str:
    """What is wrong with a key that its section does not have."""
    key, inside = str(path[-1]), "".join(f"{part}." for part in path[:-1])
    if path[0] == "algorithm":
        chosen = tree["algorithm"]
        name = chosen["name"] if isinstance(chosen, Mapping) else chosen
        return f"unknown key {where!r}; {nearest(key, algorithm_options(name), inside)}"
    model: Any = root
    value: Any = tree
    annotation: Any = None
    section = ".".join(str(part) for part in path[:-1])
    for part in path[:-1]:
        value = value[part]
        if isinstance(part, int):
            annotation = typing.get_args(annotation)[0]
            marks: Iterable[Any] = getattr(annotation, "__metadata__", ())
        else:
            field = model.model_fields[part]
            annotation, marks = field.annotation, field.metadata
        choices = next((mark for mark in marks if isinstance(mark, OneOf | OneKind)), None)
        if choices is None:
            model = _section(annotation)
            continue
        chosen = choices.chosen(value)
        model = choices.table[chosen]
        if (owners := choices.owners(key)) != "none":
            return f"{where} is an option of {owners}, and {section} is {chosen}"
    if (now := getattr(model, "moved", {}).get(key)) is not None:
        return f"{where} is not a key any more; write {section}.{now}"
    return f"unknown key {where!r}; {nearest(key, model.model_fields, inside)}"


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
    return yaml.safe_dump(tree_of(config), sort_keys=False, allow_unicode=True)
