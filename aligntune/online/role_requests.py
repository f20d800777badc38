"""What each role of a run asks of the cluster. Light: no framework is imported."""

from __future__ import annotations

from actors.specs import RoleResources, RolloutSpec
from aligntune.config.online import RunConfig
from aligntune.errors import UserError
from aligntune.resources import role_request
from cluster.bundles import RoleRequest


def role_requests(config: RunConfig) -> list[RoleRequest]:
    """What the run's roles ask for; no reference or critic where the algorithm needs none.

    Raises UserError where the rollouts' GPUs are not those of their shards.
    """
    requests = [
        role_request("policy", config.policy.ranks, config.policy.resources),
        role_request("rollout", config.rollout.replicas, _of_all_shards(config.rollout)),
        role_request("reward", config.reward.replicas, config.reward.resources),
    ]
    if config.algorithm.needs.reference:
        reference = config.reference
        requests.append(role_request("reference", reference.replicas, reference.resources))
    if config.algorithm.needs.critic:
        requests.append(role_request("critic", config.critic.ranks, config.critic.resources))
    return requests


def _of_all_shards(spec: RolloutSpec) -> RoleResources:
    """The resources of one rollout replica: on GPUs, one for each tensor-parallel shard."""
    resources, shards = spec.resources, spec.engine.shards
    if shards == 1 or resources.gpus == 0:
        return resources
    if resources.gpus not in (1, shards):
        raise UserError(
            f"rollout.resources.gpus={resources.gpus:g} with rollout.engine.tensor_parallel_size="
            f"{shards}: each shard has one GPU, so write 1 (each) or {shards} (of the replica)"
        )
    return resources.model_copy(update={"gpus": float(shards)})
