"""The kinds of input that are tried, each through the function that meets it first."""

from __future__ import annotations

from tests.fuzz.answers import frames, reply, scores
from tests.fuzz.leftovers import audited, checkpoints, run_directory
from tests.fuzz.rows import data, pairs
from tests.fuzz.settings import arguments, config_file, config_text, mapping, overrides
from tests.fuzz.trial import Try

KINDS: dict[str, tuple[Try, int]] = {
    "config_file": (config_file, 3000),
    "config_text": (config_text, 800),
    "overrides": (overrides, 2000),
    "mapping": (mapping, 1000),
    "arguments": (arguments, 1500),
    "data": (data, 2000),
    "pairs": (pairs, 1000),
    "scores": (scores, 1500),
    "reply": (reply, 1500),
    "frames": (frames, 1000),
    "checkpoints": (checkpoints, 800),
    "run_directory": (run_directory, 800),
    "audited": (audited, 1000),
}
"""Each kind with how many inputs of it `make fuzz` tries."""
