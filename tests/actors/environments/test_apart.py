"""What a process of an episode may do, where it cannot be kept from those of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[3]
ENTERED = """
import sys
from pathlib import Path
from actors.environments import apart
apart.make(sys.argv[1], "one")
apart.enter(apart.Place(sys.argv[1], "one", alone=False, wrapped=sys.argv[2] == "wrapped"))
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("CapEff")))
"""


@pytest.mark.parametrize("where", ["wrapped", "bare"])
def test_in_a_sandbox_it_has_no_capability_left_though_it_is_not_alone(
    where: str, tmp_path: Path
) -> None:
    """Its server has got some, to keep episodes apart. Outside of one it keeps its own."""
    ran = subprocess.run(
        [sys.executable, "-c", ENTERED, str(tmp_path), where],
        cwd=HERE, capture_output=True, text=True, check=True,
    )  # fmt: skip
    own = next(
        line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("CapEff")
    )
    assert int(ran.stdout, 16) == (0 if where == "wrapped" else int(own, 16))
