"""TRL's trainers, imported without vLLM and Ray: seconds that no comparison of losses needs."""

from __future__ import annotations

from typing import Any

import pytest


def grpo_trainer() -> Any:
    """The module `trl.trainer.grpo_trainer`."""
    from trl import import_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_vllm_available", lambda *_, **__: False)
        from trl.trainer import grpo_trainer as found
    return found
