"""What is going to happen to a run: its settings, and what breaks when. Drawn from a number."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

ALGORITHMS = ("ppo", "grpo", "dapo", "gspo", "dr_grpo")

OF_AN_ACTOR = ("die", "lose its node", "wedge", "hang", "slow", "kill another", "stop", "kill")
KINDS = {
    "rollout.start": OF_AN_ACTOR,
    "rollout.load_weights": OF_AN_ACTOR,
    "rollout.generate": OF_AN_ACTOR,
    "rollout.evaluate": OF_AN_ACTOR,
    "reward.start": OF_AN_ACTOR,
    "reward.score": (*OF_AN_ACTOR, "fail"),
    "reference.start": OF_AN_ACTOR,
    "reference.logprobs": OF_AN_ACTOR,
    "policy.start": OF_AN_ACTOR,
    "policy.prepare": OF_AN_ACTOR,
    "policy.update": OF_AN_ACTOR,
    "policy.export_weights": OF_AN_ACTOR,
    "policy.snapshot": OF_AN_ACTOR,
    "policy.write": (*OF_AN_ACTOR, "disk"),
    "policy.load": OF_AN_ACTOR,
    "policy.save_model": OF_AN_ACTOR,
    "critic.start": OF_AN_ACTOR,
    "critic.values": OF_AN_ACTOR,
    "critic.update": OF_AN_ACTOR,
    "critic.snapshot": OF_AN_ACTOR,
    "critic.write": (*OF_AN_ACTOR, "disk"),
    "critic.load": OF_AN_ACTOR,
    "disk.begin": ("disk", "slow", "stop", "kill"),
    "disk.commit": ("disk", "slow", "hang", "stop", "kill"),
    "any": ("stop", "kill", "kill another", "lose arrays", "wedge", "lose its node"),
}
OF_EPISODES = {
    "environment.start": OF_AN_ACTOR,
    "environment.generate": tuple(kind for kind in OF_AN_ACTOR if kind != "hang"),
    "rollout.sample": OF_AN_ACTOR,
    "episode.tool": ("die", "lose its node", "hang", "slow", "kill another", "stop", "kill")
    + ("fail", "fail by the machine") * 2,
}
"""Where something may break, by role and method, and how. `disk` is the driver's own; `episode` is
what runs in an environment actor."""


@dataclass(frozen=True)
class Fault:
    """At the `number`th time that `place` is come to in `process`, counted from 0, `kind` happens;
    in any process where that is None."""

    process: int | None
    place: str
    number: int
    kind: str


@dataclass(frozen=True)
class History:
    """A run. `settings` are those of its first process, `changes` those of the processes after it;
    `seed` says how long things take."""

    seed: int
    algorithm: str
    settings: dict[str, Any]
    changes: tuple[dict[str, Any], ...] = ()
    faults: tuple[Fault, ...] = ()
    constant: tuple[int, ...] = ()  # every 7th group from these on scores the same throughout
    unscored: tuple[int, ...] = ()  # groups that no reward function can score
    poison: tuple[int, ...] = ()  # groups that kill the rollout replica they are made on
    unplayable: tuple[int, ...] = ()  # groups whose episodes come to no end
    torn: bool = False  # a kill leaves half a line in files

    @property
    def sums(self) -> bool:
        """Whether the algorithm samples again where the scores of a group are the same."""
        return self.algorithm == "dapo"


DEFAULT: dict[str, Any] = {
    "steps": 3,
    "groups": 2,
    "staleness": 0,
    "beta": 0.0,
    "replicas": 2,
    "at_once": 2,
    "grow": 0,
    "save_every": 1,
    "keep": 2,
    "evaluate_every": 1,
    "ranks": 1,
    "samples": 4,
    "environments": 0,
    "lockstep": False,
}


def drawn(number: int) -> History:
    """The history of a number."""
    dice = random.Random(number)
    algorithm = dice.choice(ALGORITHMS)
    settings = {
        "steps": dice.randint(1, 6),
        "groups": dice.randint(1, 3),
        "staleness": dice.choice((0, 0, 1, 2, 3, 4)),
        "beta": dice.choice((0.0, 0.1)),
        "replicas": dice.randint(1, 3),
        "at_once": dice.randint(1, 4),
        "grow": dice.choice((0, 0, 1)),
        "save_every": dice.randint(1, 3),
        "keep": dice.randint(1, 3),
        "evaluate_every": dice.choice((None, 1, 1, 2)),
        "ranks": dice.choice((1, 1, 2)),
        "samples": dice.choice((0, 1, 4)),
    }
    count = dice.choice((0, 1, 2, 3, 4, 6, 9))
    critic, reference = algorithm == "ppo", settings["beta"] > 0
    places = [
        place
        for place in KINDS
        if (critic or not place.startswith(("critic", "policy.prepare")))
        and (reference or not place.startswith("reference"))
    ]
    may_change = {
        "staleness": dice.randint(0, 4),
        "replicas": dice.randint(1, 3),
        "at_once": dice.randint(1, 4),
        "save_every": dice.randint(1, 3),
        "keep": dice.randint(1, 3),
        "samples": dice.choice((0, 1, 4)),
        "grow": dice.choice((0, 1)),
    }
    changes = [
        {key: may_change[key] for key in dice.sample(list(may_change), dice.choice((0, 1, 2)))}
        for _ in range(dice.choice((0, 0, 1, 2)))
    ]
    faults = tuple(_fault(dice, places) for _ in range(count))
    history = History(
        seed=number,
        algorithm=algorithm,
        settings=settings,
        changes=tuple(changes),
        faults=faults,
        constant=tuple(dice.sample(range(7), dice.randint(0, 3))),
        unscored=tuple(dice.sample(range(12), dice.choice((0, 0, 0, 1, 2)))),
        poison=tuple(dice.sample(range(12), dice.choice((0, 0, 0, 0, 1)))),
        torn=dice.random() < 0.5,
    )
    return _with_episodes(history, random.Random(f"{number} episodes"))


def _with_episodes(history: History, dice: random.Random) -> History:
    """The history, in two of five with episodes, and with what may break of them."""
    if dice.random() < 0.6:
        return history
    faults = tuple(_fault(dice, list(OF_EPISODES)) for _ in range(dice.choice((0, 1, 2, 4, 6))))
    return replace(
        history,
        settings=history.settings
        | {"environments": dice.randint(1, 2), "lockstep": dice.random() < 0.5},
        faults=history.faults + faults,
        unplayable=tuple(dice.sample(range(12), dice.choice((0, 0, 0, 1)))),
    )


def _fault(dice: random.Random, places: list[str]) -> Fault:
    place = dice.choice(places)
    often = ("generate", "score", "sample", "tool")
    most = 60 if place == "any" else 8 if place.split(".")[1] in often else 3
    process = None if place.endswith(".load") else dice.choice((0, 0, None, None, 1, 2))
    return Fault(process, place, dice.randint(0, most), dice.choice((KINDS | OF_EPISODES)[place]))


def smaller(history: History) -> Iterator[History]:
    """Histories in which less happens, for one that shows a fault."""
    for index in range(len(history.faults)):
        yield replace(history, faults=history.faults[:index] + history.faults[index + 1 :])
    for index in range(len(history.changes)):
        yield replace(history, changes=history.changes[:index] + history.changes[index + 1 :])
    for name in ("constant", "unscored", "poison", "unplayable"):
        if getattr(history, name):
            yield replace(history, **{name: ()})
    if history.torn:
        yield replace(history, torn=False)
    for key, usual in DEFAULT.items():
        if history.settings.get(key, usual) != usual:
            yield replace(history, settings={**history.settings, key: usual})
    for index, fault in enumerate(history.faults):
        if fault.number:
            less = replace(fault, number=fault.number // 2)
            faults = (*history.faults[:index], less, *history.faults[index + 1 :])
            yield replace(history, faults=faults)
