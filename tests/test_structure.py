"""The house as a drawing: no circle of imports, no file that does too much, and packages that load
nothing by themselves."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("aligntune", "actors", "cluster")
MOST_LINES = 400
CONTROLLER_LINES = 320


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_long(package: str) -> None:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert len(files) > 10
    long = {str(f.relative_to(REPOSITORY)): lines(f) for f in files if lines(f) > MOST_LINES}
    assert long == {}, "look for the second thing that such a file does"


def test_the_loop_is_short() -> None:
    assert lines(REPOSITORY / "aligntune/online/controller.py") < CONTROLLER_LINES


def test_a_package_loads_nothing_by_itself() -> None:
    inits = {f for package in PACKAGES for f in (REPOSITORY / package).rglob("__init__.py")}
    lazy = REPOSITORY / "aligntune/__init__.py"
    assert lazy in inits
    assert len(inits) > 20
    assert {f for f in inits if f.stat().st_size} == {lazy}


def test_no_imports_go_round() -> None:
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}
    TopologicalSorter(imports).prepare()  # CycleError names the circle
