"""A job's secrets in its driver, which no hook of Ray reaches."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray._raylet
from ray.experimental import internal_kv
from typer.testing import CliRunner

from aligntune.cli import app
from cluster.jobs import secrets

KEY = "aligntune-0123"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """What the head holds, for a process that Ray has not connected."""
    held: dict[bytes, bytes] = {}

    class Client:
        def __init__(self, address: str) -> None:
            assert address == "10.0.0.7:6379"

        def internal_kv_get(self, key: bytes, namespace: Any) -> bytes | None:
            return held.get(key)

    monkeypatch.setattr(ray._raylet, "GcsClient", Client)
    monkeypatch.setattr(internal_kv, "global_gcs_client", None)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    monkeypatch.setenv(secrets.VARIABLE, KEY)
    monkeypatch.delenv("SECRET_WORD", raising=False)
    return held


def test_they_are_there_before_anything_is_read(
    store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store[f"gcs://{KEY}".encode()] = secrets.packed({"SECRET_WORD": "Rumpel"})
    done = CliRunner().invoke(app, ["train", "nowhere.yaml"])
    assert done.exit_code != 0
    assert os.environ["SECRET_WORD"] == "Rumpel"
    monkeypatch.delenv("SECRET_WORD")


def test_a_job_whose_secrets_are_gone_says_so(store: dict[bytes, bytes]) -> None:
    done = CliRunner().invoke(app, ["train", "nowhere.yaml"])
    assert type(done.exception).__name__ == "UserError"
    assert f"the secrets of this job ({KEY}) are gone" in str(done.exception)
