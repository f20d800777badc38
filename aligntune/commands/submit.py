"""`aligntune submit` and `aligntune jobs`: a config becomes a Ray job that trains it.

Everything that can be checked here is checked before anything is sent. The job runs `aligntune
train` in the unpacked working directory, so submitting the same run directory again resumes it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aligntune.errors import RunFailed, UserError

if TYPE_CHECKING:
    from cluster.jobs.client import JobDetails, Jobs
    from cluster.jobs.packaging import Package

Say = Callable[[str], None]


@contextmanager
def connected(address: str) -> Iterator[Jobs]:
    """The jobs at an address, HEAD:8265 or a URL.

    Raises UserError, one line, where it is wrong; RunFailed where it answers no longer.
    """
    from cluster.jobs.client import Jobs, JobsError, JobsUnreachable

    url = address if "://" in address else f"http://{address}"
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise UserError(f"--address {address!r}: write the Jobs server's, as in http://HEAD:8265")
    found = None
    try:
        found = Jobs(url)
        yield found
    except JobsUnreachable as error:
        raise (UserError if found is None else RunFailed)(str(error)) from error
    except JobsError as error:
        raise UserError(str(error)) from error


def submit(
    config: Path,
    overrides: Sequence[str],
    address: str,
    working_dir: Path,
    env: Sequence[str],
    allowed: Sequence[str],
    detach: bool,
    say: Say,
    write: Say,
) -> int:
    """Submit a run and follow it; the exit code of `aligntune train` in it, 0 where detached.

    `allowed` are files that travel though they look like secrets.

    `say` is for messages of our own, `write` for what the job prints, without a line end added.
    """
    from cluster.jobs.packaging import PackagingError, packed

    secrets = secrets_by_name(env)
    try:
        with packed(working_dir, allowed=allowed) as package:
            inside = _inside(config, package)
            with connected(address) as jobs:  # first, for the check takes longer
                elsewhere, run_dir = check_run(inside, overrides, package)
                say(f"packed {package.describe()}")
                for line in elsewhere:
                    say(line)
                if jobs.ray_version != (here := _versions()["ray"]):
                    say(f"Ray is {jobs.ray_version} on the cluster and {here} here")
                job_id = f"{_slug(Path(run_dir).name)}-{uuid.uuid4().hex[:8]}"
                jobs.submit(
                    shlex.join(["aligntune", "train", inside, *overrides]),
                    package,
                    job_id,
                    secrets,
                    {
                        "run_dir": run_dir,
                        "submitted_with": json.dumps(_versions()),
                        "variables": ", ".join(sorted(secrets)),
                    },
                )
    except PackagingError as error:
        raise UserError(str(error)) from error
    say(f"submitted {job_id}, which writes to {run_dir}")
    if detach:
        say(_commands(job_id, address))
        return 0
    with connected(address) as jobs:
        return follow(jobs, job_id, say, write)


def list_travelling(
    config: Path,
    overrides: Sequence[str],
    working_dir: Path,
    env: Sequence[str],
    allowed: Sequence[str],
    say: Say,
) -> int:
    """Check a run and list what would travel with it, the variables by name; send nothing."""
    from cluster.jobs.packaging import PackagingError, packed

    secrets = secrets_by_name(env)
    try:
        with packed(working_dir, allowed=allowed) as package:
            elsewhere, run_dir = check_run(_inside(config, package), overrides, package)
            lines = [*package.listing(), package.describe(), *elsewhere]
    except PackagingError as error:
        raise UserError(str(error)) from error
    for line in lines:
        say(line)
    say(f"variables passed on: {', '.join(sorted(secrets)) or 'none'}")
    say(f"the run would write to {run_dir}; nothing was sent")
    return 0


def follow(jobs: Jobs, job_id: str, say: Say, write: Say) -> int:
    """Follow a job to its end, or until Ctrl-C is answered with another wish; its exit code."""
    from cluster.jobs.client import ConnectionLost, Once, exit_code

    log = Once()
    while True:
        try:
            job = jobs.follow(job_id, write, note=say, log=log)
            break
        except ConnectionLost as lost:
            say(f"{lost}\n{_commands(job_id, jobs.address)}")
            return 1
        except KeyboardInterrupt:
            wish = _ask(job_id) if sys.stdin.isatty() else "d"
            if wish == "s":
                return exit_code(stop(jobs, job_id, say))
            if wish == "d":
                say(f"{job_id} goes on")
                say(_commands(job_id, jobs.address))
                return 130
    code = exit_code(job)
    if job.driver_exit_code is None and code == 1:  # its output says nothing of this
        say(f"{job_id} did not start: {_one_line(job.message)}")
    elif code == 127:  # the shell's word for it
        say(
            f"{job_id} found no `aligntune` on the head: start Ray there with the virtual "
            "environment active that aligntune is installed in"
        )
    elif code:
        say(f"{job_id} {'was stopped' if code == 143 else f'failed with exit code {code}'}")
        say("to resume it, submit the same config with the same output_dir again")
    return code


def stop(jobs: Jobs, job_id: str, say: Say) -> JobDetails:
    """Stop a job, which writes its checkpoint first, and say where that is; what it is then."""
    if (job := jobs.get(job_id)).status.is_terminal():
        say(f"{job_id} has ended: {job.status}")
        return job
    say(f"asked {job_id} to write its checkpoint and stop; waiting for it")
    job = jobs.stop(job_id)
    last = [line for line in jobs.logs(job_id).splitlines() if line.startswith("aligntune: ")]
    say(f"{job_id} ended: {job.status}" + (f"; {last[-1]}" if last else ""))
    if run_dir := (job.metadata or {}).get("run_dir"):
        say(f"its checkpoints are in {run_dir}/checkpoints{_newest(Path(run_dir))}")
        say("to resume it, submit the same config with the same output_dir again")
    return job


def describe(job: JobDetails) -> list[str]:
    """What is known of a job, without any value of its environment."""
    metadata = job.metadata or {}
    runtime_env = job.runtime_env or {}
    rows = {
        "id": job.submission_id,
        "status": str(job.status),
        "entrypoint": job.entrypoint,
        "run directory": metadata.get("run_dir"),
        "started": _when(job.start_time),
        "ended": _when(job.end_time),
        "exit code": job.driver_exit_code,
        "working directory": runtime_env.get("working_dir"),
        "variables": metadata.get("variables"),
        "submitted with": _listed(metadata.get("submitted_with")),
        "message": _one_line(job.message),
    }
    return [f"{name + ':':19}{value}" for name, value in rows.items() if value not in (None, "")]


def table(jobs: Sequence[JobDetails]) -> list[str]:
    """One line a job: id, status, start, run directory."""
    rows = [
        (
            str(j.submission_id),
            str(j.status),
            _when(j.start_time),
            (j.metadata or {}).get("run_dir"),
        )
        for j in jobs
    ]
    width = max((len(row[0]) for row in rows), default=0)
    return [f"{a:{width}}  {b:9}  {c}  {d or ''}".rstrip() for a, b, c, d in rows]


def secrets_by_name(names: Sequence[str]) -> dict[str, str]:
    """The values of environment variables. Raises UserError for one that is not set."""
    for name in names:
        if "=" in name:
            raise UserError(
                f"--env takes a name, not a value: write --env {name.partition('=')[0]} and set "
                "the variable, so that its value is in no history and no log"
            )
        if name not in os.environ:
            raise UserError(f"--env {name}: the variable is not set here; export it first")
    return {name: os.environ[name] for name in names}


def check_run(config: str, overrides: Sequence[str], package: Package) -> tuple[list[str], str]:
    """Check the run as it would itself, up to its machines, if all that it reads is seen from here;
    (what is not, run directory).

    `config` is relative to the package's directory, and so are paths in it.

    Raises:
        UserError: whatever is wrong with it, or what would not be there on the cluster.
    """
    from aligntune.commands.places import not_here
    from aligntune.config.load import load_config

    directory = package.directory
    with chdir(directory), _importable(directory):
        # What is installed is the cluster's business, which 'local' would look for here.
        there = [*overrides, "cluster.address=auto"]
        loaded = load_config(config, there)
        run_dir = _run_dir(loaded.output_dir)
        if loaded.checkpoint.storage is not None:
            _check_storage(loaded.checkpoint.storage)
        elsewhere = [
            f"{key} {name} is not here: it must be on every node, and the job will check it"
            for key, name in not_here(loaded.model_dump(mode="json"), package)
        ]
        if not elsewhere:
            from aligntune.trainers import create_rl_trainer

            create_rl_trainer(config=config, overrides=there).check()
    return elsewhere, run_dir


def _run_dir(output_dir: str) -> str:
    """The run directory of a job, which must outlive the job's own folder. Raises UserError."""
    if "://" in output_dir:
        raise UserError(
            f"output_dir {output_dir} is not a folder; name one that every node sees, and give the "
            "URI as checkpoint.storage"
        )
    if os.path.isabs(output_dir):
        return output_dir.rstrip("/")
    raise UserError(
        f"output_dir {output_dir} is relative, and a job's working directory is gone when the job "
        f"is: give an absolute path on storage that every node sees, as in "
        f"output_dir=/shared/{output_dir}"
    )


