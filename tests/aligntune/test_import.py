"""`import aligntune` is light and starts nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_importing_loads_no_framework() -> None:
    heavy = ("torch", "ray", "transformers", "vllm", "pydantic", "typer")
    code = f"import sys, aligntune; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_unknown_names_are_refused() -> None:
    import aligntune

    with pytest.raises(AttributeError, match="no attribute 'creat_rl_trainer'"):
        aligntune.creat_rl_trainer  # noqa: B018
    assert callable(aligntune.load_config)
