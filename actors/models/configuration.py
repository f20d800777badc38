"""The configuration of a model, read without its weights, and what is told where there is none.

transformers is imported when a configuration is read: what is wrong with a model's name is told
without it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from actors.models.auto import import_light
from actors.models.hub import ask_once, why_silent
from actors.models.staging import StagingFailed, on_this_node
from actors.specs import ModelSpec

# transformers imports torchao where it is installed, for a quantiser that is not used here; its
# complaints about kernels for other machines would be the first thing a user reads.
for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


class ModelError(ValueError):
    """A model or tokenizer that cannot be used as asked; one line says why and what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(" ".join(reason.split()))  # the hub's own reasons have several lines


def local(spec: ModelSpec) -> ModelSpec:
    """`spec` with a model that is named by URI staged on this node. Raises ModelError."""
    try:
        return on_this_node(spec)
    except StagingFailed as error:
        raise ModelError(str(error)) from error


def configuration(spec: ModelSpec) -> Any:
    """The transformers configuration of the model that `spec` names. Raises ModelError."""
    spec = local(spec)
    ask_once(spec.name)
    return _read(spec)


def own_configuration(spec: ModelSpec) -> Any:
    """The same of a model that is to be loaded: a folder without one is told by what it holds.
    Raises ModelError."""
    spec = local(spec)
    require_source(spec.name)
    return _read(spec)


def _read(spec: ModelSpec) -> Any:
    import_light()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise no_configuration(spec.name, error) from error


def require_source(name: str) -> None:
    """Tell a folder that is not there from a hub name, before the hub is asked about a path."""
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"model folder {name!r} holds a LoRA adapter without its model; merge the two and "
                "give the merged folder"
            )
        raise ModelError(f"model folder {name!r} has no config.json: it holds no model")
    if folder.exists():
        raise ModelError(f"model {name!r} is a file; give the folder that holds config.json")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != 1:
        hub = "" if "/" in name else " (hub names have the form owner/name)"
        raise ModelError(f"model folder {name!r} does not exist{hub}")
    why_silent()  # before the hub's client tries for most of a minute


def not_had(name: str, reason: str) -> ModelError:
    """What to raise where a part of a model cannot be had: `reason`, unless no hub answers."""
    if not Path(name).is_dir() and (why := why_silent()):
        reason = (
            f"model {name!r} is not on this machine, and the hub {why}; check the network and its "
            "proxy, or name a local folder"
        )
    return ModelError(reason)


def no_configuration(name: str, error: Exception) -> ModelError:
    """What to raise where a model's configuration cannot be read."""
    return not_had(name, f"model {name!r} has no usable configuration: {error}")
