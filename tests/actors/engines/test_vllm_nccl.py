"""vLLM's whole engine takes weights that a rank sends; NCCL and GPU streams are stood in for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import drivers
from tests.conftest import plain_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_what_is_sent_is_what_it_samples_with_and_it_still_reads_what_lies_in_the_store(
    folder: Path,
) -> None:
    """In a program that is forked, as then its engine is."""
    pytest.importorskip("vllm")
    line = ["-m", "tests.actors.engines.nccl_case", str(folder)]
    done = drivers.run(line, env=plain_environment(), timeout=500, exact=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "every version was that of its weights"
