"""Whether a saved model writes text, by the architectures that its config.json names."""

from __future__ import annotations

from collections.abc import Sequence

SILENT = ("Classification", "QuestionAnswering", "MaskedLM", "Model")  # ends of names
WRITES = ("LMHeadModel", "DoubleHeadsModel")  # that end so all the same


def writes_text(architectures: Sequence[str] | None) -> bool:
    """Whether a model saved as these may write: reward models, classifiers and models without a
    head do not, nor does what names none, as an adapter alone."""
    return bool(architectures) and not any(
        name.endswith(SILENT) and not name.endswith(WRITES) for name in architectures or ()
    )
