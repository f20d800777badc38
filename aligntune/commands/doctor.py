"""`aligntune doctor`: what this version of aligntune supports, and whom to ask."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

from packaging.requirements import Requirement

from cluster.doctor import findings
from cluster.doctor.findings import Finding
from cluster.doctor.probe import observe

NOT_OF_A_RUN = "dev"  # the extra that only a developer needs


def supported() -> list[str]:
    """The supported table: what pyproject.toml asks for, as it was installed."""
    every = importlib.metadata.requires("aligntune") or []
    return [text for text in every if f'extra == "{NOT_OF_A_RUN}"' not in text]


def examine(address: str | None) -> Iterator[Finding]:
    """Findings about this machine, then about the cluster at `address` or RAY_ADDRESS."""
    requirements = supported()
    packages = ["aligntune", *(Requirement(text).name for text in requirements)]
    seen = observe(
        packages, [os.getcwd(), *([tmp] if (tmp := os.environ.get("RAY_TMPDIR")) else [])]
    )
    address = address or os.environ.get("RAY_ADDRESS")
    if address == "local":  # as a config may say: no cluster, and one is not started to look at
        address = None
    yield from findings.local(seen, requirements)
    yield findings.ports(seen.ports, connected=address is not None)
    yield findings.token(seen)
    if address is not None:
        from cluster.doctor.nodes import examine as examine_cluster

        yield from examine_cluster(address, packages, requirements)
