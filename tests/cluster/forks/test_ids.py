"""No two forks draw the same ids of Ray, or Ray would take the objects of one for the other's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.forks import ask, owner, wire
from tests.cluster.forks.test_server import gone, until

SEEN = """
import json, ray
from cluster.forks import ids

class Plain:
    pass

said = [ids.trouble()]
with ids.of_the_system():
    ray.remote(Plain)
said.append(ids.trouble())
ray.remote(Plain)
said.append(ids.trouble())
print(json.dumps(said))
"""

DRAW = """
import os, sys, threading
from ray import NodeID
drawn = [NodeID.from_random().hex()]
thread = threading.Thread(target=lambda: drawn.append(NodeID.from_random().hex()))
thread.start()
thread.join()
with open(sys.argv[1] + ".part", "w") as file:
    file.write(" ".join(drawn))
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""
MAKES_AN_ACTOR_CLASS = "ray.util.multiprocessing.pool"


@pytest.mark.slow
def test_a_process_that_has_drawn_an_id_is_told_from_one_that_has_not() -> None:
    done = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    before, of_the_system, drawn = json.loads(done.stdout)
    assert before is None
    assert of_the_system is None
    assert "has drawn an id of Ray's" in drawn


@pytest.mark.slow
def test_forks_draw_ids_of_their_own_in_every_thread_though_an_import_has_made_an_actor_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(wire.SOCKET, raising=False)
    drawn: list[str] = []
    with owner.server([MAKES_AN_ACTOR_CLASS]):
        server = os.environ[wire.SOCKET]
        until(lambda: os.path.exists(server), "a socket")
        for name in ("a", "b"):
            file = tmp_path / name
            ask.fork(server, ["-c", DRAW, str(file)], dict(os.environ), ray=True)
            until(file.exists, "an answer")
            drawn += file.read_text().split()
        this = psutil.Process().children()
        branches = [
            branch for child in this for branch in child.children() if server in branch.cmdline()
        ]
    assert len(drawn) == 4
    assert len(set(drawn)) == 4
    assert len(branches) == 1
    until(lambda: gone(branches[0].pid), "the end of the branch, as the server has ended")
