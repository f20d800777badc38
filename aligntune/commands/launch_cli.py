"""The `aligntune launch` commands: files that start a cluster and the run on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from aligntune.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    help="Print the file that starts the cluster for a run, and the run; start nothing.",
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...")]
Out = Annotated[Path | None, typer.Option(help="write to this file instead of printing")]
Nodes = Annotated[int | None, typer.Option(help="default: as many as the roles need")]
Gpus = Annotated[int | None, typer.Option(help="default: what the roles need, 8 at most")]
Cpus = Annotated[int | None, typer.Option(help="default: 16 a GPU, and 16 at least")]
Memory = Annotated[int | None, typer.Option("--memory-per-node", help="GiB; default: 4 a CPU")]
Token = Annotated[str, typer.Option(help="of `ray get-auth-token --generate`, mode 0600")]
RAY_TOKEN = "~/.ray/auth_token"


@app.command("ray-up")
def ray_up(
    config: Config,
    overrides: Overrides = None,
    provider: Annotated[
        Literal["local", "aws"], typer.Option(help="local is hosts with ssh")
    ] = "local",
    storage: Annotated[
        str | None, typer.Option(help="the folder that every node shares; needed")
    ] = None,
    nfs: Annotated[str | None, typer.Option(help="HOST:/EXPORT to mount there")] = None,
    head_ip: Annotated[str | None, typer.Option(help="of the first host")] = None,
    worker_ips: Annotated[str, typer.Option(help="of the other hosts, separated by commas")] = "",
    ssh_user: Annotated[str, typer.Option(help="on the hosts")] = "root",
    ssh_key: Annotated[str, typer.Option(help="the private key's file here")] = "~/.ssh/id_ed25519",
    region: Annotated[str | None, typer.Option(help="of AWS")] = None,
    instance_type: Annotated[str | None, typer.Option(help="of AWS")] = None,
    image_id: Annotated[
        str | None, typer.Option(help="of AWS: Ubuntu with drivers for its GPUs")
    ] = None,
    venv: Annotated[
        str | None, typer.Option(help="on every node, with aligntune unless --install fills it")
    ] = None,
    install: Annotated[
        str | None, typer.Option(help="aligntune: a wheel here, a path on the nodes, or a URL")
    ] = None,
    token_file: Token = RAY_TOKEN,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    cpus_per_node: Cpus = None,
    memory: Memory = None,
    out: Out = None,
) -> None:
    """A cluster file for `ray up`: on-premise hosts, or AWS.

    Example:

        aligntune launch ray-up config.yaml --storage /shared --head-ip 10.0.0.1 \\
            --worker-ips 10.0.0.2,10.0.0.3 --out cluster.yaml
    """
    if storage is None:  # before seconds of imports
        raise UserError("ray-up needs --storage, the folder that every node shares, for the run")
    from aligntune.commands.launch import Size, ray_up

    text = ray_up(
        config,
        overrides or [],
        Size(nodes, gpus_per_node, cpus_per_node, memory),
        provider=provider,
        storage=storage,
        head_ip=head_ip,
        worker_ips=[ip.strip() for ip in worker_ips.split(",") if ip.strip()],
        ssh_user=ssh_user,
        ssh_key=ssh_key,
        region=region,
        instance_type=instance_type,
        image_id=image_id,
        nfs=nfs,
        token_file=token_file,
        venv=venv,
        install=install,
    )
    _give(text, out)


@app.command("kuberay")
def kuberay(
    config: Config,
    overrides: Overrides = None,
    kind: Annotated[
        Literal["rayjob", "raycluster"], typer.Option(help="a cluster for the run, or one to stay")
    ] = "rayjob",
    image: Annotated[str, typer.Option(help="with aligntune in it; needed")] = "",
    claim: Annotated[str, typer.Option(help="a ReadWriteMany volume claim")] = "aligntune",
    secret: Annotated[str, typer.Option(help="with the key auth_token")] = "aligntune-token",
    storage: Annotated[str, typer.Option(help="where the claim is mounted")] = "/shared",
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    cpus_per_node: Cpus = None,
    memory: Memory = None,
    out: Out = None,
) -> None:
    """Manifests for KubeRay: a RayJob, or a RayCluster that stays.

    Example:

        aligntune launch kuberay config.yaml --image registry/aligntune:1 --out run.yaml
    """
    from aligntune.commands.launch import Size, kuberay

    size = Size(nodes, gpus_per_node, cpus_per_node, memory)
    text = kuberay(
        config,
        overrides or [],
        size,
        kind=kind,
        image=image,
        claim=claim,
        secret=secret,
        storage=storage,
    )
    _give(text, out)


@app.command("slurm")
def slurm(
    config: Config,
    overrides: Overrides = None,
    time: Annotated[str, typer.Option(help="limit, as Slurm writes it")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="default: Slurm's own")] = None,
    account: Annotated[str | None, typer.Option(help="default: Slurm's own")] = None,
    venv: Annotated[
        str, typer.Option(help="on every node; default: this one", show_default=False)
    ] = sys.prefix,
    token_file: Token = RAY_TOKEN,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    cpus_per_node: Cpus = None,
    memory: Memory = None,
    out: Out = None,
) -> None:
    """A batch script for sbatch; the run starts in the current folder.

    Example:

        aligntune launch slurm config.yaml --time 12:00:00 --out run.sbatch
    """
    from aligntune.commands.launch import Size, slurm

    text = slurm(
        config,
        overrides or [],
        Size(nodes, gpus_per_node, cpus_per_node, memory),
        time=time,
        partition=partition,
        account=account,
        token_file=token_file,
        venv=venv,
    )
    _give(text, out)


@app.command("grafana")
def grafana(out: Out = None) -> None:
    """A Grafana dashboard for the metrics of `tracking.trackers=[prometheus]`."""
    from aligntune.tracking.grafana import dashboard

    _give(dashboard(), out)


def _give(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text, nl=False)
        return
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: no folder {out.parent}")
    out.write_text(text, encoding="utf-8")
    typer.echo(f"written to {out}", err=True)