def _check_storage(storage: str) -> None:
    """Whether the storage of checkpoints is named for all nodes, and answers. Raises UserError."""
    from actors.storage import Store
    from aligntune.runs.deadline import answered

    if "://" not in storage:
        if not os.path.isabs(storage):
            raise UserError(
                f"checkpoint.storage {storage} is relative, and a job's working directory is gone "
                "when the job is: give an absolute path or a URI"
            )
        return
    answered(storage, Store(storage).has_folder)


def _inside(config: Path, package: Package) -> str:
    """The config's path in the package. Raises UserError where it would not be there."""
    if not config.is_file():
        raise UserError(f"no config file at {config}")
    relative = os.path.relpath(config.absolute(), package.directory)
    if relative not in package:
        raise UserError(
            f"{config} does not travel with the working directory {package.directory}: it is "
            f"{'outside of it' if relative.startswith('..') else 'ignored by .gitignore'}"
        )
    return relative


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    """With the working directory's modules importable, as they are in the job."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def _versions() -> dict[str, str]:
    from aligntune.runs.rundir import installed_versions

    return {"python": ".".join(map(str, sys.version_info[:3])), **installed_versions()}


def _ask(job_id: str) -> str:
    """What is to become of the job: 's' stop, 'd' only stop following, 'c' go on following."""
    question = f"\n[s]top {job_id} after a checkpoint, [d]etach and let it run, [c]ontinue? "
    while True:
        try:
            answer = input(question).strip().lower()[:1]
        except (EOFError, KeyboardInterrupt):
            return "d"
        if answer in ("s", "d", "c"):
            return answer


def _commands(job_id: str, address: str) -> str:
    at = f"--address {address}"
    return (
        f"  follow:  aligntune jobs logs {job_id} --follow {at}\n"
        f"  status:  aligntune jobs status {job_id} {at}\n"
        f"  stop:    aligntune jobs stop {job_id} {at}"
    )


def _newest(run_dir: Path) -> str:
    latest = run_dir / "checkpoints" / "latest"
    return f", the newest {latest.read_text().strip()}" if latest.is_file() else ""


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "run"


def _when(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))


def _one_line(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def _listed(versions: str | None) -> str:
    return ", ".join(f"{k} {v}" for k, v in json.loads(versions).items()) if versions else ""
