"""What a tool is, and what is told of one that cannot be used: one line, before a run begins."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from actors.children.code import import_function, searching
from actors.environments.specs import EpisodeCode, EpisodeReward
from actors.environments.tool_episodes import check_tools
from actors.environments.tools import answer_text, by_name, description, methods, schema
from actors.specs import ModelSpec


@pytest.fixture(scope="module")
def user(user_folder: Path) -> Iterator[Any]:
    """Things of the user's module, by name."""
    with searching((str(user_folder), *sys.path)):
        yield lambda name: import_function(f"user_tools:{name}")
    del sys.modules["user_tools"]


def test_a_schema_is_transformers_own(user: Any) -> None:
    from transformers.utils import get_json_schema

    assert schema("add", user("add")) == get_json_schema(user("add"))
    guess = user("Guess")()
    assert schema("guess", guess.guess) == get_json_schema(guess.guess)


def test_a_schema_is_made_without_torch_where_nobody_has_imported_it(
    user: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    assert schema("add", user("add"))["function"]["name"] == "add"


def test_public_methods_are_tools_without_reset_and_get_reward(user: Any) -> None:
    found = methods(user("Guess")())
    assert {"guess", "meet_here", "tries_so_far"} <= set(found)
    assert not {"reset", "get_reward", "_hidden"} & set(found)
    told = {tool["name"]: tool["async"] for tool in description(found)}
    assert (told["guess"], told["meet_here"]) == (False, True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_docstring", "tool 'no_docstring' has no docstring; write one"),
        ("no_types", "missing a type hint in function no_types; give every parameter a type"),
        ("no_args", "no description for the argument 'a'; describe every parameter under Args"),
        ("odd_type", "tool 'odd_type': its types cannot be read: name 'Nowhere' is not"),
    ],
)
def test_a_tool_that_the_model_cannot_be_told_of(user: Any, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        description(by_name([user(name)]))
    assert "\n" not in str(refused.value)


def test_names(user: Any) -> None:
    with pytest.raises(ValueError, match="two tools are named 'add'; rename one"):
        by_name([user("add"), user("add")])
    with pytest.raises(ValueError, match="'add': a function and a method of the environment"):
        by_name([user("add")], methods(user("Adds")()))
    with pytest.raises(ValueError, match="has no name that can be called"):
        by_name([lambda: "x"])
    with pytest.raises(ValueError, match="environment NoReset has no method reset; write"):
        methods(user("NoReset")())


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (1.5, "1.5"),
        (None, "None"),
        ({"a": False}, "{'a': False}"),
        ([1, 2], "[1, 2]"),
        ([], "[]"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_what_the_model_is_told_of_a_result(result: Any, text: str) -> None:
    assert answer_text(result) == text


def test_an_image_is_no_answer() -> None:
    with pytest.raises(ValueError, match="a tool can return text, and not image"):
        answer_text([{"type": "image", "image": 1}])


class TestBeforeARun:
    """As the driver checks, in a process of its own."""

    @pytest.fixture
    def code(self, user_folder: Path) -> EpisodeCode:
        return EpisodeCode(("user_tools:add",), search_path=(str(user_folder),))

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"tools": ("user_tools:ad",)}, "tool 'user_tools:ad': .* has no 'ad' .did you mean"),
            ({"tools": ("user_tool:add",)}, "tool 'user_tool:add': there is no module"),
            ({"tools": ("user_tools:not_callable",)}, "is a int, not a function"),
            ({"tools": ("nowhere/tools.py:add",)}, "tool 'nowhere/tools.py:add': there is no file"),
            ({"environments": {"": "user_tools:Untyped"}}, "missing a type hint"),
            (
                {"rewards": {"both": EpisodeReward("user_tools:both", 1.0)}},
                "'both' asks for environments, and there",
            ),
        ],
    )
    @pytest.mark.slow
    def test_what_cannot_be_used(
        self, code: EpisodeCode, chat_model: ModelSpec, changes: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            check_tools(replace(code, **changes), chat_model)

    @pytest.mark.slow
    def test_an_environment_that_cannot_be_made_shows_where(
        self, code: EpisodeCode, chat_model: ModelSpec
    ) -> None:
        made = replace(code, environments={"x": "user_tools:CannotBeMade"})
        with pytest.raises(ValueError, match="environment 'x' cannot be made") as refused:
            check_tools(made, chat_model)
        assert str(refused.value).endswith("RuntimeError: no licence")

    @pytest.mark.slow
    def test_a_file_and_pickled_things_are_found_too(
        self, user_folder: Path, chat_model: ModelSpec
    ) -> None:
        class Mine:
            def reset(self) -> None: ...

            def say(self) -> str:
                """Say."""
                return "said"

        tools = (f"{user_folder}/user_tools.py:add",)
        code = EpisodeCode(tools, {"": cloudpickle.dumps(Mine)})
        (note,) = check_tools(code, chat_model)
        assert "TRL's training template" in note
