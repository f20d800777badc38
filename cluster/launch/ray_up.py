"""Renders files for `ray up`: hosts that are there (on-premise), and machines of AWS."""

from __future__ import annotations

import ipaddress
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.launch.files import (
    JOBS_PORT,
    METRICS_PORT,
    PORT,
    RAY_SETTINGS,
    BadLaunch,
    Launch,
    as_yaml,
)

HOME = "~/.aligntune"  # on every node: the token, the config, the environment
CONFIG = f"{HOME}/config.yaml"
SUDO = "$(command -v sudo)"  # nothing where root logs in and there is none
IMAGE = re.compile(r"ami-[0-9a-f]{8,17}")
# Ray wants one version of Python on all nodes; this one's is as good as any.
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Hosts:
    """Where `ray up` finds or makes the nodes."""

    provider: Mapping[str, Any]
    auth: Mapping[str, str]
    node_types: Mapping[str, Any] | None = None  # of a cloud
    head_ip: str | None = None
    ray_start: str = ""  # options that tell a node its size; without them Ray looks for itself


@dataclass(frozen=True)
class Software:
    """What runs on the nodes: `venv` is there already, or `install` is put into it.

    aligntune never comes from a package index by its name: there that is another project.
    """

    venv: str
    install: str | None  # what pip takes, ~/ for a node's home; None: the venv is complete
    copied: str | None = None  # a file here that is copied to every node as `install`, less extras


def choose_software(venv: str | None, install: str | None, extra: str) -> Software:
    """What runs on the nodes, from what the user names.

    Args:
        venv: a folder on the nodes; None makes one.
        install: aligntune as a file here, an absolute path on the nodes, or a URL; None: it is in
            `venv` already.
        extra: of aligntune's own, such as vllm-cuda, or ''.

    Raises:
        BadLaunch: neither is given, or `install` is none of these.
    """
    if install is None:
        if venv is None:
            raise BadLaunch(
                "ray-up needs --venv, an environment with aligntune on every node, or --install, "
                "aligntune as a wheel, an absolute path on the nodes or a URL: no package index "
                "has it"
            )
        return Software(venv, None)
    venv = venv or f"{HOME}/venv"
    extras = f"[{extra}]" if extra else ""
    here = Path(install).expanduser()
    if here.is_file():
        return Software(venv, f"{HOME}/{here.name}{extras}", str(here.absolute()))
    if install.startswith(("/", "~/")):
        return Software(venv, install + extras)
    if "://" in install:
        return Software(venv, install if "@ " in install else f"aligntune{extras} @ {install}")
    raise BadLaunch(
        f"--install {install} is no file here, no absolute path and no URL, and no package index "
        "has aligntune; give one of these, or --venv, an environment with aligntune on every node"
    )


def on_premise(
    launch: Launch,
    head_ip: str | None,
    worker_ips: Sequence[str],
    user: str,
    key: str,
    *,
    cpus: int | None,
    gpus: int | None,
) -> Hosts:
    """Hosts with addresses; `cpus` and `gpus` of each where Ray is not to count them itself.

    Raises:
        BadLaunch: an address is missing, wrong or given twice.
    """
    if not head_ip:
        raise BadLaunch(
            "ray-up needs the head's address: give --head-ip (and --worker-ips), or --provider aws"
        )
    every = [head_ip, *worker_ips]
    for address in every:
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise BadLaunch(
                f"{address!r} is no IP address; give --head-ip and --worker-ips as numbers, "
                "several separated by commas"
            ) from error
    if doubled := sorted({address for address in every if every.count(address) > 1}):
        raise BadLaunch(f"{', '.join(doubled)} is named twice; each host is one node")
    if len(every) != launch.nodes:
        raise BadLaunch(
            f"the run needs {launch.nodes} node(s) and --head-ip and --worker-ips name "
            f"{len(every)}; name {launch.nodes}, or change --nodes"
        )
    return Hosts(
        {"type": "local", "head_ip": head_ip, "worker_ips": list(worker_ips)},
        {"ssh_user": user, "ssh_private_key": key},
        head_ip=head_ip,
        ray_start=(f" --num-cpus={cpus}" if cpus is not None else "")
        + (f" --num-gpus={gpus}" if gpus is not None else ""),
    )


