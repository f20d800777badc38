"""Where an actor runs: its node, as it tells the driver and the other ranks."""

from __future__ import annotations

import os


def node_address() -> str:
    """This node's address, as the other nodes reach it; the loopback where there is no Ray."""
    import ray

    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else "127.0.0.1"


def whereabouts() -> dict[str, object]:
    """`pid`, the node's address `node`, and its `node_id` in Ray, '' where there is no Ray."""
    import ray

    known = ray.is_initialized()
    return {
        "pid": os.getpid(),
        "node": node_address(),
        "node_id": ray.get_runtime_context().get_node_id() if known else "",
    }
