"""The random ids of Ray, which no two forks of one process may draw alike.

Ray's generator of ids is seeded once in a process, at the first id that it draws, and does not hear
of forks. Two workers with the same ids take each other's objects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def of_the_system() -> Iterator[None]:
    """Classes that an import makes actors of take their ids from the system: nothing is seeded."""
    import ray.actor

    of_ray = ray.actor.ActorClassID

    class FromTheSystem:
        @staticmethod
        def from_random() -> object:
            return of_ray(os.urandom(of_ray.size()))

    ray.actor.ActorClassID = FromTheSystem
    try:
        yield
    finally:
        ray.actor.ActorClassID = of_ray


def trouble() -> str | None:
    """Why nothing may be forked from this process, or None; forks twice to see."""
    if _drawn_in_a_fork() == _drawn_in_a_fork():
        return "an import has drawn an id of Ray's, and forks would draw the same ids from then on"
    return None


def _drawn_in_a_fork() -> bytes:
    from ray import NodeID

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, NodeID.from_random().binary())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        drawn = answer.read()
    os.waitpid(child, 0)
    return drawn
