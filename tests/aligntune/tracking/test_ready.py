"""A tracker that cannot begin on this machine is refused with the cure before anything starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from aligntune.config.records import TrackingSpec
from aligntune.errors import UserError
from aligntune.runs.lifecycle import check_programs
from aligntune.tracking import ready
from aligntune.tracking.ready import check_ready
from cluster.specs import ClusterSpec


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a user who has set up nothing, and works in it."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "MLFLOW_")) or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


NETRC = "machine {} login user password 0123\n"


def test_wandb_without_a_key_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "call `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"
    with pytest.raises(UserError, match=said):
        check_ready(["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=said):
        check_programs(
            "trl", TrackingSpec(trackers=["wandb"]), ClusterSpec(address="10.0.0.1:6379")
        )
    check_ready(["tensorboard", "trackio"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_API_KEY", "0123"),
        ("WANDB_IDENTITY_TOKEN_FILE", "token"),
        ("WANDB_MODE", "offline"),
        ("WANDB_MODE", "disabled"),
    ],
)
def test_wandb_begins_with_a_key_or_a_mode_of_the_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    check_ready(["wandb"])


@pytest.mark.parametrize(
    ("file", "text", "begins"),
    [
        (".netrc", NETRC.format("api.wandb.ai"), True),
        ("_netrc", NETRC.format("api.forge.coreweave.com"), True),
        (".netrc", NETRC.format("example.org"), False),
        (".netrc", "machine", False),
        ("wandb/settings", "[default]\nmode = offline\n", True),
        (".config/wandb/settings", "[default]\napi_key = 01%23\n", True),
        (".config/wandb/settings", "[default]\nentity = team\n", False),
        ("wandb/settings", "no settings", False),
    ],
)
def test_wandb_begins_with_what_its_files_say(
    home: Path, file: str, text: str, begins: bool
) -> None:
    write(home / file, text)
    if begins:
        check_ready(["wandb"])
    else:
        with pytest.raises(UserError, match="has no key here"):
            check_ready(["wandb"])


def test_a_key_for_another_server_of_wandb_is_none_and_the_environment_holds_over_a_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home / ".netrc", NETRC.format("api.wandb.ai"))
    write(home / "wandb" / "settings", "[default]\nbase_url = https://wandb.example.org\n")
    with pytest.raises(UserError, match="has no key here"):
        check_ready(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    check_ready(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    monkeypatch.setenv("NETRC", str(home / "logins"))
    write(home / "logins", NETRC.format("wandb.example.org"))
    check_ready(["wandb"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "allowed", "installed", "said"),
    [
        ("", "", False, "sqlalchemy, alembic for its database .sqlite. is not installed; pip inst"),
        ("postgresql+psycopg2://me:secret@host/db", "", False, "database .postgresql. is not"),
        ("", "", True, ""),
        ("{home}/runs", "", True, "writes to a folder only where it is told so; set MLFLOW_TRACK"),
        ("{home}/runs", "true", False, ""),
        ("file://{home}/runs", "false", True, "with MLFLOW_ALLOW_FILE_STORE=true"),
        ("file://{home}/runs", "true", False, ""),
        ("http://127.0.0.1:9", "", False, ""),  # nobody is there, and nobody is asked
        ("databricks", "", False, ""),
    ],
)
def test_mlflow_is_refused_where_it_has_nowhere_to_write(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    allowed: str,
    installed: bool,
    said: str,
) -> None:
    pytest.importorskip("mlflow")
    if address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(home=home))
    if allowed:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", allowed)
    monkeypatch.setattr(ready, "find_spec", lambda name: name if installed else None)
    if said:
        with pytest.raises(UserError, match=said) as refused:
            check_ready(["mlflow"])
        assert "secret" not in str(refused.value)
    else:
        check_ready(["mlflow"])
    assert list(home.iterdir()) == []
