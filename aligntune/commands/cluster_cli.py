"""`aligntune plan` and `aligntune doctor`, as typer commands."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from aligntune.commands.arguments import ConfigFile, Overrides


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="of a cluster that need not exist")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="of the described cluster")] = 0,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="their type, such as h100-80gb; `--gpu list` lists them"),
    ] = None,
    cpus_per_node: Annotated[
        float | None, typer.Option(help="default: 16 a GPU, and 16 at least")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the plan as JSON")] = False,
) -> None:
    """Show where a run's ranks go, the memory they take and what a step costs; start nothing.

    Without --nodes the plan is for the cluster that cluster.address or RAY_ADDRESS names, else for
    this machine. A run that does not fit is refused with what would make it fit.

    Examples:

        aligntune plan config.yaml
        aligntune plan config.yaml --nodes 2 --gpus-per-node 8 --gpu h100-80gb
    """
    if gpu == "list":
        from cluster.gpus import gpu_names

        typer.echo("\n".join(gpu_names()))
        return
    from aligntune.commands.plan import plan_run

    made = plan_run(
        config,
        overrides or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        cpus_per_node=cpus_per_node,
    )
    if as_json:
        typer.echo(json.dumps(made.as_dict(), indent=1))
        return
    from cluster.plan.draw import draw

    draw(made)


def _gpu_self_test(as_json: bool) -> int:
    from aligntune.selftest.run import exit_code, self_test

    outcomes = []
    for outcome in self_test():
        outcomes.append(outcome)
        typer.echo(json.dumps(outcome.as_dict()) if as_json else outcome.line())
    return exit_code(outcomes)


def doctor(
    address: Annotated[
        str | None, typer.Option(help="host:port or auto; default: RAY_ADDRESS, else no cluster")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one object a finding")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="compute on this machine's GPU instead, for minutes")
    ] = False,
) -> int:
    """Examine this machine, and every node of a cluster; exit code 1 if anything fails.

    With --gpu it measures what the card gives, and tries there what training needs.

    Examples:

        aligntune doctor
        aligntune doctor --address 10.0.0.1:6379
        aligntune doctor --gpu
    """
    if gpu:
        return _gpu_self_test(as_json)
    from aligntune.commands.doctor import examine
    from cluster.doctor.findings import exit_code, lines

    findings = []
    for finding in examine(address):
        findings.append(finding)
        shown = json.dumps(finding.as_dict()) if as_json else lines([finding])[0]
        typer.echo(shown)
    return exit_code(findings)
