"""uv does pip's work only under pip's own settings."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "uv_install.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("uv_install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pips_settings_become_uvs(script: ModuleType, tmp_path: Path) -> None:
    gone = (tmp_path / "gone").as_uri()
    arguments, variables = script.uvs(
        "\n".join(
            [
                ":env:.default-timeout='180'",
                ":env:.find-links='/opt/wheels'",
                "global.cert='/etc/ca.crt'",
                "global.constraint='/etc/constraints.txt'",
                f"global.extra-index-url='{tmp_path.as_uri()} {gone}'",
                "global.find-links='/opt/wheels'",
                "global.index-url='https://mirror.example/simple'",
                "install.no-index='false'",
            ]
        )
    )
    assert arguments == [
        "--index-strategy=unsafe-best-match",
        "--find-links=/opt/wheels",
        "--constraints=/etc/constraints.txt",
        f"--index={tmp_path.as_uri()}",
        "--default-index=https://mirror.example/simple",
    ]
    assert variables == {"SSL_CERT_FILE": "/etc/ca.crt"}


@pytest.mark.parametrize("setting", ["global.proxy='http://a:1'", "install.target='/x'"])
def test_a_setting_that_uv_has_no_word_for_leaves_the_work_to_pip(
    script: ModuleType, setting: str
) -> None:
    assert script.uvs(setting) is None


def test_without_uv_nothing_is_done(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.setattr(script.sys, "executable", "/nowhere/python")
    monkeypatch.setattr(
        script.subprocess,
        "run",
        lambda *_, **__: type("Done", (), {"returncode": 0, "stdout": ""}),
    )
    assert script.main(["x"]) == 3


def test_another_system_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    shutil.copy(SCRIPT.with_name("install.sh"), folder)
    uname = tmp_path / "bin" / "uname"
    uname.parent.mkdir()
    uname.write_text("#!/bin/sh\necho Darwin\n")
    uname.chmod(0o755)
    path = {"PATH": f"{uname.parent}:{os.environ['PATH']}", "PYTHON": "/nowhere/python"}
    ended = subprocess.run(
        ["bash", folder / "install.sh"], env=path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "install: aligntune runs on Linux, and this is Darwin",
        "install: on Windows call this in WSL 2, on a Mac in a Linux container",
    ]
    assert {each.name for each in tmp_path.iterdir()} == {"scripts", "bin"}
