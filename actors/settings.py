"""What settings are made of: a frozen class that knows its keys, and a choice between several.

Light on purpose: importing this starts nothing and loads no framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

AUTO: dict[str, JsonValue] = {"auto": True}
"""Marks a field (`json_schema_extra`) that the machines decide unless somebody has set it; until
then it holds the value of a run without a GPU. To write `auto` there is to leave it open."""


def is_auto(field: FieldInfo) -> bool:
    """Whether the machines decide a field where it is not set."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and bool(extra.get("auto"))


class Spec(BaseModel):
    """A frozen settings object that knows its keys and refuses others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    moved: ClassVar[Mapping[str, str]] = {}
    """Keys that were here once, and where in the same section what they said is said now."""

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, given: Any) -> Any:
        """Leave out what is to be decided: `auto` in a field that the machines decide, or a choice
        of that name without options. In any other field `auto` is a value as any."""
        if not isinstance(given, Mapping):
            return given
        decided = {name for name, field in cls.model_fields.items() if is_auto(field)}
        return {
            key: value
            for key, value in given.items()
            if not (key in decided and value in ("auto", {"name": "auto"}))
        }


Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
"""The decay of one of Adam's means; at 1 the mean never moves."""
LOWEST_TEMPERATURE = 0.01
"""That tokens are drawn at, unless they are the likeliest: vLLM draws at it below it."""


class Choice(Spec):
    """One of several things of a kind: `name` says which one, the other fields are its options."""

    name: str


class OneKind:
    """In a field's annotation: the value is of the kind in `table` whose own key it has.

    So {function: ...} is a function and {model: ...} a model. A text alone is of the first kind:
    `math` stands for {function: math}.
    """

    def __init__(self, table: Mapping[str, type[Spec]]) -> None:
        self.table = table
        self.short = next(iter(table))  # the key that a text alone is the value of

    def parse(self, value: Any) -> Any:
        """A text or a mapping as the kind it means. Raises ValueError."""
        if isinstance(value, str):
            value = {self.short: value}
        if isinstance(value, Mapping):
            return self.table[self.chosen(value)].model_validate(dict(value))
        if isinstance(value, tuple(self.table.values())):
            return value
        kinds = " or ".join(f"{{{kind}: ...}}" for kind in self.table)
        raise ValueError(f"give a name, or {kinds}, not {value!r:.80}")

    def chosen(self, value: Mapping[str, Any]) -> str:
        """Which kind `value` is; the first where it has none of their keys. Raises ValueError."""
        given = [kind for kind in self.table if kind in value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are two kinds; give one of them")
        return given[0] if given else self.short

    def owners(self, option: str) -> str:
        """The kinds that have `option`, as text."""
        return " and ".join(k for k, s in self.table.items() if option in s.model_fields) or "none"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.parse, handler(source))


class OneOf:
    """In a field's annotation: the value is one of the choices in `table`, by its `name`.

    The name alone, as in `engine: vllm`, stands for `engine: {name: vllm}`.
    """

    def __init__(self, table: Mapping[str, type[Choice]]) -> None:
        self.table = table

    def chosen(self, value: Mapping[str, Any]) -> str:
        """Which choice `value` is."""
        return str(value["name"])

    def parse(self, value: Any) -> Any:
        """A name or a mapping as the choice it means. Raises ValueError."""
        if isinstance(value, Choice):
            return value
        names = ", ".join(self.table)
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"give one of {names}, or {{name: ...}} with its options")
        if "name" not in value:
            wanted = [f"{key} is an option of {self.owners(key)}" for key in value]
            raise ValueError("; ".join(["name is missing", *wanted, f"give one of {names}"]))
        chosen = self.table.get(value["name"]) if isinstance(value["name"], str) else None
        if chosen is None:
            raise ValueError(f"there is no {value['name']!r}; give one of {names}")
        return chosen.model_validate(dict(value))

    def owners(self, option: str) -> str:
        """The names of the choices that have `option`, as text."""
        return " and ".join(n for n, c in self.table.items() if option in c.model_fields) or "none"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            self.parse,
            handler(source),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value: value.model_dump(mode="json")
            ),
        )
