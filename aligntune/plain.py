"""Values of data columns in the words that JSON has. Standard library only."""

from __future__ import annotations

import math
from typing import Any


def plain(value: Any) -> Any:
    """A data column as JSON holds it: what JSON has no word for as text, NaN as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
