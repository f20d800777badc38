"""What the model is told of tools: typed functions with docstrings, and an environment's methods.

The contract is TRL's: a tool is a function, or a public method of an environment, with type hints
and a Google docstring; transformers makes its schema. Standard library only until a schema is made.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from actors.models.auto import import_transformers

NO_TOOLS = ("reset", "get_reward")  # public methods of an environment that the model cannot call

Tool = Callable[..., Any]


def methods(environment: Any) -> dict[str, Tool]:
    """The methods of an environment that are tools, by name, as TRL finds them.

    Raises:
        ValueError: it has no `reset`.
    """
    found = dict(inspect.getmembers(environment, predicate=inspect.ismethod))
    if "reset" not in found:
        raise ValueError(
            f"environment {type(environment).__name__} has no method reset; write "
            "reset(self, **row) -> str | None, which begins an episode"
        )
    return {
        name: method
        for name, method in found.items()
        if name not in NO_TOOLS and not name.startswith("_")
    }


def by_name(tools: Iterable[Tool], others: Mapping[str, Tool] | None = None) -> dict[str, Tool]:
    """`tools` by the name that the model calls them by, then `others`.

    Raises:
        ValueError: a tool without a name, or two of one.
    """
    named: dict[str, Tool] = {}
    for tool in tools:
        name = getattr(tool, "__name__", None)
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"tool {tool!r} has no name that can be called; define it with def")
        if name in named:
            raise ValueError(f"two tools are named {name!r}; rename one")
        named[name] = tool
    for name, tool in (others or {}).items():
        if name in named:
            raise ValueError(
                f"two tools are named {name!r}: a function and a method of the environment; "
                "rename one"
            )
        named[name] = tool
    return named


def schema(name: str, tool: Tool) -> dict[str, Any]:
    """What the chat template shows of a tool: transformers' JSON schema, as in TRL.

    Raises:
        ValueError: a parameter without a type or description, no docstring, a type that JSON lacks.
    """
    import_transformers()
    from transformers.utils import chat_template_utils
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    # It would import torch, which takes seconds, to know a torch.Tensor by sight; where nobody has
    # imported torch, no parameter is one.
    chat_template_utils.is_torch_available = lambda: sys.modules.get("torch") is not None
    if not inspect.getdoc(tool):
        raise ValueError(
            f"tool {name!r} has no docstring; write one that says what it does, with an Args "
            "section: the model reads it"
        )
    try:
        made: dict[str, Any] = get_json_schema(tool)
    except TypeHintParsingException as error:
        raise ValueError(
            f"tool {name!r}: {_one_line(error)}; give every parameter a type such as int, str, "
            "list[str] or Literal"
        ) from error
    except DocstringParsingException as error:
        raise ValueError(
            f"tool {name!r}: {_one_line(error)}; describe every parameter under Args in the "
            "docstring, Google style"
        ) from error
    except Exception as error:
        raise ValueError(f"tool {name!r}: its types cannot be read: {_one_line(error)}") from error
    return made


def description(tools: Mapping[str, Tool]) -> list[dict[str, Any]]:
    """Name, schema, and whether each tool is async, as data. Raises ValueError as `schema`."""
    return [
        {"name": name, "schema": schema(name, tool), "async": inspect.iscoroutinefunction(tool)}
        for name, tool in tools.items()
    ]


def answer_text(result: Any) -> str:
    """What the model is told of a tool's result: TRL's `str`, or the text of text blocks.

    Raises:
        ValueError: content blocks of another kind, such as images.
    """
    if isinstance(result, list) and result and all(map(_is_block, result)):
        if kinds := sorted({b["type"] for b in result} - {"text"}):
            raise ValueError(f"a tool can return text, and not {', '.join(kinds)}")
        return "".join(str(block.get("text", "")) for block in result)
    return str(result)


def _is_block(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("type"), str)


def error_text(error: str) -> str:
    """What the model is told of a call that failed, as in TRL."""
    return str({"error": error})


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
