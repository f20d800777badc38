"""What `backend: unsloth` can do and cannot, refused before anything starts.

Unsloth itself is never imported here: it belongs into the workers, and there comes first.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

from actors.specs import ModelSpec, PolicySpec, RoleResources, RolloutSpec
from aligntune.errors import UserError
from cluster.specs import ClusterSpec

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


def check_weight_sync(
    backend: Backend,
    model: ModelSpec,
    policy: PolicySpec,
    rollout: RolloutSpec,
    cluster: ClusterSpec,
) -> None:
    """Whether what is to be sent of each version is all of what is trained, and can be sent so.
    Resources that are still open are checked once they are settled. Raises UserError."""
    match rollout.weight_sync.name:
        case "adapter":
            _check_adapter(model)
        case "nccl":
            _check_nccl(backend, policy, rollout, cluster)
        case "ipc":
            _check_ipc(policy, rollout, cluster)


def _check_adapter(model: ModelSpec) -> None:
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


def _check_nccl(
    backend: Backend, policy: PolicySpec, rollout: RolloutSpec, cluster: ClusterSpec
) -> None:
    """NCCL takes no GPU twice into one communicator, and rank 0 sends by vLLM's own code."""
    if backend == "unsloth":
        raise _refused(
            rollout,
            "sends by vLLM's own code, which does not run beside what backend=unsloth patches",
            "use backend=trl",
        )
    _check_workers(rollout)
    for role, resources in (("policy", policy.resources), ("rollout", rollout.resources)):
        if resources.gpus < 1 and "gpus" in resources.model_fields_set:
            raise _refused(
                rollout,
                f"sends from one whole GPU to another, and {role}.resources.gpus="
                f"{resources.gpus:g}",
                "set it to 1",
            )
    if _share_places(cluster):
        raise _refused(
            rollout,
            "sends from one GPU to another, and cluster.colocate has policy and rollout on the "
            "same",
            "set cluster.colocate=[] for a GPU of each",
        )


def _check_ipc(policy: PolicySpec, rollout: RolloutSpec, cluster: ClusterSpec) -> None:
    """A replica opens what the rank on its one GPU shares, and no other."""
    _check_workers(rollout)
    for role, resources in (("policy", policy.resources), ("rollout", rollout.resources)):
        if resources.gpus == 0 and "gpus" in resources.model_fields_set:
            raise _refused(
                rollout,
                f"reads the memory of a GPU, and {role}.resources.gpus=0",
                "give both a GPU",
            )
    if rollout.engine.shards > 1:
        raise _refused(
            rollout,
            "reads the memory of one GPU, and rollout.engine.tensor_parallel_size="
            f"{rollout.engine.shards}",
            "use 1",
        )
    if "colocate" in cluster.model_fields_set and not _share_places(cluster):
        raise _refused(
            rollout,
            "needs each replica on the GPU of a rank, and cluster.colocate does not put them there",
            "set cluster.colocate=[[policy, rollout]]",
        )
    both = "ranks" in policy.model_fields_set and "replicas" in rollout.model_fields_set
    if both and rollout.replicas > policy.ranks:
        raise _refused(
            rollout,
            f"needs each replica on the GPU of a rank, and rollout.replicas={rollout.replicas} are "
            f"more than policy.ranks={policy.ranks}",
            "lower them",
        )


def _check_workers(rollout: RolloutSpec) -> None:
    """Whether the replicas are vLLM's, with no more workers than shards."""
    if rollout.engine.name not in (rollout.weight_sync.engine, "auto"):
        raise _refused(
            rollout,
            f"sends weights into vLLM, and rollout.engine is {rollout.engine.name}",
            "use rollout.engine=vllm",
        )
    options = getattr(rollout.engine, "options", {})
    for option in ("pipeline_parallel_size", "data_parallel_size"):
        if options.get(option, 1) != 1:
            raise _refused(
                rollout,
                "knows the rollout.engine.tensor_parallel_size GPUs of a replica, and "
                f"rollout.engine.options has {option}",
                "remove it",
            )


def _share_places(cluster: ClusterSpec) -> bool:
    return any({"policy", "rollout"} <= set(group) for group in cluster.colocate)


def _refused(rollout: RolloutSpec, why: str, cure: str) -> UserError:
    named = f"rollout.weight_sync={rollout.weight_sync.name}"
    return UserError(f"{named} {why}; {cure}, or use rollout.weight_sync=full")


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
