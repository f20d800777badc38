"""What each role of a run is started with."""

from __future__ import annotations

from typing import Any

import pytest

from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.role_table import ROLES, Start


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ({}, ("some/model", "v1")),
        ({"model": "some/model"}, ("some/model", "v1")),
        ({"model": "other/model"}, ("other/model", None)),
    ],
)
def test_the_reference_has_the_policys_revision_where_it_is_the_policys_model(
    section: dict[str, Any], model: tuple[str, str | None]
) -> None:
    config = load_config(
        {
            "algorithm": {"name": "grpo", "beta": 0.1},
            "model": {"name": "some/model", "revision": "v1", "lora": {"r": 4}},
            "data": {"path": "x.jsonl"},
            "rewards": ["length"],
            "output_dir": "run",
            "reference": section,
        }
    )
    assert isinstance(config, RunConfig)
    spec, *_ = ROLES["reference"].arguments(Start(config, 0, "reference-0", 1, ()))
    assert (spec.name, spec.revision, spec.lora) == (*model, None)
