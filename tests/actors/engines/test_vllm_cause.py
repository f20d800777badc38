"""Why an engine did not start is looked for in what its processes have written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from actors.engines.vllm_cause import MOST_BYTES, Output

OF_OTHERS = (
    "Exception: WorkerProc initialization failed due to an exception in a background process. "
    "See stack trace for root cause.",
    "RuntimeError: WorkerProc initialization failed due to an exception",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s)",
)
MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[IO[str]]]:
    """Standard error and output, as a worker of Ray's has them: files that it appends to."""
    with (tmp_path / "err").open("a") as err, (tmp_path / "out").open("a") as out:
        yield [err, out]


@pytest.mark.parametrize(
    ("said", "logged", "cause"),
    [
        (["ValueError: No available memory.", *OF_OTHERS], [], "ValueError: No available memory."),
        (["KeyError: 'x'", "", "(EngineCore pid=7) " + MEMORY], [], MEMORY),
        (OF_OTHERS, ["ERROR 11-28 08:22 [multiproc_executor.py:953] " + MEMORY, "..."], MEMORY),
        (["    raise ValueError(", "an Error: of no class"], ["WARNING: nothing"], None),
        (OF_OTHERS, [], None),
        (["x" * 3 * MOST_BYTES, MEMORY], [], MEMORY),
    ],
)
def test_the_cause_is_the_last_error_that_tells_of_no_other(
    files: list[IO[str]], said: list[str], logged: list[str], cause: str | None
) -> None:
    for file in files:
        print("ValueError: of an engine before", file=file, flush=True)
    output = Output([file.fileno() for file in files])
    for file, lines in zip(files, (said, logged), strict=True):
        print(*lines, sep="\n", file=file, flush=True)
    assert output.cause() == cause


def test_output_that_is_no_file_says_nothing() -> None:
    with Path("/dev/null").open("w") as nowhere:
        output = Output([nowhere.fileno()])
        print(MEMORY, file=nowhere, flush=True)
        assert output.cause() is None
