"""What a disk does not take is an OSError in one line, whichever library wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from actors.disk import writing


def save(tensor: torch.Tensor, path: Path) -> None:
    with writing(path), path.open("wb") as file:
        torch.save({"w": tensor}, file)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_os_error_of_one_line_though_torch_has_none() -> None:
    with pytest.raises(OSError) as error:  # noqa: PT011 - its text is the system's
        save(torch.zeros(2**18), Path("/dev/full"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe"),
    ],
)
def test_errors_of_libraries_that_could_not_write_are_os_errors(said: Exception) -> None:
    with pytest.raises(OSError, match=r"^/checkpoints: .*[0-9]") as error, writing("/checkpoints"):
        raise said
    assert "\n" not in str(error.value)


def test_what_is_no_fault_of_the_disk_comes_through_as_itself() -> None:
    with pytest.raises(RuntimeError, match="of a defect"), writing("there"):
        raise RuntimeError("of a defect")
