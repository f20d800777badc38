"""What `backend: unsloth` can do and cannot, refused before anything starts.

Unsloth itself is never imported here: it belongs into the workers, and there comes first.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from actors.specs import ModelSpec, PolicySpec, RoleResources, RolloutSpec
from aligntune.errors import UserError

Backend = Literal["trl", "unsloth"]


def check_backend(
    backend: Backend, model: ModelSpec, resources: RoleResources, where: str, sharded: str | None
) -> None:
    """Whether the backend can load and step `model` on `resources`. Raises UserError.

    `where` is the section of `resources`, `sharded` the setting that asks
    for ranks that share one model, if any does.
    """
    if model.load_in_4bit:
        if backend != "unsloth":
            raise UserError("model.load_in_4bit needs backend=unsloth")
        if model.lora is None:
            raise UserError("model.load_in_4bit freezes the model, so it needs model.lora")
        if not resources.gpus and "gpus" in resources.model_fields_set:
            raise UserError(
                f"model.load_in_4bit needs a GPU and {where}.resources.gpus is 0; set it, or "
                "remove model.load_in_4bit"
            )
    if backend != "unsloth":
        return
    if sharded is not None:
        raise UserError(f"{sharded} does not run with backend=unsloth; use backend=trl")
    if model.attention != "sdpa":
        raise UserError(
            f"model.attention={model.attention} has no effect with backend=unsloth, which chooses "
            "the attention kernel itself; remove it"
        )


def check_shared_prompts(backend: Backend, policy: PolicySpec) -> None:
    """Whether the settings let a group's prompt be computed once. Raises UserError."""
    if not policy.shared_prompts:
        return
    if policy.packing is False:
        raise UserError(
            "policy.shared_prompts packs rows and policy.packing is false; remove one of the two"
        )
    if backend == "unsloth":
        raise UserError(
            "policy.shared_prompts has no effect with backend=unsloth, which chooses the attention "
            "kernel itself; remove it, or use backend=trl"
        )


def check_weight_sync(rollout: RolloutSpec, model: ModelSpec) -> None:
    """Whether what is to be sent of each version is all of what is trained. Raises UserError."""
    if rollout.weight_sync.name != "adapter":
        return
    if model.lora is None:
        raise UserError(
            "rollout.weight_sync=adapter sends LoRA adapters and model.lora is not set; set it, or "
            "use rollout.weight_sync=full or delta"
        )
    if model.load_in_4bit:
        raise UserError(
            "rollout.weight_sync=adapter leaves the rollouts' frozen weights as they are, and "
            "model.load_in_4bit rounds the policy's; use rollout.weight_sync=full"
        )


def check_installed(backend: Backend) -> None:
    """Whether what `backend` needs is installed on this machine, for runs that stay on it; workers
    elsewhere say so themselves. Raises UserError."""
    if backend == "unsloth":
        for name in ("unsloth", "unsloth_zoo"):
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"backend=unsloth needs {name}, which is not installed; install it as "
                    "scripts/install.sh does, or use backend=trl"
                )
