"""Settings that nobody expects: YAML files, overrides, mappings, keyword arguments."""

from __future__ import annotations

import copy
import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from aligntune.config.load import load_config
from aligntune.config.tree import dump
from aligntune.errors import UserError
from tests.fuzz import broken
from tests.fuzz.trial import NotRight, Refused, one_line

REPOSITORY = Path(__file__).parents[2]


@functools.cache
def examples() -> list[str]:
    """The configs in the repository."""
    return [path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("examples/*.yaml"))]


@functools.cache
def whole_trees() -> list[dict[str, Any]]:
    """The examples with every key written out."""
    return [yaml.safe_load(dump(load_config(yaml.safe_load(text)))) for text in examples()]


def _read(source: Any, overrides: list[str]) -> Refused | None:
    try:
        config = load_config(source, overrides)
    except UserError as error:
        return one_line(error)
    again = load_config(yaml.safe_load(dump(config)))
    if dump(again) != dump(config):
        raise NotRight(f"written and read again it is another: {dump(config)}")
    return None


def config_file(dice: random.Random, folder: Path) -> Refused | None:
    """A YAML file: an example whose tree or whose bytes are spoilt."""
    path = folder / "config.yaml"
    if dice.random() < 0.5:
        tree = copy.deepcopy(dice.choice(whole_trees()))
        for _ in range(dice.choice((1, 1, 2, 3))):
            tree = broken.mutate(dice, tree)
        try:
            raw = yaml.safe_dump(tree, allow_unicode=dice.random() < 0.5).encode("utf-8", "replace")
        except (yaml.YAMLError, ValueError):  # of a number of 5,000 digits
            raw = repr(tree)[:200].encode("utf-8", "replace")
    else:
        raw = broken.spoil(dice, dice.choice(examples()).encode())
    path.write_bytes(raw)
    return _read(path, [])


def config_text(dice: random.Random, folder: Path) -> Refused | None:
    """A YAML file of what YAML has that settings have not."""
    path = folder / "config.yaml"
    head = dice.choice(examples())
    tail = dice.choice(
        (
            "train: &a {steps: *a}\n",
            "x: &x [1]\ny: [*x, *x]\n",
            "\n".join(f"a{i}: &a{i} [*a{max(0, i - 1)}, 1]" for i in range(dice.randint(1, 40))),
            "train:\n" + "".join(" " * i + "a:\n" for i in range(1, dice.choice((5, 200, 2000)))),
            "? [a, b]\n: c\n",
            "? {a: b}\n: c\n",
            "!!set {a, b}\n",
            "!!binary aGVsbG8=\n",
            "train: !!python/tuple [1]\n",
            "<<: {train: {steps: 3}}\n",
            "train: {<<: [{steps: 1}, {seed: 2}]}\n",
            "---\na: 1\n---\nb: 2\n",
            "%YAML 1.1\n---\na: 1\n",
            "train: {steps: 0o17, seed: 0x_}\n",
            "data: !!omap [a: 1]\n",
            "a: !!float x\n",
            "a: !!int ''\n",
            "a: !!bool maybe\n",
            "a: !!timestamp 2001-99-99\n",
            "{" * dice.choice((10, 900, 5000)),
            "- " * dice.choice((10, 5000)),
            "a: " + "9" * 5000 + "\n",
            "a: 1" + "_" * 500 + "\n",
            "a: .\n",
            "a: 0x\n",
            "\t\n",
            "\ufeff",
        )
    )
    path.write_text(dice.choice((head + "\n" + tail, tail, tail + "\n" + head)), encoding="utf-8")
    return _read(path, [])


def overrides(dice: random.Random, folder: Path) -> Refused | None:
    """`key.path=value`, of keys that there are and keys that there are not."""
    tree = dice.choice(whole_trees())
    given = []
    for _ in range(dice.choice((1, 1, 2, 4))):
        path = ".".join(map(str, dice.choice(broken.paths(tree))))
        path = dice.choice((path, path, path, broken.misspelt(dice, path), broken.text(dice)))
        path += dice.choice(("", "", "", "", ".0", ".x", ".", "..", " "))
        said = dice.choice((broken.text(dice), repr(broken.value(dice, 2))[:300], json_like(dice)))
        given.append(dice.choice((f"{path}={said}", f"{path}={said}", f"{path}", f"={said}")))
    return _read(copy.deepcopy(tree), given)


def json_like(dice: random.Random) -> str:
    """A value as people write it on a command line."""
    try:
        return json.dumps(broken.value(dice, 2))[:300]
    except ValueError:
        return "9" * 400


def mapping(dice: random.Random, folder: Path) -> Refused | None:
    """A config as a mapping of Python's, which may hold what no file holds."""
    tree: Any = copy.deepcopy(dice.choice(whole_trees()))
    odd = (b"x", Path("x"), {1, 2}, (1, 2), object(), lambda x: x, np.float32(1), 1j, range(3))
    for _ in range(dice.choice((1, 2))):
        tree = broken.mutate(dice, tree)
        places = broken.paths(tree)
        if places and dice.random() < 0.5:
            *above, last = dice.choice(places)
            node = tree
            for step in above:
                node = node[step]
            node[last] = dice.choice(odd)
    if not isinstance(tree, dict):
        return None
    return _read(tree, [])


def arguments(dice: random.Random, folder: Path) -> Refused | None:
    """What `create_rl_trainer` is called with."""
    from aligntune.trainers import create_rl_trainer

    good: dict[str, Any] = {
        "model_name": "m",
        "dataset_name": "d",
        "algorithm": dice.choice(("grpo", "ppo", "dpo")),
        "reward_functions": "length",
        "max_steps": 3,
        "num_generations": 4,
        "batch_size": 4,
    }
    names = [*create_rl_trainer.__annotations__][:-1]
    odd: Any = (
        b"x",
        Path("x"),
        {1, 2},
        (1, 2),
        object(),
        len,
        np.float32(1),
        1j,
        [len, "math"],
        "x",
    )
    for _ in range(dice.choice((1, 1, 2, 3))):
        name = dice.choice((*names, *names, broken.misspelt(dice, dice.choice(names))))
        good[name] = dice.choice((broken.value(dice, 2), dice.choice(odd)))
    if dice.random() < 0.3:
        good.pop(dice.choice(list(good)))
    try:
        create_rl_trainer(**good)
    except UserError as error:
        return one_line(error)
    return None
