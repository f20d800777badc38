"""Small messages that many are sent of: pickled without the names of their fields."""

from __future__ import annotations

from typing import Any


class Lean:
    """A dataclass that is pickled as the values of its fields.

    Most of what crosses the driver for each group would be their names.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(vars(self).values())
