"""Algorithms by name: ours, those of installed packages, and `module:Class` paths."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points

from aligntune.algorithms.base import Algorithm
from aligntune.algorithms.dapo import DAPO
from aligntune.algorithms.dr_grpo import DrGRPO
from aligntune.algorithms.grpo import GRPO
from aligntune.algorithms.gspo import GSPO
from aligntune.algorithms.ppo import PPO
from aligntune.errors import closest
from aligntune.names import PREFERENCE, canonical

ENTRY_POINTS = "aligntune.algorithms"

_OURS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "grpo": GRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "drgrpo": DrGRPO,
}


def names() -> list[str]:
    """Every online algorithm that can be named: ours first, then those of installed packages."""
    return [*_OURS, *sorted(_installed())]


def name_of_ours(algorithm: type[Algorithm]) -> str | None:
    """The name of an algorithm of ours; None for others. Looks through no installed packages, which
    takes longer than a step's books."""
    return next((name for name, ours in _OURS.items() if ours is algorithm), None)


def get(name: str) -> type[Algorithm]:
    """The algorithm of that name, alias, or `module:Class` path.

    Raises ValueError for a name that nothing answers to, with the nearest that would, and for a
    path that does not lead to a subclass of `Algorithm`.
    """
    if ":" in name:
        return _load(name, f"algorithm {name!r}")
    known = canonical(name)
    by_name = {canonical(n): a for n, a in _OURS.items()}
    by_name |= {canonical(alias): a for a in _OURS.values() for alias in a.aliases}
    if known in by_name:
        return by_name[known]
    installed = {canonical(n): point for n, point in _installed().items()}
    if known in installed:
        point = installed[known]
        return _load(point.value, f"algorithm {name!r} of entry point group {ENTRY_POINTS!r}")
    near = closest(known, [*by_name, *installed, *map(canonical, PREFERENCE)])
    hint = f"did you mean {near!r}? " if near else ""
    every = ", ".join([*names(), *PREFERENCE])
    raise ValueError(f"unknown algorithm {name!r}: {hint}known are {every}")


def _installed() -> dict[str, EntryPoint]:
    ours = {canonical(name) for name in _OURS}
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINTS):
        if canonical(point.name) in ours or found.get(point.name, point).value != point.value:
            raise ValueError(
                f"entry point {point.name!r} = {point.value!r} in group {ENTRY_POINTS!r} takes a "
                "name that is in use; rename it, or name the algorithm by module:Class"
            )
        found[point.name] = point
    return found


def _load(path: str, what: str) -> type[Algorithm]:
    module, _, attribute = path.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} cannot be loaded from {path!r} ({error}); give package.module:Class of "
            "something importable"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Algorithm)):
        raise ValueError(f"{what}: {path!r} is not a subclass of {Algorithm.__module__}.Algorithm")
    return loaded
