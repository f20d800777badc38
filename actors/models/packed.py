"""Models whose weights are packed by bitsandbytes, as hubs have them beside whole ones.

Packed weights can be read and no more: no gradient reaches them, and vLLM does not load them. What
is trained needs the whole ones, which have the same name without its ending.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from actors.models.loading import ModelError
from actors.models.positions import configuration
from actors.specs import ModelSpec

ENDINGS = ("-unsloth-bnb-4bit", "-bnb-4bit")
"""Of the names of packed models, the longer first."""

KEPT_IN_4_BITS = "model.load_in_4bit keeps frozen ones in 4 bits"


def is_packed(spec: ModelSpec) -> bool:
    """Whether bitsandbytes has packed the weights that `spec` names, by its configuration alone.
    Raises ModelError without one."""
    found: Any = getattr(configuration(spec), "quantization_config", None)
    said: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    how = said.get("quant_method")  # an older bitsandbytes says its bits alone
    return how == "bitsandbytes" or (
        how is None and bool(said.get("load_in_4bit") or said.get("load_in_8bit"))
    )


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
