"""`aligntune audit`, as a typer command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aligntune.commands.arguments import note


def audit(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR")]) -> int:
    """Replay a run's ledger and show that its books balance."""
    from aligntune.errors import UserError
    from aligntune.online.ledger import LedgerError
    from aligntune.online.ledger import audit as audit_log

    path = run_dir / "ledger.jsonl"
    try:
        if not path.is_file():
            raise UserError(f"no ledger at {path}; {_meant(run_dir)}")
        books = audit_log(path)
    except LedgerError as error:
        note(f"aligntune: the books do not balance: {error}")
        return 1
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    typer.echo(
        f"{books.admitted} admitted = {books.trained} trained + {books.filtered} filtered + "
        f"{books.quarantined} quarantined + {books.open} open"
    )
    return 0


def _meant(folder: Path) -> str:
    """What to do about a folder that is no online run's."""
    if below := sorted(folder.glob("*/ledger.jsonl")) + sorted(folder.glob("*/*/ledger.jsonl")):
        return f"did you mean {below[0].parent}?"
    if (folder / "metrics.jsonl").is_file():
        return "a preference job trains on every pair and keeps none"
    return "name a run directory"
