"""Does `pip install ARGUMENTS` by uv, under pip's own settings; exit 3 where uv cannot.

uv resolves in seconds what takes pip minutes, but reads none of pip's files and variables. Where
one of them has no counterpart, or there is no uv, nothing is done and pip is to be called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

WORDS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
SWITCHES = {"no-index": "--no-index", "pre": "--prerelease=allow"}
OF_NO_WEIGHT = {
    "default-timeout", "timeout", "retries", "disable-pip-version-check", "no-input", "quiet",
    "progress-bar", "no-color", "cache-dir", "no-cache-dir", "verbose", "root-user-action",
    "break-system-packages", "require-virtualenv", "format", "prefer-binary",
}  # fmt: skip


def uvs(settings: str) -> tuple[list[str], dict[str, str]] | None:
    """Arguments and variables for what `pip config list` printed; None where uv has no word."""
    found: list[str] = []
    variables: dict[str, str] = {}
    for line in settings.splitlines():
        name, _, value = line.partition("=")
        key, value = name.rpartition(".")[2], value.strip("'\"")
        if key in WORDS:
            found += [f"{WORDS[key]}={one}" for one in value.split() if _is_there(one)]
        elif key in SWITCHES:
            found += [SWITCHES[key]] if value.lower() in ("1", "true", "yes", "on") else []
        elif key == "cert":
            variables["SSL_CERT_FILE"] = value
        elif key not in OF_NO_WEIGHT:
            return None
    # pip takes the best version of all indexes; uv by default that of the first with the name.
    return ["--index-strategy=unsafe-best-match", *dict.fromkeys(found)], variables


def _is_there(place: str) -> bool:
    """pip passes over a local index that is not there; uv refuses it."""
    url = urlparse(place)
    return url.scheme != "file" or Path(unquote(url.path)).exists()


def main(given: list[str]) -> int:
    """The exit code of uv; 3 where it cannot stand for pip here."""
    own = Path(sys.executable).with_name("uv")
    uv = str(own) if own.is_file() else shutil.which("uv")
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    made = uvs(listed.stdout) if listed.returncode == 0 else None
    if uv is None or made is None:
        return 3
    arguments, variables = made
    command = [uv, "pip", "install", "--python", sys.executable, *arguments, *given]
    return subprocess.run(command, env={**variables, **os.environ}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
