"""Waits for nodes of this cluster to be alive: `python -m cluster.await_nodes NODES SECONDS`.

Launch files call it before a run, since a run is refused at once where it could never fit, and
nodes join one by one. Exit code 1 at the deadline, 2 where there is no cluster.
"""

from __future__ import annotations

import logging
import sys
import time

import ray

from cluster.resources import living_nodes
from cluster.session import check_head

EVERY_S = 1.0


def await_nodes(count: int, seconds: float) -> int:
    """How many of `count` nodes are alive when all are, or after `seconds`."""
    end = time.monotonic() + seconds
    while (alive := len(living_nodes())) < count and time.monotonic() < end:
        time.sleep(EVERY_S)
    return alive


def main(arguments: list[str]) -> int:
    """The exit code; what is missing goes to standard error."""
    count, seconds = int(arguments[0]), float(arguments[1])
    try:
        check_head("auto")
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(f"aligntune: no Ray cluster here: {error}", file=sys.stderr)
        return 2
    alive = await_nodes(count, seconds)
    ray.shutdown()
    if alive < count:
        print(
            f"aligntune: {alive} of {count} nodes are alive after {seconds:g} s; see `ray status`, "
            "and the output of what starts the others",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
