"""Launch files: sized from the config, right by their schemas, tokens by path, clear refusals."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aligntune import cli
from cluster import await_nodes
from cluster.bundles import RoleRequest, bundle_sets
from cluster.launch import slurm
from cluster.launch.files import RAY_SETTINGS, BadLaunch, NodeSize, label, sized
from cluster.placement import Placement, place
from cluster.resources import Cluster, Node
from tests.cluster.nodes import wait_for
from tests.stand_ins import REPOSITORY

KEEPALIVE = {"RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms"}
HEALTH = {f"RAY_health_check_{n}" for n in ("period_ms", "timeout_ms", "failure_threshold")}
HOSTS = ["--head-ip", "10.0.0.1", "--worker-ips", "10.0.0.2,10.0.0.3", "--storage", "/shared"]
VENV = ["--venv", "/opt/aligntune"]
AWS = [
    *("--provider", "aws", "--region", "us-west-2", "--instance-type", "p4d.24xlarge"),
    *("--storage", "/shared", "--nfs", "fs-1:/"),
]
IMAGE = ["--image-id", "ami-0123456789abcdef0"]
URL = ["--install", "git+https://git.example/aligntune"]
OPEN = ["policy.resources.gpus=auto", "rollout.resources.gpus=auto"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Four policy ranks and two rollout replicas of two GPUs: eight GPUs, seven roles' CPUs."""
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.0},
        "model": {"name": "Qwen/Qwen2.5-0.5B-Instruct"},
        "data": {"path": "openai/gsm8k", "name": "main", "prompt_column": "question"},
        "rewards": ["math"],
        "output_dir": "runs/My_Run",
        "policy": {"strategy": "deepspeed", "ranks": 4, "resources": {"gpus": 1}},
        "rollout": {
            "replicas": 2,
            "engine": {"name": "vllm", "tensor_parallel_size": 2},
            "resources": {"gpus": 2},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def launch(config: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`aligntune launch TARGET CONFIG ...`: exit code, output, errors."""

    def call(target: str, *options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["launch", target, str(config), *options])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


# Sizes


def test_nodes_are_as_many_as_the_roles_need() -> None:
    requests = [RoleRequest("policy", 4, 1, 1.0), RoleRequest("rollout", 2, 1, 2.0)]
    assert sized(requests)[0] == 1
    assert sized(requests)[1].gpus == 8
    assert sized(requests, gpus_per_node=4)[0] == 2
    assert sized(requests, nodes=4)[1].gpus == 2
    spread = [RoleRequest("rollout", 5, 1, 0.0, "STRICT_SPREAD")]
    assert sized(spread)[0] == 5


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_sized_has_a_place_for_every_role(roles: list[tuple[int, int, float]]) -> None:
    requests = [RoleRequest(f"role{i}", n, cpus, gpus) for i, (n, cpus, gpus) in enumerate(roles)]
    nodes, size = sized(requests)

    def placed(count: int) -> bool:
        one = (float(size.cpus), float(size.gpus), size.memory_gib * 2**30)
        cluster = Cluster(tuple(Node(f"{i}", *one) for i in range(count)), "described")
        return isinstance(place(bundle_sets(requests), cluster, advice=False), Placement)

    assert placed(nodes)
    assert nodes == 1 or not placed(nodes - 1)


def test_a_replica_that_no_node_can_hold_is_refused_with_both_sizes() -> None:
    with pytest.raises(BadLaunch, match=r"one rollout \(1 CPU, 4 GPU\) .*2 GPU.*--gpus-per-node"):
        sized([RoleRequest("rollout", 1, 1, 4.0)], gpus_per_node=2)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_labels_are_dns_labels(name: str) -> None:
    made = label(name)
    assert 1 <= len(made) <= 63
    assert made[0].isalpha()
    assert made[-1] != "-"
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize("gib", [2, 8, 64, 512, 2048])
def test_roles_are_promised_no_more_memory_than_ray_offers(
    gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import utils

    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: 2**50)  # no smaller object store
    free = int((gib - max(1.0, 0.05 * gib)) * 2**30)
    offered = free - utils.resolve_object_store_memory(free)
    promised = NodeSize(1, 0, gib).role_memory_bytes
    assert 0.3 * gib * 2**30 < promised <= offered


def test_a_role_that_needs_what_ray_keeps_of_a_node_is_refused() -> None:
    def fits(memory_gib: int) -> tuple[int, NodeSize]:
        request = RoleRequest("rollout", 1, 1, 0.0, memory_bytes=memory_gib * 2**30)
        return sized([request], memory_gib=64)

    assert fits(42)[0] == 1
    with pytest.raises(BadLaunch, match=r"64 GiB \(42\.5 GiB of it for roles\); raise"):
        fits(50)


# ray up


def check_ray_schema(text: str) -> dict[str, Any]:
    """The file as Ray's own check takes it, after Ray's own defaults."""
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    tree = yaml.safe_load(text)
    validate_config(tree)
    if tree["provider"]["type"] == "local":
        from ray.autoscaler._private.util import prepare_config

        tree = prepare_config(tree)
    else:
        tree = fillout_defaults(tree)
    validate_config(tree)
    return tree


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [*HOSTS, "--install", "/shared/aligntune-0.1.0-py3-none-any.whl"],
        [*HOSTS, "--nfs", "10.0.0.9:/export", *VENV, "--gpus-per-node", "4"],
        [*AWS, *IMAGE, *URL, "--gpus-per-node", "4"],
    ],
    ids=["hosts", "hosts with NFS", "aws"],
)
def test_ray_up_files_pass_rays_own_schema(launch: Any, options: list[str]) -> None:
    code, text, err = launch("ray-up", *options)
    assert code == 0, err
    check_ray_schema(text)


def test_ray_ups_own_check_would_see_an_unknown_key(launch: Any) -> None:
    import jsonschema

    code, text, _ = launch("ray-up", *HOSTS, *VENV)
    assert code == 0
    with pytest.raises(jsonschema.ValidationError):
        check_ray_schema(text + "speed: 1\n")


def test_a_ray_up_file_sets_what_a_cluster_needs_on_every_node(launch: Any, config: Path) -> None:
    code, text, err = launch(
        *("ray-up", *HOSTS, *VENV, "train.steps=7", "--token-file", "/keys/token")
    )
    assert code == 0, err
    tree = yaml.safe_load(text)
    assert tree["provider"]["head_ip"] == "10.0.0.1"
    assert tree["max_workers"] == len(tree["provider"]["worker_ips"]) == 2
    assert tree["file_mounts"]["~/.aligntune/token"] == "/keys/token"
    assert tree["file_mounts"]["~/.aligntune/config.yaml"] == str(config)
    environment = next(c for c in tree["setup_commands"] if c.endswith("> ~/.aligntune/env"))
    for name, value in RAY_SETTINGS.items():
        assert f"export {name}={value}" in environment
    assert "RAY_AUTH_MODE=token" in environment
    assert "RAY_enable_autoscaler_v2=0" in environment
    assert any("chmod 600 ~/.aligntune/token" in c for c in tree["setup_commands"])
    assert not any("pip install" in command for command in tree["setup_commands"])
    for start in (tree["head_start_ray_commands"], tree["worker_start_ray_commands"]):
        assert all(command.startswith(". ~/.aligntune/env; ") for command in start)
    (run,) = tree["head_setup_commands"]
    assert "cd /shared && python -P -m cluster.await_nodes 3 600 && exec aligntune train" in run
    assert "train.steps=7 cluster.address=auto" in run
    assert "RAY_UP_enable_autoscaler_v2=0 ray up" in text


PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize(
    ("install", "taken"),
    [
        ("dist/aligntune-0.1.0-py3-none-any.whl", ["{home}/.aligntune/{name}[vllm-cuda]"]),
        ("/shared/{name}", ["/shared/{name}[vllm-cuda]"]),
        ("git+https://git.example/a", ["aligntune[vllm-cuda] @ git+https://git.example/a"]),
        ("aligntune[x] @ https://git.example/a", ["aligntune[x] @ https://git.example/a"]),
    ],
    ids=["a file here", "a path there", "a URL", "a requirement with a URL"],
)
@pytest.mark.parametrize("where", ["hosts", "aws"])
def test_aligntune_comes_from_what_the_user_names_and_never_by_its_name(
    launch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    install: str,
    taken: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"name": "aligntune-0.1.0-py3-none-any.whl", "home": str(tmp_path / "home")}
    wheel = tmp_path / "dist" / names["name"]
    wheel.parent.mkdir()
    wheel.touch()
    options = HOSTS if where == "hosts" else [*AWS, *IMAGE]
    code, text, err = launch("ray-up", *options, "--install", install.format(**names))
    assert code == 0, err
    tree = yaml.safe_load(text)
    copied = [there for there, here in tree["file_mounts"].items() if here == str(wheel)]
    assert copied == (["~/.aligntune/" + names["name"]] if install.startswith("dist") else [])

    binaries = tmp_path / "home" / ".aligntune" / "venv" / "bin"
    for folder in (tmp_path / "stubs", binaries):
        folder.mkdir(parents=True)
    (binaries / "pip").write_text('#!/bin/sh\nfor word; do echo "$word"; done >> "$HOME/pip"\n')
    (tmp_path / "stubs" / PYTHON).write_text("#!/bin/sh\n")
    (binaries / "python").write_text("#!/bin/sh\nexit 1\n")  # which has no boto3
    for program in (binaries / "pip", binaries / "python", tmp_path / "stubs" / PYTHON):
        program.chmod(0o755)
    commands = [*tree["setup_commands"], *tree["head_setup_commands"]]
    for command in [c for c in commands if "/bin/pip" in c or "ensurepip" in c]:
        environment = {"HOME": names["home"], "PATH": f"{tmp_path / 'stubs'}:/usr/bin:/bin"}
        subprocess.run(["bash", "-ec", command], env=environment, check=True)
    expected = ["install", *(word.format(**names) for word in taken)]
    expected += ["install", "boto3"] if where == "aws" else []
    assert (tmp_path / "home" / "pip").read_text().splitlines() == expected


@pytest.mark.parametrize(("gpus", "extra"), [("4", True), ("0", False)])
def test_vllm_comes_with_aligntune_where_the_user_says_that_hosts_have_gpus(
    launch: Any, gpus: str, extra: bool
) -> None:
    code, text, err = launch("ray-up", *HOSTS, *URL, *OPEN, "--gpus-per-node", gpus)
    assert code == 0, err
    assert ("aligntune[vllm-cuda] @" in text) == extra


@pytest.mark.slow
def test_machines_of_aws_have_an_image_and_a_mounted_folder_that_their_user_owns(
    launch: Any, tmp_path: Path
) -> None:
    code, text, err = launch("ray-up", *AWS, *IMAGE, *URL, "--storage", f"{tmp_path}/shared")
    assert code == 0, err
    assert "boto3" in text
    assert "NFS (TCP port 2049)" in text
    tree = yaml.safe_load(text)
    assert "&id" not in text
    for machine in tree["available_node_types"].values():
        assert machine["node_config"]["ImageId"] == "ami-0123456789abcdef0"
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, body in {
        "sudo": 'echo "$@" >> "$HOME/done"; env "$@"',
        "cloud-init": 'echo "cloud-init $*" >> "$HOME/done"',
        "apt-get": "",
        "mountpoint": "exit 1",
        "mount": 'for last; do :; done; chmod 500 "$last"',
        "chown": 'shift; chmod 700 "$1"',
        # What a user who is not root could do, also where root runs the tests.
        "test": 'if [ "$1" = -w ]; then [ "$(stat -c %a "$2")" = 700 ]; else exec [ "$@" ]; fi',
    }.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    first = next(i for i, c in enumerate(tree["setup_commands"]) if "mount.nfs4" in c)
    for command in tree["setup_commands"][first : first + 4]:
        subprocess.run(
            ["bash", "-ec", f"enable -n test; {command.replace('mount.nfs4', 'no.such')}"],
            env={"HOME": str(tmp_path), "PATH": f"{stubs}:/usr/bin:/bin"},
            check=True,
        )
    waited, _, packages, made, mounted, owned = (tmp_path / "done").read_text().splitlines()
    assert waited == "cloud-init status --wait"
    assert packages.endswith("install -y -qq nfs-common")
    assert made == f"mkdir -p {tmp_path}/shared"
    assert mounted.startswith("mount -t nfs4 -o nfsvers=4.1,hard,timeo=600,noresvport fs-1:/ ")
    assert owned == f"chown {os.getuid()}:{os.getgid()} {tmp_path}/shared"

    code, text, _ = launch("ray-up", *AWS, *IMAGE, *VENV)
    assert code == 0
    assert "no boto3 in /opt/aligntune; install it there" in text


def test_storage_of_hosts_that_cannot_be_written_to_ends_the_setup(
    launch: Any, tmp_path: Path
) -> None:
    code, text, err = launch("ray-up", *HOSTS[:4], *VENV, "--storage", str(tmp_path))
    assert code == 0, err
    (command,) = [c for c in yaml.safe_load(text)["setup_commands"] if "test -w" in c]
    said = subprocess.run(
        ["bash", "-ec", command.replace(f"test -w {tmp_path}", "false")],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert f"aligntune: {tmp_path} cannot be written to" in said.stderr
    subprocess.run(["bash", "-ec", command], check=True)


@pytest.mark.parametrize("target", ["ray-up", "kuberay", "slurm"])
def test_code_of_the_users_own_is_said_to_be_needed_where_the_run_starts(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"ray-up": [*HOSTS, *VENV], "kuberay": ["--image", "x"], "slurm": []}[target]
    storage = str(tmp_path) if target == "slurm" else "/shared"
    needed = f"# rewards.1.function is mine.own:f: mine must lie in {storage}, where the run starts"
    rewards = "rewards=[math, 'mine.own:f', 'aligntune.rewards.text:contains']"
    code, text, err = launch(target, *options, rewards)
    assert code == 0, err
    assert needed in text
    assert text.count("must lie in") == 1
    assert "must lie in" not in launch(target, *options)[1]


@pytest.mark.parametrize(
    ("setting", "name", "needed"),
    [
        ("rewards=['sub/a.py:f']", "sub/a.py:f", "every node must have it as /shared/sub/a.py."),
        ("rewards=['./a.py:f']", "./a.py:f", "every node must have it as /shared/a.py."),
        ("rewards=['/my/a.py:f']", "/my/a.py:f", "every node must have it as /my/a.py."),
        ("tools=['a.py:add']", "a.py:add", "every node must have it as /shared/a.py."),
        ("environment='my.games:Chess'", "my.games:Chess", "my must lie in /shared, where the run"),
        ("agent='../a.py:play'", "../a.py:play", "every node must have it as /a.py."),
    ],
)
def test_files_and_every_kind_of_code_are_said_to_be_needed(
    launch: Any, setting: str, name: str, needed: str
) -> None:
    code, text, err = launch("kuberay", "--image", "x", setting)
    assert code == 0, err
    key = {"rewards": "rewards.0.function", "tools": "tools.0"}.get(kind := setting.split("=")[0])
    assert f"# {key or kind} is {name}: {needed}" in text


def test_models_and_data_that_lie_here_are_said_to_be_needed(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my/model", "my/encoder", "my/data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my/data/a.jsonl").touch()
    code, text, err = launch(
        *("kuberay", "--image", "x", "model.name=my/model", "data.path=my/data/*.jsonl"),
        *("data.eval_path=/my/held.jsonl", "data.name=null"),
        "rewards=[{function: embedding, options: {model: my/encoder}}]",
    )
    assert code == 0, err
    for needed in (
        "model.name is my/model if it is in /shared, else a hub name.",
        "data.path is my/data/*.jsonl: it must be in /shared.",
        "data.eval_path is /my/held.jsonl: every node must have it there.",
        "rewards.0.options.model is my/encoder if it is in /shared, else a hub name.",
    ):
        assert f"# {needed}\n" in text


def test_setup_commands_write_files_that_a_shell_reads(launch: Any, tmp_path: Path) -> None:
    (tmp_path / "my storage").mkdir()
    hosts = [*HOSTS[:4], "--storage", str(tmp_path / "my storage"), "--venv", sys.prefix]
    code, text, err = launch("ray-up", *hosts)
    assert code == 0, err
    tree = yaml.safe_load(text)
    home = tmp_path / "home"
    (home / ".aligntune").mkdir(parents=True)
    (home / ".aligntune" / "token").write_text("secret")
    for command in [*tree["setup_commands"], *tree["head_setup_commands"]]:
        subprocess.run(["bash", "-ec", command], env={"HOME": str(home)}, check=True)
    said = subprocess.run(
        ["sh", "-ec", ". ~/.aligntune/env; env; command -v aligntune"],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert f"RAY_AUTH_TOKEN_PATH={home}/.aligntune/token" in said
    assert said[-1] == f"{sys.prefix}/bin/aligntune"
    assert (home / ".aligntune" / "token").stat().st_mode & 0o777 == 0o600
    assert "secret" not in text


def test_the_wait_for_nodes_ends_when_all_are_there_or_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joining = iter([["a"], ["a", "b"], ["a", "b", "c"]])
    monkeypatch.setattr(await_nodes, "EVERY_S", 0.0)
    monkeypatch.setattr(await_nodes, "living_nodes", lambda: next(joining))
    assert await_nodes.await_nodes(3, 60.0) == 3
    monkeypatch.setattr(await_nodes, "living_nodes", lambda: ["a"])
    assert await_nodes.await_nodes(3, 0.0) == 1


# KubeRay


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


# Slurm


def test_the_slurm_script_is_a_script_sized_from_the_config(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "run.sbatch"
    code, text, err = launch(
        *("slurm", "--gpus-per-node", "4", "--cpus-per-node", "9", "--time", "2-00", "--out"),
        *(str(script), "--partition", "long", "train.steps=7", "data.name=it's"),
    )
    assert code == 0, err
    assert text == ""
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    for option in ("nodes=2", "cpus-per-task=9", "gpus-per-node=4", "partition=long", "time=2-00"):
        assert f"#SBATCH --{option}\n" in text
    assert f"#SBATCH --chdir={tmp_path}\n" in text
    for name, value in RAY_SETTINGS.items():
        assert f"export {name}={value}\n" in text
    assert "--num-cpus=9 --num-gpus=4" in text
    assert "export SRUN_CPUS_PER_TASK=9 " in text
    assert "train.steps=7 'data.name=it'\"'\"'s' cluster.address=auto" in text
    assert text.index("#SBATCH --signal=B:USR1@") < text.index("set -u")


STUBS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ray": 'while [[ $1 != -- ]]; do shift; done; shift; exec "$@"',
    "aligntune": "trap 'exit ${STOPPED:-143}' TERM; touch started; while :; do sleep 0.05; done",
    "scontrol": 'echo "$@" > requeued',
}


@pytest.fixture
def script(launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Slurm script as a process, with stand-ins for Slurm and Ray: a run that never ends."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    for name, body in STUBS.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    token = ["--token-file", str(tmp_path / "token"), "--venv", str(tmp_path / "venv")]
    code, text, err = launch("slurm", *token)
    assert code == 0, err
    (tmp_path / "run.sbatch").write_text(text)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    started = []

    def start(**environment: str) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "node1", "ALIGNTUNE_HEAD_IP": "10.0.0.1"}
        process = subprocess.Popen(
            ["bash", "run.sbatch"],
            env={"PATH": "/usr/bin:/bin", **slurm, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.mark.parametrize(
    ("number", "stopped", "code", "requeued"),
    [
        (signal.SIGUSR1, 143, 0, "requeue 7\n"),
        (signal.SIGUSR1, 0, 0, ""),
        (signal.SIGUSR1, 1, 1, ""),
        (signal.SIGTERM, 143, 143, ""),
        (signal.SIGUSR1, slurm.KILLED, 0, "requeue 7\n"),
        (signal.SIGTERM, slurm.KILLED, 143, ""),
    ],
    ids=["time, stopped", "time, done", "time, failed", "stopped", "time, killed", "killed"],
)
def test_a_signal_to_the_slurm_script_stops_the_run_and_time_requeues_what_is_not_done(
    script: Any, tmp_path: Path, number: int, stopped: int, code: int, requeued: str
) -> None:
    process = script(STOPPED=str(stopped))
    wait_for((tmp_path / "started").exists, "the run to start", 10)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, out + err
    log = tmp_path / "requeued"
    assert (log.read_text() if log.exists() else "") == requeued
    assert not list(tmp_path.glob(".aligntune-*"))
    assert "secret" not in out + err


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGTERM, 143, False), (signal.SIGUSR1, 0, True)],
    ids=["stopped", "time"],
)
def test_a_stop_that_comes_while_ray_starts_is_not_lost(
    script: Any, tmp_path: Path, number: int, code: int, requeued: bool
) -> None:
    ray = tmp_path / "venv/bin/ray"
    starts = "touch starting; while [ ! -e all-there ]; do sleep 0.05; done"
    ray.write_text(f"#!/bin/bash\n{starts}\n{STUBS['ray']}\n")
    (tmp_path / ".aligntune-7.pid.stop").touch()  # of a start whose node was lost
    process = script()
    wait_for((tmp_path / "starting").exists, "Ray to start", 10)
    assert not list(tmp_path.glob(".aligntune-*"))
    os.kill(process.pid, number)
    wait_for((tmp_path / ".aligntune-7.pid.stop").exists, "the stop to be kept", 10)
    (tmp_path / "all-there").touch()
    out, err = process.communicate(timeout=20)
    assert process.returncode == code, out + err
    assert not (tmp_path / "started").exists()
    assert (tmp_path / "requeued").exists() == requeued
    assert not list(tmp_path.glob(".aligntune-*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "token").unlink(), "no token at"),
        (lambda folder: (folder / "token").chmod(0o644), "others can read"),
        (lambda folder: (folder / "token").chmod(0o440), "others can read"),
        (lambda folder: (folder / "venv/bin/ray").unlink(), "no ray in"),
        (lambda folder: {"ALIGNTUNE_HEAD_IP": "127.0.1.1"}, "no address here that others reach"),
    ],
    ids=["no token", "an open token", "a group's token", "no ray", "a loopback address"],
)
def test_the_slurm_script_refuses_in_one_line_before_it_starts(
    script: Any, tmp_path: Path, change: Any, said: str
) -> None:
    process = script(**(change(tmp_path) or {}))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_ray_that_does_not_start_fails_the_slurm_job(script: Any, tmp_path: Path) -> None:
    (tmp_path / "venv/bin/ray").write_text("#!/bin/bash\nexit 0\n")  # as symmetric-run then does
    (tmp_path / ".aligntune-7.pid").write_text("1\n")  # of a start whose node was lost
    (tmp_path / "token").chmod(0o400)
    process = script()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "the run did not start" in err


def test_a_run_that_was_stopped_ends_with_the_code_that_the_slurm_script_requeues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from aligntune.errors import Interrupted

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(cli, "app", stopped)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == slurm.STOPPED


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:02:03", 3723),
        ("2-00", 172800),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert slurm.seconds(time) == seconds


def test_the_slurm_script_names_a_port_that_is_in_use(script: Any, tmp_path: Path) -> None:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        text = (tmp_path / "run.sbatch").read_text()
        (tmp_path / "run.sbatch").write_text(text.replace("6379", str(port)))
        out, err = script().communicate(timeout=20)
    assert out == ""
    assert f"port {port} of " in err
    assert "is in use" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "started").exists()


# Refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ray-up", "--storage", "/shared"], "give --head-ip"),
        (["ray-up", *HOSTS[:4]], "needs --storage"),
        (["ray-up", *HOSTS, "--nodes", "2"], "name 2, or change --nodes"),
        (["ray-up", *HOSTS, "--head-ip", "10.0.0.2"], "10.0.0.2 is named twice"),
        (["ray-up", *HOSTS, "--head-ip", "head"], "'head' is no IP address"),
        (["ray-up", *HOSTS, "--provider", "awz"], "did you mean 'aws'?"),
        (["ray-up", "--provider", "aws", "--storage", "/s"], "needs --nfs"),
        (["ray-up", "--provider", "aws", "--storage", "/s", "--nfs", "x:/"], "needs --region"),
        (["ray-up", *AWS, *URL], "needs --image-id"),
        (["ray-up", *AWS, *URL, "--image-id", "latest_dlami"], "is no image of AWS"),
        (
            ["ray-up", *HOSTS],
            "needs --venv, an environment with aligntune on every node, or --inst",
        ),
        (["ray-up", *AWS, *IMAGE], "needs --venv"),
        (["ray-up", *HOSTS, "--install", "aligntune==0.1.0"], "or --venv, an environment"),
        (["ray-up", *HOSTS, *VENV, "--install", "aligntune"], "no package index has aligntune"),
        (["ray-up", *HOSTS, "--install", "dist/no.whl"], "is no file here"),
        (["ray-up", *HOSTS, *URL, *OPEN], "say with --gpus-per-node"),
        (["ray-up", *HOSTS, "output_dir=/elsewhere"], "does not lie in /shared"),
        (["ray-up", *HOSTS[:5], "shared"], "is no absolute path"),
        (["kuberay"], "needs --image"),
        (["kuberay", "--image", "x", "--kind", "rayjobs"], "did you mean 'rayjob'?"),
        (["kuberay", "--image", "x", "output_dir=../up"], "does not lie in /shared"),
        (["slurm", "--time", "tomorrow"], "is no time limit of Slurm"),
        (["slurm", "--time", "19:59"], "--time 19:59 is too short"),
        (["slurm", "--time", "0"], "is too short"),
        (["slurm", "--gpus-per-node", "1"], "one rollout (1 CPU, 2 GPU)"),
        (["slurm", "--nodes", "0"], "--nodes is 0"),
        (["slurm", "train.stepz=3"], "did you mean 'train.steps'?"),
        (["slurm", "cluster.object_store_gib=2"], "with cluster.address=auto no Ray is started"),
        (["slurm", "--out", "/no/such/folder/x"], "no folder /no/such/folder"),
        (["slrm"], "did you mean 'slurm'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_one_line(launch: Any, arguments: list[str], said: str) -> None:
    code, out, err = launch(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_examples_can_be_launched(capsys: pytest.CaptureFixture[str]) -> None:
    for example in sorted((REPOSITORY / "examples").glob("*.yaml")):
        with pytest.raises(SystemExit) as ended:
            cli.main(["launch", "kuberay", str(example), "--image", "x"])
        assert not ended.value.code, capsys.readouterr().err
