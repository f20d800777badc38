"""Local folders by absolute path: actors run in other working folders, and on other nodes."""

from __future__ import annotations

import os


def located(name: str) -> str:
    """The absolute path of a local folder; a hub name as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name
