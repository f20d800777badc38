"""Settings that the user left open and what was decided: shown, and written where they are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actors.specs import ModelSpec
from aligntune.data.dropped import Dropped
from aligntune.data.lengths import PERCENTILE, percentile_length
from aligntune.tracking.metrics import EventKind

KEPT = "as the run in output_dir has it"


@dataclass(frozen=True)
class Decision:
    """One setting that the user left open."""

    path: str  # of the config tree
    value: Any  # as config.yaml has it
    why: str

    def describe(self) -> str:
        """One line for a person."""
        return f"{self.path}={self.value}: {self.why}"


def told(decisions: Sequence[Decision], dropped: Mapping[str, Dropped]) -> list[str]:
    """Lines for a person: what was settled, and what became of rows of each data set."""
    lines = [f"settled: {decision.describe()}" for decision in decisions]
    return lines + [f"{name}: {line}" for name, rows in dropped.items() for line in rows.lines()]


def lora_note(model: ModelSpec, key: str, rate: float | None, usual: float) -> list[str]:
    """A line for a person where LoRA trains at the `usual` rate of full fine-tuning, the default.

    LoRA takes about ten times as much (Schulman et al. 2025, "LoRA Without Regret").
    """
    if model.lora is None or rate != usual:
        return []
    return [
        f"{key}={usual:g} is the default, which is for full fine-tuning; with model.lora about ten "
        f"times as much is usual: {key}={10 * usual:g}"
    ]


def events(
    decisions: Sequence[Decision], dropped: Mapping[str, Dropped]
) -> list[tuple[EventKind, dict[str, Any]]]:
    """The same for events.jsonl: kinds and fields."""
    settled = [(EventKind.SETTLED, asdict(decision)) for decision in decisions]
    return settled + [
        (EventKind.ROWS_DROPPED, {"data": name, **rows.event()})
        for name, rows in dropped.items()
        if rows.lines()
    ]


def asked_length(lengths: Collection[int], things: str, long_rows: str) -> tuple[int, str]:
    """The tokens that the data ask for, and what that is: no row is longer where none may be."""
    longest = max(lengths, default=1)
    if long_rows == "error":
        return longest, f"the longest of {len(lengths)} {things}, for data.long_rows is error"
    return percentile_length(lengths), (
        f"the {PERCENTILE}th percentile of {len(lengths)} {things}, the longest of which has "
        f"{longest} tokens"
    )
