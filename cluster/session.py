"""Connects to Ray, or starts it on this machine for the length of a run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.specs import ClusterSpec


class ClusterUnreachable(RuntimeError):
    """No Ray cluster answers at the address the run was given."""


def resolve_address(spec: ClusterSpec) -> str:
    """The address to use: what the spec says, or RAY_ADDRESS in place of 'local'."""
    if spec.address == "local":
        return os.environ.get("RAY_ADDRESS", "local")
    return spec.address


@contextmanager
def session(spec: ClusterSpec, *, cpus: float, gpus: float) -> Iterator[str]:
    """A Ray session; yields the address. What it starts it stops.

    A Ray started here offers at least `cpus` logical processors, so that a laptop's roles can take
    turns on two cores; on a cluster that others share the reservation decides.

    Raises ClusterUnreachable where nothing answers at the address.
    """
    address = resolve_address(spec)
    if ray.is_initialized():
        yield address  # the caller's own session, which stays the caller's
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    common = {"log_to_driver": spec.worker_logs, "logging_level": logging.WARNING}
    try:
        if address == "local":
            store = spec.object_store_gib
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                include_dashboard=False,
                object_store_memory=int(store * 2**30) if store else None,
                **common,
            )
        else:
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterUnreachable(
            f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, correct "
            "cluster.address or RAY_ADDRESS, or use cluster.address=local"
        ) from error
    try:
        yield address
    finally:
        ray.shutdown()