def aws(
    launch: Launch, region: str | None, instance_type: str | None, image_id: str | None
) -> Hosts:
    """Machines of AWS, of one type, none of which comes or goes. Raises BadLaunch."""
    if not region or not instance_type:
        raise BadLaunch(
            "--provider aws needs --region and --instance-type, such as us-west-2, p5.48xlarge"
        )
    if not image_id:
        raise BadLaunch(
            "--provider aws needs --image-id, an Ubuntu image of the region with drivers for its "
            "GPUs: Ray's own default is Ubuntu 18.04, too old for this"
        )
    if not IMAGE.fullmatch(image_id):
        raise BadLaunch(f"--image-id {image_id} is no image of AWS, such as ami-0123456789abcdef0")
    size = launch.size
    resources = {"CPU": size.cpus} | ({"GPU": size.gpus} if size.gpus else {})
    machine = {
        "resources": resources,
        "node_config": {
            "InstanceType": instance_type,
            "ImageId": image_id,
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 500}}],
        },
    }
    workers = launch.nodes - 1
    return Hosts(
        {"type": "aws", "region": region, "cache_stopped_nodes": False},
        {"ssh_user": "ubuntu"},
        {
            "head": {**machine, "min_workers": 0, "max_workers": 0},
            "worker": {**machine, "min_workers": workers, "max_workers": workers},
        },
    )


def render(
    launch: Launch,
    hosts: Hosts,
    software: Software,
    *,
    token_file: str,
    config_file: str,
    nfs: str | None,
) -> str:
    """The cluster file.

    Args:
        token_file: here, mode 0600; it is copied to every node.
        config_file: here; it is copied to every node as `CONFIG`.
        nfs: host:/export to mount at the storage folder; None where the folder is there already.
    """
    local = hosts.node_types is None
    files = {f"{HOME}/token": token_file, CONFIG: config_file}
    if software.copied:
        files[f"{HOME}/{Path(software.copied).name}"] = software.copied
    ray = f"ray start --disable-usage-stats --metrics-export-port={METRICS_PORT}"
    address = f" --node-ip-address={hosts.head_ip}" if hosts.head_ip else ""
    # Ray runs these commands with one thread and without warnings, which its roles would inherit.
    plain = "unset OMP_NUM_THREADS PYTHONWARNINGS"
    start = f". {HOME}/env; {plain}; ulimit -n $(ulimit -Hn); {ray}{hosts.ray_start}"
    tree: dict[str, Any] = {
        "cluster_name": launch.name,
        "max_workers": launch.nodes - 1,
        "upscaling_speed": float(max(1, launch.nodes - 1)),  # all workers at once
        "idle_timeout_minutes": 1_000_000,  # a run's nodes stay, also while they are idle
        "provider": dict(hosts.provider),
        "auth": dict(hosts.auth),
    }
    if hosts.node_types:
        tree |= {"available_node_types": dict(hosts.node_types), "head_node_type": "head"}
    tree |= {
        "file_mounts": files,
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [
            f"chmod 700 {HOME} && chmod 600 {HOME}/token",
            _write(f"{HOME}/env", _environment(software, local=local)),
            # `ray down` calls `ray stop` there, and has no other way to find it.
            f"grep -qs '{HOME}/env' ~/.bashrc || echo '. {HOME}/env' >> ~/.bashrc",
            *_storage(launch.storage, nfs, local=local),
            *_software(software, local=local),
        ],
        "head_setup_commands": [
            *([] if local else [_boto(software)]),
            _write(f"{HOME}/run", _run(launch)) + f" && chmod 755 {HOME}/run",
        ],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            f". {HOME}/env; ray stop",
            f"{start} --head --port={PORT}{address} --dashboard-host=0.0.0.0 "
            f"--dashboard-port={JOBS_PORT} --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            f". {HOME}/env; ray stop",
            f"{start} --address=$RAY_HEAD_IP:{PORT}",
        ],
    }
    return launch.head("ray-up", *_how(launch, nfs, local=local)) + as_yaml(tree)


def _how(launch: Launch, nfs: str | None, *, local: bool) -> list[str]:
    jobs = f"--address http://127.0.0.1:{JOBS_PORT}"
    switch = "RAY_UP_enable_autoscaler_v2=0 " if local else ""
    version = (
        ["(Version 2 of the autoscaler leaves on-premise workers out; this file turns it off too.)"]
        if local
        else [
            f"`ray up` needs boto3 here. {nfs} must let NFS (TCP port 2049) in from the machines;",
            f"Ray puts them into the security group ray-autoscaler-{launch.name}.",
        ]
    )
    return [
        "",
        "Start the cluster; start the run; see its output; end the cluster (FILE is this file):",
        f"  {switch}ray up -y FILE",
        f"  ray exec FILE 'ray job submit {jobs} --submission-id {launch.name} --no-wait "
        f"-- {HOME}/run'",
        f"  ray exec FILE 'ray job logs {jobs} -f {launch.name}'",
        "  ray down -y FILE",
        *version,
        "Ray reads ~/.bashrc of each node when it starts: what that exports, such as HF_TOKEN,",
        "WANDB_API_KEY, HTTPS_PROXY or NCCL_SOCKET_IFNAME, reaches the run and its roles.",
        "A run that was stopped goes on from its newest checkpoint: start it again, with another",
        "submission id.",
    ]


