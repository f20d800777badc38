"""`aligntune launch`: a resolved config as what `cluster.launch` needs."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from aligntune.commands.places import is_here, models_and_data
from aligntune.config.auto import open_settings
from aligntune.config.code import code_names
from aligntune.config.ignored import check_cluster_keys
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import PreferenceConfig
from aligntune.config.tree import dump
from aligntune.data.folders import has_magic
from aligntune.errors import UserError
from aligntune.online.role_requests import role_request, role_requests
from cluster.bundles import BadRequest, RoleRequest, amounts
from cluster.launch import kuberay as kuberay_files
from cluster.launch import ray_up as ray_up_files
from cluster.launch import slurm as slurm_files
from cluster.launch.files import BadLaunch, Launch, label, sized


@dataclass(frozen=True)
class Size:
    """What the user says of the nodes; None: worked out from the roles."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_gib: int | None = None


def ray_up(
    path: Path,
    overrides: list[str],
    size: Size,
    *,
    provider: Literal["local", "aws"],
    storage: str,
    head_ip: str | None,
    worker_ips: Sequence[str],
    ssh_user: str,
    ssh_key: str,
    region: str | None,
    instance_type: str | None,
    image_id: str | None,
    nfs: str | None,
    token_file: str,
    venv: str | None,
    install: str | None,
) -> str:
    """A file for `ray up`. Raises UserError, one line, for whatever is wrong."""
    config = load_config(path, overrides)
    with _as_user_errors():
        if provider == "local" and size.nodes is None and head_ip:
            size = Size(
                1 + len(worker_ips), size.gpus_per_node, size.cpus_per_node, size.memory_gib
            )
        launch = _launch(config, size, storage, ray_up_files.CONFIG, overrides)
        if provider == "local":
            hosts = ray_up_files.on_premise(
                launch,
                head_ip,
                worker_ips,
                ssh_user,
                ssh_key,
                cpus=size.cpus_per_node,
                gpus=size.gpus_per_node,
            )
        else:
            if nfs is None:
                raise BadLaunch(
                    "--provider aws needs --nfs HOST:/EXPORT (such as an EFS): new machines share "
                    "no folder"
                )
            hosts = ray_up_files.aws(launch, region, instance_type, image_id)
        gpus = launch.size.gpus
        if (
            install is not None
            and size.gpus_per_node is None
            and _extra(config, gpus=1)
            and not gpus
        ):
            raise UserError(
                "--install takes vLLM along where nodes have GPUs, and the config leaves open "
                "whether the run takes any; say with --gpus-per-node how many a node has (0: none)"
            )
        return ray_up_files.render(
            launch,
            hosts,
            ray_up_files.choose_software(venv, install, _extra(config, gpus)),
            token_file=token_file,
            config_file=str(path.absolute()),
            nfs=nfs,
        )


def kuberay(
    path: Path,
    overrides: list[str],
    size: Size,
    *,
    kind: Literal["rayjob", "raycluster"],
    image: str,
    claim: str,
    secret: str,
    storage: str,
) -> str:
    """KubeRay manifests. Raises UserError, one line, for whatever is wrong."""
    config = load_config(path, overrides)
    with _as_user_errors():
        launch = _launch(config, size, storage, kuberay_files.CONFIG, [])
        names = kuberay_files.Namespace(image, claim, secret)
        return kuberay_files.render(launch, kind, names, dump(config))


def slurm(
    path: Path,
    overrides: list[str],
    size: Size,
    *,
    time: str,
    partition: str | None,
    account: str | None,
    token_file: str,
    venv: str,
) -> str:
    """A Slurm batch script. Raises UserError, one line, for whatever is wrong.

    The run starts in the current folder, which the nodes must share.
    """
    config = load_config(path, overrides)
    with _as_user_errors():
        launch = _launch(config, size, os.getcwd(), str(path.absolute()), overrides, outside=True)
        site = slurm_files.Site(time, partition, account)
        token = os.path.abspath(os.path.expanduser(token_file))
        return slurm_files.render(launch, site, venv=os.path.abspath(venv), token_file=token)


