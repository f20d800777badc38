"""Files that ranks write: what a disk does not take is an OSError, whichever library wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNS = ("pytorchstreamwriter", "unexpected pos", "file write failed", "no space left", "i/o error")
"""In the RuntimeErrors of torch and the errors of safetensors, which have no class for it."""


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Raises OSError, one line, where what is written to `folder` does not come to disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if type(error).__name__ != "SafetensorError" and not any(s in text.lower() for s in SIGNS):
            raise
        raise OSError(f"{folder}: {text[:200]}") from error
