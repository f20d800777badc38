"""`aligntune train` of a preference job in which no Ray starts: python -m ... MODEL ARGUMENTS.

What its workers would train and export is there already, in MODEL; all else is the run's own. It
reads more environment variables, as JSON, from standard input: in its own environment from the
start they would keep it from being forked, and as arguments a token would be in a file.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants

from actors.preference.relay import PreferenceJob
from aligntune import cli
from aligntune.preference import trainer


class Trained:
    """In place of a PreferenceRun."""

    def __init__(
        self, config: Any, job: PreferenceJob, storage: Any, recorder: Any, before: Any
    ) -> None:
        self._job, self._recorder = job, recorder

    def follow(self, *tables: Any) -> None:
        """Tell of every step, and leave the model."""
        self._recorder.restart(0, {})
        for step in range(1, self._job.steps + 1):
            self._recorder.step(step, {"loss": 1 / step, "reward/accuracy": 0.5})
        shutil.copytree(MODEL, self._job.export, dirs_exist_ok=True)


@contextmanager
def no_session(*_: Any) -> Iterator[None]:
    """In place of a session."""
    yield


if __name__ == "__main__":
    os.environ.update(json.load(sys.stdin))
    importlib.reload(constants)  # the import has read another environment
    MODEL = sys.argv.pop(1)
    trainer.PreferenceRun = Trained
    trainer.PreferenceTrainer._session = no_session
    cli.console()
