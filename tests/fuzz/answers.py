"""Answers that nobody expects: of reward functions, of services, over the channel of a child."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from actors.environments import channel as play_channel
from actors.scoring import channel
from actors.scoring.calling import checked
from actors.scoring.criteria import RewardFailed
from aligntune.rewards.remote import NoAnswer, scores_of
from tests.fuzz import broken
from tests.fuzz.trial import NotRight, Refused, one_line


class Odd:
    """What looks like a number and is none."""

    def __float__(self) -> float:
        raise ValueError("no number")


def scores(dice: random.Random, folder: Path) -> Refused | None:
    """What a reward function returns."""
    odd: Any = (
        np.float32(0.5),
        np.array(1.0),
        np.array([1.0, 2.0]),
        np.int64(3),
        Odd(),
        b"1",
        {1.0},
        iter([1.0]),
        np.nan,
        10**400,
        1j,
        "0.5",
        [0.5],
        (),
        True,
        None,
        -0.0,
        np.array(["a"]),
        object(),
        range(2),
    )
    count = dice.randint(0, 4)
    made: Any = [dice.choice((0.5, 1, None, *odd, broken.value(dice, 2))) for _ in range(count)]
    kinds = (
        made,
        made,
        tuple(made),
        dice.choice(odd),
        broken.value(dice, 1),
        {str(i): i for i in made},
    )
    given = dice.choice((*kinds[:4], kinds[4]))
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        given = dice.choice((given, given, np.array(made, dtype=float)))
    wanted = dice.choice((count, count, count, count + 1))
    try:
        found = checked("mine", given, wanted)
    except RewardFailed as failed:
        return one_line(ValueError(" ".join(str(failed).split())))
    _check_scores(found, wanted)
    return None


def _check_scores(found: list[float | None], wanted: int) -> None:
    if len(found) != wanted:
        raise NotRight(f"{len(found)} scores for {wanted}")
    for number in found:
        if number is not None and (type(number) is not float or not math.isfinite(number)):
            raise NotRight(f"a score is {number!r}")


def reply(dice: random.Random, folder: Path) -> Refused | None:
    """What a remote reward answers."""
    count = dice.randint(0, 4)
    made = [dice.choice((0.5, 1, None, True, "1", broken.value(dice, 2))) for _ in range(count)]
    good = {"scores": made}
    try:
        raw = json.dumps(dice.choice((good, good, made, broken.mutate(dice, dict(good))))).encode()
    except (TypeError, ValueError):
        raw = b'{"scores": [1e999, -Infinity, NaN, ' + b"9" * 5000 + b"]}"
    if dice.random() < 0.5:
        raw = broken.spoil(dice, raw)
    try:
        found = scores_of(raw, count)
    except NoAnswer as error:
        return one_line(error)
    _check_scores(found, count)
    return None


def frames(dice: random.Random, folder: Path) -> Refused | None:
    """What comes over the channel of a child: whoever waits for an answer is told."""
    return asyncio.run(asyncio.wait_for(_frames(dice), 20))


async def _frames(dice: random.Random) -> Refused | None:
    import socket

    from actors.children.process import Child, ChildEnded

    here, there = socket.socketpair()
    mine, lifeline = socket.socketpair()
    mine.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=here, limit=4096)
    parse: Any = dice.choice((channel.parse, play_channel.parse))
    child: Child[Any] = Child(reader, writer, mine, parse)
    words = [f"w{i}" for i in range(dice.randint(1, 4))]
    waits = [child.expect(word) for word in words]
    if dice.random() < 0.2:
        waits[0].cancel()
    raw = b""
    for word in dice.choices(words, k=dice.randint(1, 5)):
        try:
            if parse is channel.parse:
                raw += channel.scored(word, [dice.choice((0.5, None, 1.0))])
            else:
                raw += play_channel.told(word, broken.value(dice, 1))
        except (ValueError, TypeError):
            continue
    if dice.random() < 0.6:
        raw = broken.spoil(dice, raw)
    there.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        there.sendall(raw)
    lifeline.close()
    there.close()
    done, pending = await asyncio.wait(waits, timeout=5)
    if pending:
        raise NotRight(f"{len(pending)} of {len(waits)} calls wait for ever")
    await child.end()
    errors = [wait.exception() for wait in done if not wait.cancelled()]
    for error in errors:
        if error is not None and not isinstance(error, ChildEnded):
            raise error
    if (broke := child._listener.exception()) is not None:
        raise broke
    told = next((error for error in errors if error is not None), None)
    return None if told is None else one_line(told)
