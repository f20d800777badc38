"""Whatever stops, kills or loses a run, and however often, the run that ends is the same."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune.errors import Interrupted
from aligntune.online.learner import PolicyLost
from aligntune.online.ledger import audit
from aligntune.runs.jsonl import read_lines
from tests.aligntune.online.world import EVALUATED, STEPS, World, ahead

PLACES = ("generate", "score", "evaluate", "update", "save", "load_weights", "start", "load")
OF_RANKS = ("update", "save", "load_weights", "start", "load")
ENDS = ("stop", "kill", "lose the policy", "stop and lose the policy")
ACCIDENTS = st.lists(
    st.tuples(st.sampled_from(ENDS), st.sampled_from(PLACES), st.integers(1, 7)), max_size=3
)


def begin(folder: Any, every_steps: int) -> World:
    """A run whose every third group is filtered; nothing of it depends on time."""
    world = World(folder)
    world.evaluation_turns = 300  # it is still going on when the next update ends
    world.scores = lambda group: (1.0, 1.0) if group % 3 == 1 else (1.0, 0.0)
    world.configure(
        algorithm={"name": "dapo", "overlong_shaping": False},
        train=ahead(0),
        checkpoint={"every_steps": every_steps},
        policy={"max_restarts": 3},
    )
    return world


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The run that nothing happens to."""
    world = begin(tmp_path_factory.mktemp("whole"), 1)
    world.run()
    return world


@pytest.mark.slow
@settings(max_examples=30)
@given(accidents=ACCIDENTS, every_steps=st.integers(1, 3))
def test_a_run_is_the_same_whatever_happens_to_it(
    whole: World,
    tmp_path_factory: pytest.TempPathFactory,
    accidents: list[tuple[str, str, int]],
    every_steps: int,
) -> None:
    world = begin(tmp_path_factory.mktemp("run"), every_steps)
    for end, place, number in accidents:
        left = [number]

        def happen(*_: Any, end: str = end, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] != 0:
                return
            if end.startswith("stop"):
                world.stop()
            if end == "kill":
                raise MemoryError("killed")
            if end.endswith("lose the policy"):
                raise PolicyLost("policy-0: died")

        if end.endswith("lose the policy") and place not in OF_RANKS:
            continue
        world.during = {place: happen}
        with suppress(Interrupted, MemoryError):
            world.run()
    world.during = {}
    last = world.run()
    assert world.rows() == whole.rows()
    assert world.evaluated() == whole.evaluated() == EVALUATED
    assert world.trained() == whole.trained()
    assert last["eval/reward/mean"] == EVALUATED[-1][2]
    samples = read_lines(world.folder / "samples.jsonl")
    assert samples == read_lines(whole.folder / "samples.jsonl")
    books = audit(world.folder / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (2 * STEPS, 0, True)
