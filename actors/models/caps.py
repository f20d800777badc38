"""Models that cap the scores of their attention before the softmax, as Gemma 2 does.

transformers' SDPA takes the cap and leaves it out without a word: the log-probs are another model's
than vLLM's. Eager attention and flash attention apply it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CAP = "attn_logit_softcapping"


def caps_scores(config: Any) -> bool:
    """Whether a model with this transformers configuration caps its attention's scores."""
    parts = (config, *(getattr(config, name, None) for name in config.sub_configs))
    return any(getattr(part, CAP, None) for part in parts)


def caps_in(folder: Path) -> bool:
    """`caps_scores` by the config.json in a model's folder alone; not so where there is none."""
    path = folder / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return any(part.get(CAP) for part in (tree, *tree.values()) if isinstance(part, dict))


def attention_of(attention: str, config: Any) -> str:
    """What a model with this configuration computes with where `attention` (`model.attention`) is
    asked for: eager where SDPA would leave out a cap."""
    return "eager" if attention == "sdpa" and caps_scores(config) else attention
