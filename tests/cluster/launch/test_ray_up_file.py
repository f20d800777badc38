"""Files for `ray up`: right by Ray's schema, and commands that do what they are for."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launch.files import RAY_SETTINGS
from tests.cluster.launch.options import AWS, HOSTS, IMAGE, OPEN, URL, VENV


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


@pytest.mark.parametrize("node", ["head", "worker"])
def test_ray_starts_with_the_hosts_variables_and_without_those_of_rays_own_shell(
    launch: Any, tmp_path: Path, node: str
) -> None:
    from ray.autoscaler._private.command_runner import _with_interactive

    code, text, err = launch("ray-up", *HOSTS, *VENV)
    assert code == 0, err
    commands = yaml.safe_load(text)[f"{node}_start_ray_commands"]
    (tmp_path / ".aligntune").mkdir()
    (tmp_path / ".aligntune/env").write_text(f"export PATH={tmp_path}:$PATH\n")
    (tmp_path / ".bashrc").write_text("export HF_TOKEN=from-bashrc\n")
    (tmp_path / "ray").write_text('#!/bin/bash\nenv > "$HOME/$1"\n')
    (tmp_path / "ray").chmod(0o755)
    for command in commands:
        (line,) = shlex.split(_with_interactive(command)[-1])
        assert "OMP_NUM_THREADS=1" in line, "Ray runs commands otherwise now"
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "RAY_HEAD_IP": "10.0.0.1"}
        subprocess.run(["bash", "-c", line], env=environment, check=True)
    seen = (tmp_path / "start").read_text()
    assert "HF_TOKEN=from-bashrc\n" in seen
    assert "OMP_NUM_THREADS" not in seen
    assert "PYTHONWARNINGS" not in seen
