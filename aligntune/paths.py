"""Local folders by absolute path: actors run in other working folders, and on other nodes."""

from __future__ import annotations

import os

from actors.specs import ModelSpec


def located(name: str) -> str:
    """The absolute path of a local folder; a hub name or a URI as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def located_model(spec: ModelSpec) -> ModelSpec:
    """`spec` with a local folder named by its absolute path."""
    return spec.model_copy(update={"name": located(spec.name)})


def located_storage(place: str) -> str:
    """A folder, there or not yet, by its absolute path; a URI as it is."""
    return place if "://" in place else os.path.abspath(place)
