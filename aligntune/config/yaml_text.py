"""YAML as settings are written in it: each key stands once, and a value is what it looks like.

YAML 1.1 reads `yes` as true, `1:30` as 90 and `2024-01-02` as a date. Here they stay text, so that
a number that is none is refused with its key. Aliases of aliases that would fill the memory are
refused too.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from aligntune.errors import UserError

MAX_NODES = 100_000  # of a tree with every alias written out

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
"""No more than YAML 1.1 takes for numbers, so that what is dumped reads back as it was."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's idea of a scalar, which refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            if name and name != "<<" and name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r} stands twice, first in line {seen[name]}; keep one",
                    problem_mark=key.start_mark,
                )
            seen[name] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag
        not in {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp")}
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError: one line, headed by `where` and the line."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{line}: not valid YAML: {' '.join(str(problem).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where}: it is nested too deeply for settings") from error
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        raise UserError(
            f"{where}: not valid YAML: a value does not fit its tag "
            f"({' '.join(str(error).split())}); write it without !!"
        ) from error


def comment_behind(text: str) -> str:
    """The comment behind the value of a valid YAML text; empty where there is none."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    finally:
        loader.dispose()
    rest = text[0 if node is None else node.end_mark.index :].strip()
    return rest if rest.startswith("#") else ""


def _count(node: yaml.Node, known: dict[int, int], where: str) -> int:
    """The nodes of a tree with its aliases written out. Raises UserError beyond `MAX_NODES`."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise UserError(f"{where}:{node.start_mark.line + 1}: an alias contains itself")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.MappingNode):
        total += sum(_count(part, known, where) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count(part, known, where) for part in node.value)
    if total > MAX_NODES:
        raise UserError(f"{where}: it has more than {MAX_NODES} values, aliases written out")
    known[id(node)] = total
    return total
