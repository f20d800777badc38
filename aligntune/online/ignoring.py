"""What is called where nobody listens. Imports nothing."""

from __future__ import annotations


def ignore(*_: object, **__: object) -> None:
    """Hears, and does nothing."""
