"""Models whose weights are quantised: nothing that is trained can begin with them.

transformers widens some of them as it loads them and narrows them again as it saves, keeps others
as they are without a gradient, and leaves scales out: what came of such a training would be another
model. Those that bitsandbytes has packed are not loaded by vLLM either; hubs have them beside the
whole ones, which have the same name without its ending.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from actors.models.configuration import ModelError, configuration
from actors.specs import ModelSpec

ENDINGS = ("-unsloth-bnb-4bit", "-bnb-4bit")
"""Of the names of packed models, the longer first."""

KEPT_IN_4_BITS = "model.load_in_4bit keeps frozen ones in 4 bits"


def quantised_by(spec: ModelSpec) -> str | None:
    """What has quantised the weights that `spec` names, as fp8, mxfp4 or bitsandbytes, by its
    configuration alone; None where they are whole. Raises ModelError without a configuration."""
    config = configuration(spec)
    for part in (config, config.get_text_config()):
        found: Any = getattr(part, "quantization_config", None)
        said: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        if said:
            older = said.get("load_in_4bit") or said.get("load_in_8bit")  # bitsandbytes' bits alone
            return str(said.get("quant_method") or ("bitsandbytes" if older else "unknown"))
    return None


def is_packed(spec: ModelSpec) -> bool:
    """Whether bitsandbytes has packed the weights that `spec` names. Raises ModelError as
    `quantised_by`."""
    return quantised_by(spec) == "bitsandbytes"


def with_whole_weights(spec: ModelSpec) -> ModelSpec:
    """`spec`, or where its weights are packed the model that has them whole.

    Raises:
        ModelError: the weights are packed, and no whole ones can be had under the name that is left
            without its ending.
    """
    if not is_packed(spec):
        return spec
    name = without_ending(spec.name)
    why = ""
    if name is not None:
        whole = spec.renamed(name)
        try:
            if os.path.isdir(spec.name) and not os.path.isdir(name):
                raise ModelError(f"there is no folder {name!r}")
            if not is_packed(whole):
                return whole
            why = f", and those of {name!r} are packed too"
        except ModelError as error:
            why = f", and {name!r} cannot be had ({error})"
    raise ModelError(
        f"the weights of {spec.name!r} are packed by bitsandbytes, and can neither be trained nor "
        f"loaded by vLLM{why}; name the model with whole weights ({KEPT_IN_4_BITS})"
    )


def without_ending(name: str) -> str | None:
    """The name of the whole model by that of a packed one; None where it has none of `ENDINGS`."""
    name = name.rstrip("/")
    for ending in ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return None
