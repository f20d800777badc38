"""The one entry to settings: a YAML file or mapping, with overrides, becomes a resolved config."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from aligntune.config.credentials import refuse_credentials
from aligntune.config.online import RunConfig, load_online_config
from aligntune.config.preference import PreferenceConfig, load_preference_config
from aligntune.config.tree import load_tree
from aligntune.config.values import refuse_impossible, refuse_truth_for_a_number
from aligntune.names import is_preference


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()
) -> RunConfig | PreferenceConfig:
    """A resolved config of either kind, by the name of its algorithm.

    A section that is null is as if it were not there, so that an override can take one out.
    Raises UserError, one line, for anything that is wrong.
    """
    tree = {key: value for key, value in load_tree(source, overrides).items() if value is not None}
    refuse_impossible(tree)
    refuse_credentials(tree)
    loaded = load_preference_config(tree) if is_preference(tree) else load_online_config(tree)
    refuse_truth_for_a_number(tree, loaded.model_dump())
    return loaded
