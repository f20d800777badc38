"""Which files must not travel unnoticed: secrets, by their name or their content.

A job's package lies on the head and on every node, readable by whoever may run code there.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

READ_BYTES = 2**20  # of each file; a key stands at its beginning, a token in a small file

EXAMPLES = ("*.example", "*.sample", "*.template", "*.dist")  # such as .env.example
NAMES = (
    ".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass",
    ".git-credentials", ".htpasswd", ".boto", "credentials", "credentials.json",
    "client_secret*.json", "service-account*.json",
    "service_account*.json", "application_default_credentials.json",
    "secrets.yaml", "secrets.yml", "secrets.json", "secrets.toml", "auth_token", "kubeconfig",
    "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks",
    "*.keystore", "*.kdbx", "*.ovpn",
)  # fmt: skip
FOLDERS = (".ssh", ".aws", ".gnupg", ".kube", ".azure", ".docker")

CONTENTS = {
    "a private key": rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----",
    "an AWS key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b",
    "an API key": rb"\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,}\b",
    "a Slack token": rb"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a Google API key": rb"\bAIza[0-9A-Za-z_-]{35}\b",
}
_FOUND = [(what, re.compile(pattern)) for what, pattern in CONTENTS.items()]


def secret_by_name(name: str) -> bool:
    """Whether a relative path, with '/', is that of a file which usually holds a secret."""
    path = PurePosixPath(name.lower())
    if any(fnmatchcase(path.name, pattern) for pattern in EXAMPLES):
        return False
    return any(part in FOLDERS for part in path.parts[:-1]) or any(
        fnmatchcase(path.name, pattern) for pattern in NAMES
    )


def secret_in(content: bytes) -> str | None:
    """What secret stands in `content`, or None."""
    return next((what for what, pattern in _FOUND if pattern.search(content)), None)


def why_private(directory: Path, name: str) -> str | None:
    """Why the file `name` below `directory` should not travel; None where nothing says so."""
    if secret_by_name(name):
        return "by its name"
    with (directory / name).open("rb") as file:
        found = secret_in(file.read(READ_BYTES))
    return f"{found} in it" if found else None
