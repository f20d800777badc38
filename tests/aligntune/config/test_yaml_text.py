"""What is written in YAML is read as it stands there, or refused with its line."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from aligntune.config.tree import load_tree, override, parse_override
from aligntune.config.yaml_text import parse_yaml
from aligntune.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("2024-13-45", "2024-13-45"),
        ("017", "017"),
        ("3", 3),
        ("-0x1f", -31),
        ("1_000", 1000),
        ("1.5", 1.5),
        ("1.0e-6", 1e-6),
        ("null", None),
        ("~", None),
        ("", None),
        ("[a, 1, .5]", ["a", 1, 0.5]),
        ("{a: {b: no}}", {"a": {"b": "no"}}),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    read = parse_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3: not valid YAML: 'a' stands twice, first in line 1; keep one"),
        ("train:\n  steps: 1\ntrain:\n  seed: 2\n", "f:3: .*'train' stands twice"),
        ("a: [1, {b: 1, b: 2}]", "'b' stands twice"),
        ("a: !!timestamp abc", "not valid YAML"),
        ("a: !!int abc", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("{" * 3000, "nested too deeply|not valid YAML"),
        ("a: &x [*x]", "an alias contains itself"),
        ("a: *x", "undefined alias"),
        ("a: b: c", "f:1: not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_cannot_be_settings_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        parse_yaml(text, "f")
    assert "\n" not in str(refused.value)


def test_aliases_of_aliases_are_counted_written_out_before_they_are_made() -> None:
    lines = ["a0: &a0 [1, 1]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    with pytest.raises(UserError, match="more than 100000 values"):
        parse_yaml("\n".join(lines), "f")
    assert parse_yaml("a: &x {b: 1}\nc: *x", "f") == {"a": {"b": 1}, "c": {"b": 1}}


TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))  # PyYAML changes others
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT


@pytest.mark.slow
@given(
    st.dictionaries(
        TEXT,
        st.recursive(
            SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=12
        ),
        max_size=5,
    )
)
def test_what_is_dumped_reads_back_as_it_was(tree: dict[str, Any]) -> None:
    assert parse_yaml(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), "f") == tree


def said_of(text: str) -> str:
    """Why a text is refused; nothing where it is read."""
    try:
        parse_yaml(text, "f")
    except UserError as refused:
        return str(refused)
    return ""


@pytest.mark.slow
@given(st.text() | st.text(alphabet="[]{}:,&*!|>-?'\"# \n\tabc012.%@`<~"))
def test_any_text_is_a_value_or_one_line(text: str) -> None:
    assert "\n" not in said_of(text)


@pytest.mark.parametrize(
    "override",
    ["rewards.\u00b2=1", "rewards.5=1", "train=3", "=3", "x", "train.steps=!!timestamp a"],
)
def test_an_override_that_is_none_is_one_line(override: str) -> None:
    with pytest.raises(UserError) as refused:
        load_tree({"rewards": ["math"], "train": {}}, [override, "train.steps=1"])
    assert "\n" not in str(refused.value)


TEXTS = st.text(st.characters(exclude_categories=()))  # half characters too, as paths may have
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS


@given(PLAIN | st.lists(PLAIN))
@example("runs/try #2")
@example("runs/\U0001f600")
@example("runs/a: b, [c]")
@example(1e-6)
def test_an_override_that_is_written_here_is_read_as_the_same_value(value: Any) -> None:
    read = parse_override(override("a.b", value))
    assert read == ("a.b", value)
    assert type(read[1]) is type(value)


@pytest.mark.parametrize("text", ["runs/try #2", "#fff", "[1, 2] # two"])
def test_the_end_of_a_value_is_not_dropped_as_a_comment(text: str) -> None:
    with pytest.raises(UserError, match=r"the value of a: '#.*' would be dropped as a comment"):
        parse_override(f"a={text}")
    assert parse_override("a='x #2'") == ("a", "x #2")
    assert parse_override("a=x#2") == ("a", "x#2")
