"""A Ray that is started for one run: short sockets, loopback, a private token, nothing packed."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster import local
from cluster.doctor import findings
from cluster.doctor.findings import Verdict
from cluster.session import ClusterUnreachable, session
from cluster.specs import ClusterSpec


@pytest.fixture
def long_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR of 100 characters."""
    folder = tmp_path / "x"
    folder = folder.with_name("x" * max(1, 100 - len(str(tmp_path)) - 1))
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def test_a_folder_for_temporary_files_with_a_long_name_is_refused_before_ray_is_asked(
    long_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ClusterUnreachable, match="TMPDIR=/tmp") as error,
        session(ClusterSpec(), cpus=1),
    ):
        pass
    assert str(long_tmp) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_doctor_sees_a_folder_whose_name_is_too_long(long_tmp: Path) -> None:
    found = findings.sockets(local.socket_trouble())
    assert found.verdict is Verdict.FAIL
    assert str(long_tmp) in found.seen
    assert "TMPDIR=/tmp" in found.advice


def test_the_room_for_a_name_is_what_ray_s_longest_socket_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray._private.utils import validate_socket_filepath

    longest = "/" + "t" * (local.MOST_BYTES - 2 - len(local.SOCKET))
    monkeypatch.setattr("ray._common.utils.get_default_ray_temp_dir", lambda: longest)
    assert local.socket_trouble() is None
    validate_socket_filepath(f"{longest}/{local.SOCKET}")
    monkeypatch.setattr("ray._common.utils.get_default_ray_temp_dir", lambda: longest + "t")
    assert local.socket_trouble() is not None
    with pytest.raises(OSError, match="107"):
        validate_socket_filepath(f"{longest}t/{local.SOCKET}")
    assert findings.sockets(None).verdict is Verdict.OK


@pytest.mark.parametrize("there", [None, 0o644, 0o600])
def test_the_token_is_for_its_owner_alone(
    there: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = tmp_path / ".ray" / "auth_token"
    if there is not None:
        token.parent.mkdir()
        token.write_text("old")
        token.chmod(there)
    local.keep_token_private()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert (token.read_text() == "old") is (there is not None)
    assert len(token.read_text()) == (64 if there is None else 3)


def test_no_token_is_made_where_ray_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    local.keep_token_private()
    assert not (tmp_path / ".ray").exists()


SESSION = """
import json, psutil, ray, sys
from ray._private.runtime_env import uv_runtime_env_hook as hook

hook._get_uv_run_cmdline = lambda: ["uv", "run", "aligntune"]
from cluster.session import session
from cluster.specs import ClusterSpec

with session(ClusterSpec(), cpus=1):
    @ray.remote
    def where():
        return ray.util.get_node_ip_address()
    ray.get(where.remote())
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    heard = {c.laddr.ip for p in mine for c in p.net_connections("inet") if c.status == "LISTEN"}
    read = any(part.endswith("log_monitor.py") for p in mine for part in p.cmdline())
    packed = ray.get_runtime_context().runtime_env.get("working_dir")
    print(json.dumps([sorted(heard), packed, read]))
"""


@pytest.mark.slow
def test_a_local_session_listens_on_loopback_and_packs_and_reads_nothing_under_uv_run(
    tmp_path: Path,
) -> None:
    """In a folder that holds more than Ray would take, as found by `uv run aligntune train`."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(600 * 2**20)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\nversion = '0'\n")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SESSION],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heard, packed, read = json.loads(done.stdout.splitlines()[-1])
    assert heard
    assert all(ip.removeprefix("::ffff:") == "127.0.0.1" for ip in heard)
    assert packed is None
    assert not read, "nobody is shown the logs"
