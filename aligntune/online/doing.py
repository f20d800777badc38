"""What each role of a run does now, or until it is ready, in a few words. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from actors.engines.base import resolve_engine
from actors.timeline import Span
from aligntune.config.online import RunConfig
from aligntune.online.role_table import roles_of

WORDS = {
    "generate": "rolls out",
    "play": "plays",
    "score": "scores",
    "logprobs": "reads",
    "values": "estimates values of",
    "prepare": "prepares",
    "update": "updates",
    "export_weights": "gives its weights",
    "export_changes": "gives its weights",
    "export_adapter": "gives its weights",
    "save": "saves",
    "load": "loads the checkpoint",
    "save_model": "writes the model",
    "start": "starts",
}
"""Of the remote calls that take long; another one is told by its own name."""

OF_GROUPS = {"generate", "play", "score", "logprobs"}


def doing(spans: Sequence[Span], config: RunConfig, now: float | None = None) -> dict[str, str]:
    """For each role what its oldest call does, for how long and how many do; "" for none."""
    now = time.monotonic() if now is None else now
    said = {}
    for role in roles_of(config):
        own = [span for span in spans if span.replica.rpartition("-")[0] == role.name]
        if not own:
            said[role.name] = ""
            continue
        oldest = min(own, key=lambda span: span.start)
        same = sum(span.method == oldest.method for span in own)
        word = WORDS.get(oldest.method, oldest.method.replace("_", " "))
        many = f" {same} group{'s' * (same > 1)}" if oldest.method in OF_GROUPS else ""
        said[role.name] = f"{word}{many}, {now - oldest.start:.0f} s"
    return said


def starts(config: RunConfig) -> dict[str, tuple[int, str]]:
    """The roles that a run waits for as it starts: how many of each, and what takes them time."""
    engine = resolve_engine(config.rollout).name
    loads = "the model is loading"
    does = {
        "rollout": f"{'vLLM' if engine == 'vllm' else engine} is loading",
        "policy": loads,
        "critic": loads,
        "reference": loads,
    }
    return {role.name: (role.size(config), does.get(role.name, "")) for role in roles_of(config)}
