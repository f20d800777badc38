"""The one error of the data package: what is wrong with the user's data, where, and the cure."""

from __future__ import annotations

from enum import StrEnum

from aligntune.errors import UserError


class Reason(StrEnum):
    """Why a row cannot be used."""

    TOO_LONG = "too long"
    EMPTY = "empty"
    EQUAL = "equal"  # chosen and rejected, which then prefers neither
    NOT_WHOLE = "not whole"  # the chat template leaves a part out
    UNREADABLE = "unreadable"


class DataError(UserError):
    """The user's data cannot be used; the message is one line and says what to change."""

    def __init__(self, message: str, reason: Reason = Reason.UNREADABLE) -> None:
        """`reason` is what a row is counted under where the error is about one row."""
        super().__init__(message)
        self.reason = reason
