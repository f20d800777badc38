"""What the config says of TRL's losses is what TRL's own source does with them."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import get_args

import pytest

from aligntune.config.preference import DIVERGENT, SMOOTHED, UNWEIGHTED, Loss


@pytest.fixture(scope="module")
def source() -> ast.Module:
    """The module of DPOTrainer; it is read and not imported, which takes seconds."""
    trl = importlib.util.find_spec("trl")
    assert trl is not None
    assert trl.origin is not None
    path = Path(trl.origin).parent / "trainer" / "dpo_trainer.py"
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def branches(source: ast.Module) -> dict[str, str]:
    """The code of each loss, from the chain of `if loss_type == ...`."""
    found: dict[str, str] = {}
    for node in ast.walk(source):
        match node:
            case ast.If(
                test=ast.Compare(
                    left=ast.Name(id="loss_type"),
                    ops=[ast.Eq()],
                    comparators=[ast.Constant(value=str(name))],
                )
            ):
                found[name] = "\n".join(map(ast.unparse, node.body))
    return found


def test_the_losses_are_those_of_trl(branches: dict[str, str]) -> None:
    assert set(branches) == set(get_args(Loss))


def test_losses_that_smooth_labels_are_those_that_read_it(branches: dict[str, str]) -> None:
    reading = {name for name, code in branches.items() if "self.label_smoothing" in code}
    assert reading == set(SMOOTHED)


def test_losses_that_take_a_divergence_are_those_that_trl_lists(source: ast.Module) -> None:
    (listed,) = [
        ast.literal_eval(node.value)
        for node in ast.walk(source)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "f_divergence_loss_types"
    ]
    assert listed == set(DIVERGENT)


def test_losses_that_cannot_be_weighed_sort_the_pairs_or_give_one_number(
    branches: dict[str, str],
) -> None:
    sorting = {name for name, code in branches.items() if ".sort(" in code}
    one_number = {name for name, code in branches.items() if ".expand(" in code}
    assert sorting | one_number == set(UNWEIGHTED)
