"""Rewards, tools, environments and agents that are given as Python objects: by name in the settings
tree, themselves by their place in it; and those that are named by their file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from aligntune.errors import UserError, shown

Tool = str | Callable[..., Any]
Environment = str | Callable[..., Any] | Mapping[str, str | Callable[..., Any]]
Agent = str | Callable[..., Any] | Mapping[str, Any]


def named_code(
    arguments: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Callable[..., Any]]]:
    """The arguments with every callable of `tools`, `environment` and `agent` as its
    `module:name`, and the callables by path, such as `tools.0` or `environment.NAME`.

    Raises UserError where one is neither text nor callable.
    """
    named, code = dict(arguments), {}

    def name(path: str, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not callable(value):
            raise UserError(f"{path} is neither a 'module:name' nor a callable, but {shown(value)}")
        code[path] = value
        return described(path, value)

    tools = arguments.get("tools")
    if tools is not None:
        if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
            raise UserError(f"tools is a list of functions, not {shown(tools)}")
        named["tools"] = [name(f"tools.{index}", tool) for index, tool in enumerate(tools)]
    environment = arguments.get("environment")
    if isinstance(environment, Mapping):
        named["environment"] = {
            str(key): name(f"environment.{key}", value) for key, value in environment.items()
        }
    elif environment is not None:
        named["environment"] = name("environment", environment)
    agent = arguments.get("agent")
    if agent is not None and not isinstance(agent, Mapping):
        named["agent"] = name("agent", agent)
    return named, code


def described(place: str, value: Callable[..., Any]) -> str:
    """The text that stands at `place` in the settings tree for a callable."""
    own = "__name__" if place.startswith("rewards.") else "__qualname__"
    return f"{getattr(value, '__module__', '?')}:{getattr(value, own, type(value).__name__)}"


def not_replaced(
    code: Mapping[str, Callable[..., Any]], tree: Mapping[str, Any]
) -> dict[str, Callable[..., Any]]:
    """Those of the callables, by place, that a settings tree still describes where they were put:
    an override may have named something else there."""
    named = dict(code_names(tree))
    return {place: one for place, one in code.items() if named.get(place) == described(place, one)}


def code_names(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(place in a settings tree, name) of each reward, tool, environment and agent that is named as
    `package.module:name` or `path/to/file.py:name`."""
    rewards, tools = tree.get("rewards") or [], tree.get("tools") or []
    named = {f"rewards.{i}.function": reward.get("function") for i, reward in enumerate(rewards)}
    named |= {f"tools.{i}": tool for i, tool in enumerate(tools)}
    environment = tree.get("environment")
    if isinstance(environment, Mapping):
        named |= {f"environment.{name}": value for name, value in environment.items()}
    else:
        named["environment"] = environment
    named["agent"] = tree.get("agent")
    for place, text in named.items():
        if isinstance(text, str) and ":" in text:
            yield place, text


def code_files(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(place in a settings tree, file) of those that are named by their file."""
    for place, text in code_names(tree):
        if (file := text.rpartition(":")[0]).endswith(".py"):
            yield place, file
