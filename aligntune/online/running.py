"""What of an online run needs Ray: the place of its roles, and what may end them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from actors.answers import ReplicaLost
from actors.environments.base import EpisodeFailed
from actors.environments.specs import EpisodeCode
from actors.models.configuration import ModelError
from actors.reward import Criterion
from actors.scoring.criteria import RewardFailed
from actors.supervise import RoleExhausted
from aligntune import imports
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed, UserError
from aligntune.online.learner import PolicyLost
from aligntune.online.role_requests import role_requests
from aligntune.online.roles import Roles
from aligntune.runs.lifecycle import ray_runs
from aligntune.tracking.metrics import NotFinite
from cluster.bundles import totals
from cluster.placement import DoesNotFit
from cluster.reservation import reserve
from cluster.session import ClusterUnreachable, RayTooSlow, session

FAILURES = (
    RoleExhausted,
    ReplicaLost,
    PolicyLost,
    EpisodeFailed,
    ModelError,
    RewardFailed,
    NotFinite,
    ArithmeticError,
)
"""Errors whose message is written for people: a traceback of ours would only bury it."""


@contextmanager
def reserved(
    config: RunConfig,
    criteria: Sequence[Criterion],
    total_steps: int,
    code: EpisodeCode | None,
    stage: Callable[[str], None],
    only: Collection[str],
) -> Iterator[Roles]:
    """A Ray session with the place of every role of `only` reserved; `stage` hears how far it is.

    Raises UserError where the cluster cannot be had or is too small, and RunFailed where a Ray of
    this machine was too slow or one of `FAILURES` ended the work, with its one line.
    """
    requests = [each for each in role_requests(config) if each.role in only]
    asked = totals(requests)
    cluster = config.cluster
    try:
        modules = imports.of_online(config)
        with session(cluster, cpus=asked["CPU"], imports=modules) as address:
            stage(ray_runs(address))
            with reserve(
                requests,
                cluster.placement_timeout_s,
                cluster.colocate,
                Path(config.output_dir).name,
            ) as reservation:
                yield Roles(config, reservation, criteria, total_steps, code)
    except FAILURES as told:
        raise RunFailed(str(told)) from None
    except RayTooSlow as error:
        raise RunFailed(str(error)) from error
    except (DoesNotFit, ClusterUnreachable) as error:
        raise UserError(str(error)) from error
