"""A job's secrets in its driver, which no hook of Ray reaches."""

from __future__ import annotations

import os
from typing import Any

import pytest
import ray._raylet
from ray.exceptions import RpcError
from ray.experimental import internal_kv
from typer.testing import CliRunner

from aligntune.cli import app, main
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

        def internal_kv_del(self, key: bytes, by_prefix: bool, namespace: Any) -> int:
            assert not by_prefix
            return 0 if held.pop(key, None) is None else 1

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


def test_they_are_gone_where_the_job_is_refused(
    store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store[f"gcs://{KEY}".encode()] = secrets.packed({"SECRET_WORD": "Rumpel"})
    with pytest.raises(SystemExit) as ended:
        main(["train", "nowhere.yaml"])
    assert ended.value.code == 2
    assert store == {}
    secrets.forget()  # once more is no error
    monkeypatch.delenv("SECRET_WORD")


def test_a_head_that_is_lost_does_not_hide_how_the_run_ended(
    store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(self: object, *request: object) -> int:
        raise RpcError("no head answers")

    store[f"gcs://{KEY}".encode()] = secrets.packed({"SECRET_WORD": "Rumpel"})
    monkeypatch.setattr(ray._raylet.GcsClient, "internal_kv_del", lost)
    with pytest.raises(SystemExit) as ended:
        main(["train", "nowhere.yaml"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "secrets of this job may still lie in the head's store: no head answers" in shown
    assert "nowhere.yaml" in shown
    monkeypatch.delenv("SECRET_WORD")


@pytest.mark.parametrize("content", [None, secrets.ERASED])
def test_a_job_whose_secrets_are_gone_says_so(
    store: dict[bytes, bytes], content: bytes | None
) -> None:
    if content is not None:
        store[f"gcs://{KEY}".encode()] = content
    done = CliRunner().invoke(app, ["train", "nowhere.yaml"])
    assert type(done.exception).__name__ == "UserError"
    assert f"the secrets of this job ({KEY}) are gone" in str(done.exception)