def _environment(software: Software, *, local: bool) -> list[str]:
    settings = {
        **RAY_SETTINGS,
        "RAY_AUTH_MODE": "token",
        **({"RAY_enable_autoscaler_v2": "0"} if local else {}),
    }
    return [
        *(f"export {name}={value}" for name, value in settings.items()),
        "export RAY_AUTH_TOKEN_PATH=$HOME/.aligntune/token",
        f"export PATH={_path(software.venv)}/bin:$PATH",
    ]


def _path(path: str) -> str:
    """A path in a shell's double quotes or none; ~ as $HOME, which exports expand everywhere."""
    return "$HOME/" + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


def _run(launch: Launch) -> list[str]:
    return [
        "#!/bin/sh",
        f". {HOME}/env",
        launch.start,
    ]


def _write(path: str, lines: Sequence[str]) -> str:
    """A command that writes a file."""
    return f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} > {path}"


def _storage(folder: str, nfs: str | None, *, local: bool) -> list[str]:
    """The shared folder is there, mounted where it has to be, and can be written to."""
    quoted = shlex.quote(folder)
    if nfs is None:
        missing = _stop(f"{folder} is not there; mount the shared storage first")
        return [f"test -d {quoted} || {missing}", _writable(folder)]
    # A port that others may use too lets an EFS take a lost connection up again; other servers may
    # want a privileged one.
    options = "nfsvers=4.1,hard,timeo=600" + ("" if local else ",noresvport")
    no_client = _stop("no mount.nfs4 here; install the NFS client (nfs-common or nfs-utils)")
    return [
        f"mountpoint -q {quoted} || PATH=$PATH:/usr/sbin:/sbin command -v mount.nfs4 || "
        f"{no_client if local else _apt('nfs-common')}",
        f"mountpoint -q {quoted} || {{ {SUDO} mkdir -p {quoted} && {SUDO} mount -t nfs4 "
        f"-o {options} {shlex.quote(nfs)} {quoted}; }}",
        # The root of a new EFS belongs to root.
        *([] if local else [f"test -w {quoted} || {SUDO} chown $(id -u):$(id -g) {quoted}"]),
        _writable(folder),
    ]


def _writable(folder: str) -> str:
    refused = _stop(f"{folder} cannot be written to by the user of ssh; chown it on its server")
    return f"test -w {shlex.quote(folder)} || {refused}"


def _software(software: Software, *, local: bool) -> list[str]:
    binaries = f"{_path(software.venv)}/bin"
    if software.install is None:
        missing = _stop(f"no aligntune in {software.venv}; install it there")
        return [f"test -x {binaries}/aligntune || {missing}"]
    no_python = _stop(f"no {PYTHON} with venv here; install it")
    packages = f"{PYTHON} {PYTHON}-venv"
    return [
        # Which is what venv looks for; Debian keeps it in a package of its own.
        f"{PYTHON} -c 'import ensurepip' 2>/dev/null || {no_python if local else _apt(packages)}",
        f"test -x {binaries}/aligntune || {{ {PYTHON} -m venv {_path(software.venv)} && "
        f"{binaries}/pip install {_path(software.install)}; }}",
    ]


def _boto(software: Software) -> str:
    """The head starts the other machines, for which Ray needs boto3."""
    binaries = f"{_path(software.venv)}/bin"
    missing = _stop(f"no boto3 in {software.venv}; install it there")
    cure = missing if software.install is None else f"{binaries}/pip install boto3"
    return f"{binaries}/python -c 'import boto3' 2>/dev/null || {cure}"


def _apt(packages: str) -> str:
    """Commands that install what Ubuntu has."""
    # ssh answers before a new machine is set up, and until then others hold the locks of apt.
    return (
        "{ cloud-init status --wait; sudo apt-get update -qq && "
        "sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 "
        f"install -y -qq {packages}; }}"
    )


def _stop(why: str) -> str:
    """Commands that end the setup."""
    return f"{{ echo {shlex.quote('aligntune: ' + why)} >&2; exit 1; }}"
