"""Manifests for KubeRay: sized from the config, right by the CRDs, run on the head."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launch.files import NodeSize

KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms"}
HEALTH = {f"RAY_health_check_{n}" for n in ("period_ms", "timeout_ms", "failure_threshold")}


def manifests(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    settings_map, made = yaml.safe_load_all(text)
    return settings_map, made


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_kuberay_manifests_ask_for_what_the_roles_need(launch: Any, kind: str) -> None:
    code, text, err = launch(
        *("kuberay", "--image", "registry/aligntune:1", "--gpus-per-node", "4", "--kind", kind),
        *("--cpus-per-node", "12", "--memory-per-node", "64", "train.steps=7"),
    )
    assert code == 0, err
    head = text.partition("\napiVersion")[0]
    assert "KubeRay 1.6 or newer" in head
    settings_map, made = manifests(text)
    name = made["metadata"]["name"]
    assert f"kubectl create secret generic {name}-env --from-env-file=FILE\n" in head
    assert ("unset RAY_ADDRESS" in head) == (kind == "raycluster")
    assert yaml.safe_load(settings_map["data"]["config.yaml"])["train"]["steps"] == 7
    assert made["apiVersion"] == "ray.io/v1"
    assert made["kind"] == {"rayjob": "RayJob", "raycluster": "RayCluster"}[kind]
    spec = made["spec"]
    if kind == "rayjob":
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["preRunningDeadlineSeconds"] > 0
        spec = spec["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "aligntune-token"}
    (workers,) = spec["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
    for group in (spec["headGroupSpec"], workers):
        assert group["rayStartParams"]["num-gpus"] == "4"
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        limits = container["resources"]["limits"]
        assert limits == {"cpu": "12", "memory": "64Gi", "nvidia.com/gpu": "4"}
        assert group["rayStartParams"]["memory"] == str(NodeSize(12, 4, 64).role_memory_bytes)
        assert {e["name"] for e in container["env"]} >= KEEPALIVE | HEALTH
        (variables,) = container["envFrom"]
        assert variables == {"secretRef": {"name": f"{name}-env", "optional": True}}
        mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
        assert mounts["storage"] == container["workingDir"] == "/shared"
        assert mounts["shm"] == "/dev/shm"
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert set(volumes) == set(mounts)
        assert volumes["storage"]["persistentVolumeClaim"]["claimName"] == "aligntune"
        assert volumes["config"]["configMap"]["name"] == settings_map["metadata"]["name"]
        assert volumes["shm"]["emptyDir"]["sizeLimit"] == "20Gi"  # the object store, rounded up


def job_line(entrypoint: str) -> str:
    """The shell line that KubeRay makes of an entrypoint for the submitter pod."""
    job = "--address http://head:8265"
    return (
        f"if ! ray job status {job} id >/dev/null 2>&1 ; then ray job submit {job} --no-wait "
        f"--submission-id id -- {entrypoint} ; fi ; ray job logs {job} --follow id"
    )


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_what_trains_reaches_ray_and_nothing_runs_where_it_is_submitted(
    launch: Any, tmp_path: Path, kind: str
) -> None:
    storage = tmp_path / "shared"
    storage.mkdir()
    code, text, err = launch(
        *("kuberay", "--image", "x", "--kind", kind, "--nodes", "2"),
        *("--storage", str(storage), "data.name=it's; touch local"),
    )
    assert code == 0, err
    settings_map, made = manifests(text)
    if kind == "rayjob":
        line = job_line(made["spec"]["entrypoint"])
    else:
        (line,) = [one[1:] for one in text.splitlines() if "ray job submit" in one]
    mounted = tmp_path / "etc"
    mounted.mkdir()
    for name, body in settings_map["data"].items():
        (mounted / name).write_text(body)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, code_ in {
        "ray": '[ "$2" = status ] && exit 1; [ "$2" = submit ] || exit 0; '
        'while [ "$1" != -- ]; do shift; done; shift; printf "%s\\0" "$@" > submitted',
        "python": 'echo "python $*" >> ran',
        "aligntune": 'echo "aligntune $*" >> ran; echo $$ > pid',
    }.items():
        (binaries / name).write_text(f"#!/bin/bash\n{code_}\n")
        (binaries / name).chmod(0o755)
    environment = {"PATH": f"{binaries}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.glob("**/ran"))
    words = (tmp_path / "submitted").read_text().split("\0")[:-1]
    # Ray's command line quotes each word for the shell on the head.
    there = shlex.join(words).replace("/etc/aligntune", str(mounted))
    process = subprocess.Popen(["sh", "-c", f"exec {there}"], cwd="/", env=environment)
    assert process.wait(20) == 0
    ran = (storage / "ran").read_text().splitlines()
    assert ran[0] == "python -P -m cluster.await_nodes 2 600"
    assert ran[1:] == ["aligntune train /etc/aligntune/config.yaml cluster.address=auto"]
    # What Ray stops is the run itself, without a shell between that would not pass a signal on.
    assert (storage / "pid").read_text() == f"{process.pid}\n"
    assert not list(tmp_path.glob("**/local"))


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Fields that a CRD's schema does not have, and values of another type or outside an enum."""
    if schema.get("x-kubernetes-int-or-string") or schema.get("x-kubernetes-embedded-resource"):
        return []
    kind = schema.get("type")
    types = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "boolean": bool,
        "number": (int, float),
    }
    if kind and not isinstance(value, types[kind]):
        return [f"{path}: {value!r} is no {kind}"]
    wrong = []
    if "enum" in schema and value not in schema["enum"]:
        wrong.append(f"{path}: {value!r} is none of {schema['enum']}")
    if isinstance(value, dict):
        fields, rest = schema.get("properties", {}), schema.get("additionalProperties")
        wrong += [
            f"{path}.{key} is missing" for key in schema.get("required", []) if key not in value
        ]
        for key, inner in value.items():
            if key in fields:
                wrong += unknown_fields(inner, fields[key], f"{path}.{key}")
            elif isinstance(rest, dict):
                wrong += unknown_fields(inner, rest, f"{path}.{key}")
            elif not schema.get("x-kubernetes-preserve-unknown-fields"):
                wrong.append(f"{path}.{key} is unknown")
    if isinstance(value, list):
        for index, inner in enumerate(value):
            wrong += unknown_fields(inner, schema["items"], f"{path}[{index}]")
    return wrong


CRDS = os.environ.get("ALIGNTUNE_KUBERAY_CRDS")


@pytest.mark.slow
@pytest.mark.skipif(
    CRDS is None, reason="ALIGNTUNE_KUBERAY_CRDS names no folder with KubeRay's CRD files"
)
@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
@pytest.mark.parametrize("nodes", ["1", "3"])
def test_kuberay_manifests_have_no_field_that_the_crd_lacks(
    launch: Any, kind: str, nodes: str
) -> None:
    (crd,) = Path(CRDS or "").glob(f"*{kind}s.yaml")
    versions = yaml.load(crd.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"][
        "versions"
    ]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema["properties"]["metadata"] = {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    }
    code, text, err = launch("kuberay", "--image", "x", "--kind", kind, "--nodes", nodes)
    assert code == 0, err
    _, made = manifests(text)
    assert unknown_fields(made, schema) == []
    made["spec"]["shutdown"] = True
    assert unknown_fields(made, schema) == [".spec.shutdown is unknown"]
