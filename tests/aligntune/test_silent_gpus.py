"""An nvidia-smi that does not answer ends what asks it in one line, with a cure that works."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from aligntune.commands.plan import plan_run
from aligntune.config.tree import dump
from aligntune.errors import UserError
from aligntune.online.settle_resources import settle_resources
from aligntune.preference.settle_workers import settle_workers
from aligntune.shapes import known_shape
from cluster import gpus, machines, resources
from cluster.doctor import probe
from tests.aligntune.online.test_settle_resources import config
from tests.aligntune.preference.test_settle_workers import config as preference_config


@pytest.fixture(autouse=True)
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that waits for a driver for ever, on a machine without a Ray that is connected:
    the tests' own would say what GPUs there are."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexec sleep 600\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machines, "connected_already", lambda: False)
    monkeypatch.setattr(resources, "host_memory", lambda: (2**40, 2**40))
    monkeypatch.setattr(gpus, "NVIDIA_SMI_SECONDS", 0.05)
    monkeypatch.setattr(probe, "NVIDIA_SMI_S", 0.05)


def plan(folder: Path) -> object:
    path = folder / "c.yaml"
    path.write_text(dump(config()))
    return plan_run(path, [])


@pytest.mark.parametrize(
    "asks",
    [
        lambda folder: settle_resources(config(), shape_of=known_shape),
        lambda folder: settle_workers(preference_config(), 1024),
        plan,
    ],
    ids=["train, evaluate and export", "a job over a table", "plan"],
)
def test_silent_gpus_are_a_line_with_a_cure_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: Callable[[Path], object]
) -> None:
    with pytest.raises(UserError, match="nvidia-smi does not answer") as refused:
        asks(tmp_path)
    for cure in ("nvidia-smi -pm 1", "aligntune doctor", "CUDA_VISIBLE_DEVICES="):
        assert cure in str(refused.value)
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert asks(tmp_path)


def test_the_doctor_tells_silent_gpus_from_none() -> None:
    assert probe._gpus() is None
