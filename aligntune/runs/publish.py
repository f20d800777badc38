"""What becomes of a trained model at the end of a run: its card, and a copy on the hub if that was
asked for.

Invariant: neither ends a run. What fails is one line and an event. The hub's token is the
client's own (HF_TOKEN or a login); it is written nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from aligntune.config.records import HubSpec
from aligntune.errors import UserError
from aligntune.report.card import write_card
from aligntune.runs.deadline import asked
from aligntune.runs.reading import open_run
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind


class Records(Protocol):
    """Who hears what became of it."""

    def wait(self) -> None:
        """Until all that was recorded is on disk."""

    def event(self, kind: EventKind, **fields: str) -> None:
        """Write an event."""

    def note(self, text: str) -> None:
        """Show something to the person who watches."""


def check_hub(spec: HubSpec) -> None:
    """Whether there is a token to push with, before anything starts. Raises UserError."""
    if spec.push_to is None:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError(
            f"hub.push_to={spec.push_to} needs a token; set HF_TOKEN or call `hf auth login`, or "
            "remove it"
        )


def write_card_of(rundir: RunDir, step: int, records: Records) -> None:
    """Write the card of the run's model, or say why not. A folder without a config is no run."""
    if not rundir.config.is_file():
        return

    def write() -> None:
        records.wait()
        write_card(open_run(rundir.path), rundir.model, step)

    _tried(write, 60.0, lambda reason: records.event(EventKind.CARD_FAILED, reason=reason))


def push(rundir: RunDir, spec: HubSpec, records: Records) -> None:
    """Copy the run's model to the hub where the config says so, or say why not."""
    name = spec.push_to
    if name is None:
        return
    pushed: list[str] = []
    _tried(
        lambda: pushed.append(pushed_to(rundir.model, name, spec.private)),
        spec.timeout_s,
        lambda reason: records.event(EventKind.NOT_PUSHED, name=name, reason=reason),
    )
    for url in pushed:
        records.event(EventKind.PUSHED, name=name, url=url)
        records.note(f"the model is on the hub: {url}")


def pushed_to(folder: Path, name: str, private: bool) -> str:
    """Copy a model's folder to the hub's `name`, which is made where it is not there; its address.
    Raises what the hub's client raises."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="A model by aligntune")
    return f"{api.endpoint}/{name}"


def _tried(work: Callable[[], None], seconds: float, failed: Callable[[str], None]) -> None:
    answer = asked(work)
    try:
        answer.result(seconds)
    except Exception as error:  # noqa: BLE001 - of a client, for a run that is over
        late = isinstance(error, TimeoutError) and not answer.done()
        reason = f"no end within {seconds:g} s" if late else f"{type(error).__name__}: {error}"
        failed(_without_token(" ".join(reason.split())))


def _without_token(text: str) -> str:
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "***") if token else text
