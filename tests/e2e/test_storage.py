"""A run whose node is lost goes on from its storage; its model is named by URI and fetched."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligntune.online.ledger import audit
from tests.e2e.conftest import Run, read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_goes_on_from_its_storage_where_the_run_directory_is_gone(
    tree: dict[str, Any], tmp_path: Path, launch: Callable[..., Run]
) -> None:
    cache = Path(os.environ["ALIGNTUNE_CACHE"]) / "models"
    before = set(cache.glob("*.lock"))
    storage = tmp_path / "bucket" / "run"
    tree["model"]["name"] = Path(tree["model"]["name"]).as_uri()
    tree["checkpoint"]["storage"] = storage.as_uri()
    tree["train"]["steps"] = 3
    run = launch()
    assert run.finish() == 0, run.output()
    assert len(set(cache.glob("*.lock")) - before) == 1, "one process fetches it for all"
    kept = {"step-000002", "step-000003", "latest"}
    assert {path.name for path in (storage / "checkpoints").iterdir()} == kept
    assert (storage / "model" / "model.safetensors").is_file()

    shutil.rmtree(run.output_dir)
    tree["train"]["steps"] = 5
    run = launch()
    assert run.finish() == 0, run.output()
    assert [event["step"] for event in run.events("resumed")] == [3]
    assert [row["step"] for row in read(run.output_dir / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    books = audit(run.output_dir / "ledger.jsonl")
    assert (books.trained, books.open, books.balanced) == (20, 0, True)
    assert not run.events("not_copied")

    shutil.rmtree(run.output_dir)
    tree["train"]["seed"] = 7
    other = launch()
    assert other.finish() == 2
    assert "checkpoint.storage" in other.output()
    assert "holds another run: train.seed was 1 there and is 7 here" in other.output()


def test_a_storage_that_takes_the_call_and_says_nothing_is_one_line_and_the_process_ends(
    tree: dict[str, Any], launch: Callable[..., Run]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        uri = f"s3://bucket/run?scheme=http&endpoint_override={address}&region=nowhere"
        tree["checkpoint"]["storage"] = uri
        run = launch()
        assert run.finish(120) == 2, run.output()
    (line,) = run.output().splitlines()
    assert line.startswith(f"aligntune: checkpoint.storage {uri} cannot be used: no answer")
