"""What each role does, from the calls that run."""

from __future__ import annotations

from actors.timeline import Span
from aligntune.online.doing import doing, starts
from tests.aligntune.online.world import World


def test_the_oldest_call_of_a_role_is_told_with_how_many_are_like_it(world: World) -> None:
    world.configure(rollout={"engine": "transformers", "replicas": 2})
    spans = [
        Span("rollout-0.0", "generate", "group 1", 3.0),
        Span("rollout-1.4", "generate", "group 2", 5.0),
        Span("rollout-0.0", "load_weights", "step 2", 6.0),
        Span("policy-0", "update", "step 2", 8.0),
        Span("controller-", "train", "", 1.0),
    ]
    assert doing(spans, world.config, now=10.0) == {
        "policy": "updates, 2 s",
        "rollout": "rolls out 2 groups, 7 s",
        "reward": "",
    }


def test_a_start_waits_for_every_role_and_knows_which_engine_loads(world: World) -> None:
    world.configure(rollout={"engine": "transformers", "replicas": 2})
    assert starts(world.config) == {
        "policy": (1, "the model is loading"),
        "rollout": (2, "transformers is loading"),
        "reward": (1, ""),
    }
