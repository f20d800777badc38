"""What a finished online run came to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aligntune.online.ledger import Books
from aligntune.runs.ended import how_it_ended


@dataclass(frozen=True)
class TrainResult:
    """What a finished run came to."""

    steps: int
    metrics: dict[str, float]  # of the last step
    books: Books
    seconds: float
    output_dir: Path
    model: Path  # save_pretrained folder
    engine: str  # the rollout engine that really ran
    backend: str  # what really loaded and stepped the policy, with versions
    already: bool = False  # it had ended before, and nothing was started

    def describe(self) -> str:
        """One line for a person."""
        books = self.books
        return (
            f"{how_it_ended(self.already)}: {self.steps} steps, {books.trained} groups trained, "
            f"{books.filtered} filtered, {books.quarantined} quarantined; the model is in "
            f"{self.model}"
        )
