"""`aligntune doctor --gpu`: each section in a process of its own, judged as it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aligntune.selftest.judge import Outcome, Verdict, judge

SECTIONS = {  # and the seconds that each may take
    "ceilings": 120,
    "agreement": 180,
    "agreement_vllm": 600,
    "update": 300,
    "step_torch": 180,
    "step_fsdp": 180,
    "step_deepspeed": 300,
    "run": 600,
}
NEEDS = {"agreement_vllm": "vllm", "step_deepspeed": "deepspeed", "run": "ray"}


def no_gpu() -> str | None:
    """Why nothing can be tested here; None where torch can use a GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported ({error})"
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if torch.cuda.get_device_capability() < (8, 0):
        return "a GPU without bfloat16"
    return None


def self_test(
    sections: list[str] | None = None, figures: dict[str, Any] | None = None
) -> Iterator[Outcome]:
    """Outcomes as they come; what was measured goes into `figures`, by section."""
    found: dict[str, Any] = {} if figures is None else figures
    wanted = list(SECTIONS) if sections is None else sections
    why = no_gpu()
    for section in wanted:
        if why is not None:
            yield Outcome(section, Verdict.SKIPPED, why)
            continue
        needed = NEEDS.get(section)
        if needed and importlib.util.find_spec(needed) is None:
            yield Outcome(section, Verdict.SKIPPED, f"{needed} is not installed")
            continue
        measured = measure(section, SECTIONS[section])
        if isinstance(measured, str):
            yield Outcome(section, Verdict.OFF, measured, "it does not run on this machine")
            continue
        found[section] = measured
        yield from judge(section, measured, found)


def measure(section: str, limit_s: float) -> dict[str, Any] | str:
    """The figures of a section, or in one line why there are none."""
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        command = [sys.executable, "-m", "aligntune.selftest.sections", section, folder]
        log = Path(folder) / "log"
        with log.open("w") as error:
            try:
                done = subprocess.run(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=error,
                    text=True,
                    timeout=limit_s,
                    check=False,
                    env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                )
            except subprocess.TimeoutExpired:
                return f"not done within {limit_s:g} s"
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            figures: dict[str, Any] = json.loads(lines[-1])
            return figures
        said = [line for line in log.read_text().splitlines() if line.strip()]
        return f"exit code {done.returncode}: {said[-1] if said else 'it said nothing'}"


def exit_code(outcomes: list[Outcome]) -> int:
    """1 where anything is off."""
    return int(any(outcome.verdict is Verdict.OFF for outcome in outcomes))