class _as_user_errors:
    """What cluster/ says of wrong input, as UserError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BadLaunch | BadRequest):
            raise UserError(str(error)) from error


def _launch(
    config: RunConfig | PreferenceConfig,
    size: Size,
    storage: str,
    config_path: str,
    overrides: Sequence[str],
    *,
    outside: bool = False,
) -> Launch:
    """`outside`: the output may lie beside the storage, on other shared storage."""
    if not PurePosixPath(storage).is_absolute():
        raise UserError(f"--storage {storage!r} is no absolute path; nodes have no common folder")
    check_cluster_keys(config.cluster.model_copy(update={"address": "auto"}))
    requests = _requests(config)
    colocate = config.cluster.colocate if isinstance(config, RunConfig) else []
    nodes, node_size = sized(
        requests,
        colocate,
        nodes=size.nodes,
        gpus_per_node=size.gpus_per_node,
        cpus_per_node=size.cpus_per_node,
        memory_gib=size.memory_gib,
    )
    return Launch(
        name=label(Path(config.output_dir).name),
        nodes=nodes,
        size=node_size,
        storage=storage,
        command=("aligntune", "train", config_path, *overrides, "cluster.address=auto"),
        ray_version=importlib.metadata.version("ray"),
        roles=tuple(f"{r.role} {r.replicas} x ({amounts(r.bundle)})" for r in requests),
        notes=(
            _output(config.output_dir, storage, outside),
            *_local(config, storage),
            *_own_code(config, storage),
        ),
    )


def _requests(config: RunConfig | PreferenceConfig) -> list[RoleRequest]:
    if isinstance(config, RunConfig):
        return role_requests(config)
    return [role_request("trainer", config.train.workers, config.train.resources)]


def _output(output_dir: str, storage: str, outside: bool) -> str:
    """Where the run directory is, as a note. UserError where nodes would not share it."""
    if "://" in output_dir:
        return f"The run directory is {output_dir}."
    folder = os.path.normpath(os.path.join(storage, output_dir))
    if not PurePosixPath(folder).is_relative_to(os.path.normpath(storage)):
        if not outside:
            raise UserError(
                f"output_dir {output_dir} does not lie in {storage}, the folder that the nodes "
                "share; make it relative, or change --storage"
            )
        return f"The run directory is {folder}: every node must share it."
    return f"The run directory is {folder}; every node must share {storage}."


def _local(config: RunConfig | PreferenceConfig, storage: str) -> Iterator[str]:
    """Models and data that are folders and files here: nodes need them too."""
    for key, value in models_and_data(config.model_dump(mode="json")):
        if os.path.isabs(value) or value.startswith(("./", "../", "~")):
            yield f"{key} is {value}: every node must have it there."
        elif has_magic(value):
            yield f"{key} is {value}: it must be in {storage}."
        elif is_here(value):
            yield f"{key} is {value} if it is in {storage}, else a hub name."


def _own_code(config: RunConfig | PreferenceConfig, storage: str) -> Iterator[str]:
    """The algorithm, rewards, tools, environments and agent of the user's own: nodes must find
    their modules and files."""
    algorithm = [("algorithm.name", config.algorithm_name)] if ":" in config.algorithm_name else []
    for key, target in (*algorithm, *code_names(config.model_dump(mode="json"))):
        place = target.rpartition(":")[0]
        package = place.partition(".")[0]
        if place.endswith(".py"):
            file = os.path.normpath(os.path.join(storage, place))
            yield f"{key} is {target}: every node must have it as {file}."
        elif package != "aligntune":
            yield (
                f"{key} is {target}: {package} must lie in {storage}, where the run starts, or be "
                "installed on every node."
            )


def _extra(config: RunConfig | PreferenceConfig, gpus: float) -> str:
    """Of aligntune on nodes with `gpus`: with vLLM where rollouts use it on them, or may."""
    may = gpus > 0 and "rollout.resources.gpus" in open_settings(config)
    vllm = (
        isinstance(config, RunConfig)
        and config.rollout.engine.name != "transformers"
        and (config.rollout.resources.gpus > 0 or may)
    )
    return "vllm-cuda" if vllm else ""
