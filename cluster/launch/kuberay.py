"""Renders KubeRay manifests: a RayJob, which ends with the run, or a RayCluster, which stays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from cluster.launch.files import (
    JOBS_PORT,
    METRICS_PORT,
    OBJECT_STORE_SHARE,
    PORT,
    RAY_SETTINGS,
    BadLaunch,
    Launch,
    as_yaml,
)

Kind = Literal["rayjob", "raycluster"]
FOLDER = "/etc/aligntune"  # where the ConfigMap is mounted
CONFIG = f"{FOLDER}/config.yaml"
# One command without shell syntax: KubeRay pastes the entrypoint into a shell line of the submitter
# pod, where what follows a && would run, instead of on the cluster.
ENTRYPOINT = f"bash {FOLDER}/run.sh"
START_SECONDS = 1800  # for the pods to run; then the job fails instead of waiting
OLDEST = "1.6"  # the first with preRunningDeadlineSeconds and authOptions.secretName
KEEP_SECONDS = 600  # the finished job's pods, for their logs


@dataclass(frozen=True)
class Namespace:
    """What lies in the cluster already."""

    image: str  # has aligntune in it
    claim: str  # a ReadWriteMany volume claim
    secret: str  # its key auth_token is the token


def render(launch: Launch, kind: Kind, names: Namespace, config: str) -> str:
    """The manifests: a ConfigMap with config and script, and the RayJob or RayCluster.

    Raises:
        BadLaunch: no image.
    """
    if not names.image:
        raise BadLaunch(
            f"kuberay needs --image, one with aligntune in it: build it on Ray {launch.ray_version}"
            " and push it to a registry that the nodes reach"
        )
    cluster = _cluster(launch, names)
    made = (
        _object("RayJob", launch.name, _job(cluster))
        if kind == "rayjob"
        else _object("RayCluster", launch.name, cluster)
    )
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{launch.name}-config"},
        "data": {
            "config.yaml": config,
            "run.sh": f"# Ray runs this on the head.\n{launch.start}\n",
        },
    }
    head = launch.head(
        f"kuberay --kind {kind}",
        "",
        f"It needs KubeRay {OLDEST} or newer.",
        f"Before `kubectl apply -f`: the claim {names.claim}, ReadWriteMany and writable for the",
        "image's user, and the token:",
        f"  kubectl create secret generic {names.secret} --from-file=auth_token=TOKEN_FILE",
        "The run and its roles have what another secret holds, if it is there (lines NAME=value,",
        "such as of HF_TOKEN, WANDB_API_KEY, HTTPS_PROXY, NCCL_SOCKET_IFNAME):",
        f"  kubectl create secret generic {_variables(launch)} --from-env-file=FILE",
        *(
            [
                "Then start the run through the head's Jobs port:",
                f"  kubectl port-forward service/{launch.name}-head-svc {JOBS_PORT} &",
                "  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=TOKEN_FILE",
                "  unset RAY_ADDRESS RAY_API_SERVER_ADDRESS",  # which Ray prefers to --address
                f"  ray job submit --address http://localhost:{JOBS_PORT} --no-wait "
                f"-- {ENTRYPOINT}",
            ]
            if kind == "raycluster"
            else [
                "A retry (backoffLimit) has a new cluster and goes on from the newest checkpoint."
            ]
        ),
    )
    return head + as_yaml(settings) + "---\n" + as_yaml(made)


def _variables(launch: Launch) -> str:
    """The secret whose keys are environment variables of every pod; it need not be there."""
    return f"{launch.name}-env"


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def _job(cluster: dict[str, Any]) -> dict[str, Any]:
    return {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "preRunningDeadlineSeconds": START_SECONDS,
        "backoffLimit": 2,
        "rayClusterSpec": cluster,
    }


def _cluster(launch: Launch, names: Namespace) -> dict[str, Any]:
    workers = launch.nodes - 1
    tree: dict[str, Any] = {
        "rayVersion": launch.ray_version,
        "authOptions": {"mode": "token", "secretName": names.secret},
        "headGroupSpec": {
            "rayStartParams": {
                **_start(launch),
                "dashboard-host": "0.0.0.0",
                "dashboard-port": str(JOBS_PORT),
            },
            "template": _pod(launch, names, "ray-head"),
        },
    }
    if workers:
        tree["workerGroupSpecs"] = [
            {
                "groupName": "workers",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": workers,
                "rayStartParams": _start(launch),
                "template": _pod(launch, names, "ray-worker"),
            }
        ]
    return tree


def _start(launch: Launch) -> dict[str, str]:
    return {
        "num-cpus": str(launch.size.cpus),
        "num-gpus": str(launch.size.gpus),
        # KubeRay's default is all of the pod's, the object store's share too.
        "memory": str(launch.size.role_memory_bytes),
        "metrics-export-port": str(METRICS_PORT),
    }


def _pod(launch: Launch, names: Namespace, container: str) -> dict[str, Any]:
    size = launch.size
    amounts = {"cpu": str(size.cpus), "memory": f"{size.memory_gib}Gi"}
    if size.gpus:
        amounts["nvidia.com/gpu"] = str(size.gpus)
    ports = {"metrics": METRICS_PORT}
    if container == "ray-head":
        ports |= {"gcs-server": PORT, "dashboard": JOBS_PORT}
    # Where /dev/shm is smaller than the object store, Ray puts that on the disk.
    shm = math.ceil(size.memory_gib * OBJECT_STORE_SHARE)
    return {
        "spec": {
            "containers": [
                {
                    "name": container,
                    "image": names.image,
                    "workingDir": launch.storage,
                    "resources": {"limits": dict(amounts), "requests": dict(amounts)},
                    "env": [{"name": n, "value": v} for n, v in RAY_SETTINGS.items()],
                    "envFrom": [{"secretRef": {"name": _variables(launch), "optional": True}}],
                    "ports": [{"name": n, "containerPort": p} for n, p in ports.items()],
                    "volumeMounts": [
                        {"name": "storage", "mountPath": launch.storage},
                        {"name": "config", "mountPath": FOLDER, "readOnly": True},
                        {"name": "shm", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "storage", "persistentVolumeClaim": {"claimName": names.claim}},
                {"name": "config", "configMap": {"name": f"{launch.name}-config"}},
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm}Gi"}},
            ],
        }
    }
