"""The one error of the data package: what is wrong with the user's data, where, and the cure."""

from __future__ import annotations

from aligntune.errors import UserError


class DataError(UserError):
    """The user's data cannot be used; the message is one line and says what to change."""
