"""Credentials do not belong in settings: those are shown, written to config.yaml, sent to trackers
and, as overrides, seen by everybody in `ps`.

Invariant: no message here holds the value that it refuses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aligntune.errors import UserError
from cluster.jobs.private_files import secret_in

_SECRET_KEY = re.compile(
    r"(?:^|[_-])(?:api_?key|access_?key|secret(?:_?key|_access_key)?|private_?key|password|passwd"
    r"|passphrase|(?:auth|access|api|bearer|refresh|session|hf)_?token|credentials?|authorization"
    r"|signature|sig)$",
    re.IGNORECASE,
)
_MAYBE_SECRET_KEY = re.compile(r"(?:^|[_-])(?:token|key)$", re.IGNORECASE)
_RANDOM = re.compile(r"(?=[^0-9]*[0-9])(?=[^A-Za-z]*[A-Za-z])[A-Za-z0-9_\-./+=]{20,}")


def refuse_credentials(tree: Mapping[str, Any]) -> None:
    """Raises UserError with the key, never the value, of the first credential in `tree`."""
    for path, value in _texts(tree, ""):
        key = path.rpartition(".")[2]
        if "://" in value and (found := _in_uri(value)):
            raise UserError(
                f"{path} holds a credential ({found}), and settings are written down and shown; "
                "leave it out, and give it in the variables that the storage's client reads, such "
                "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if value and (_SECRET_KEY.search(key) or _looks_random(key, value) or _known(value)):
            raise UserError(
                f"{path} looks like a credential, and settings are written down and shown; give "
                "the name of an environment variable that the code reads instead, as in "
                f"{key}_env, and pass it on by `aligntune submit --env`"
            )


def _looks_random(key: str, value: str) -> bool:
    return bool(_MAYBE_SECRET_KEY.search(key) and _RANDOM.fullmatch(value))


def _known(value: str) -> str | None:
    return secret_in(value.encode(errors="replace"))


def _in_uri(uri: str) -> str | None:
    """Where a URI holds a credential, or None."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    user, at, _ = parts.netloc.rpartition("@")
    if at and ":" in user:
        return "user:password@"
    named = [key for key, value in parse_qsl(parts.query) if value and _SECRET_KEY.search(key)]
    return f"{named[0]}=" if named else None


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every text in a tree."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{path}.{index}")
