"""Renders a Slurm batch script on `ray symmetric-run`: one Ray, one run, one job."""

from __future__ import annotations

import re
import shlex
import signal
from dataclasses import dataclass

from cluster.launch.files import (
    METRICS_PORT,
    PORT,
    RAY_SETTINGS,
    STOP_SECONDS,
    BadLaunch,
    Launch,
    shell,
)

STOPPED = 128 + signal.SIGTERM  # what `aligntune train` ends with after its last checkpoint
KILLED = 256 - signal.SIGTERM  # what symmetric-run makes of a command that SIGTERM itself has ended
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
LEAST_SECONDS = 2 * STOP_SECONDS  # of a job: else its nodes start and stop, and hardly train


@dataclass(frozen=True)
class Site:
    """What a cluster's administrators decide."""

    time: str  # as Slurm writes it: days-hours:minutes:seconds
    partition: str | None = None
    account: str | None = None


def render(launch: Launch, site: Site, *, venv: str, token_file: str) -> str:
    """The batch script. `venv`, `token_file` and the storage lie at one path on all nodes.

    Raises:
        BadLaunch: the time limit is no time of Slurm's, or too short.
    """
    if seconds(site.time) < LEAST_SECONDS:
        raise BadLaunch(
            f"--time {site.time} is too short: the run is stopped {STOP_SECONDS // 60} minutes "
            f"before it; give {LEAST_SECONDS // 60} minutes or more, such as 24:00:00"
        )
    size = launch.size
    options = [
        f"--job-name={launch.name}",
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={size.cpus}",
        *([f"--gpus-per-node={size.gpus}"] if size.gpus else []),
        "--mem=0",
        "--exclusive",
        f"--time={site.time}",
        *([f"--partition={site.partition}"] if site.partition else []),
        *([f"--account={site.account}"] if site.account else []),
        f"--chdir={launch.storage}",
        f"--output={launch.name}-%j.out",
        "--open-mode=append",
        "--requeue",
        "--no-kill",
        f"--signal=B:USR1@{STOP_SECONDS}",
    ]
    notes = launch.head(
        "slurm",
        "",
        "Submit it with sbatch. --chdir, the environment and the token are shared by all nodes.",
        f"{STOP_SECONDS} s before the time limit the run writes a checkpoint and the job goes back",
        "to the queue, and on from there, unless the run is done by then or fails.",
        "`scancel --batch --signal=TERM JOB` makes it write a checkpoint and end; a plain scancel",
        "kills it. The nodes are not shared with other jobs (--exclusive): at the end `ray stop`",
        "ends every Ray of yours on them.",
    )
    directives = "".join(f"#SBATCH {_quoted(option)}\n" for option in options)
    settings = "".join(f"export {name}={value}\n" for name, value in RAY_SETTINGS.items())
    return (
        "#!/bin/bash\n"
        + directives
        + notes
        + BODY.format(
            settings=settings,
            venv=shlex.quote(venv),
            token=shlex.quote(token_file),
            cpus=size.cpus,
            port=PORT,
            nodes=launch.nodes,
            ray_start=f"--num-cpus={size.cpus} --num-gpus={size.gpus} --disable-usage-stats "
            f"--metrics-export-port={METRICS_PORT}",
            wait=max(120, 2 * launch.nodes),
            command=shell(launch.command),
            stopped=STOPPED,
            killed=KILLED,
        )
    )


def _quoted(option: str) -> str:
    """An option as sbatch reads it: as a shell, but a backslash counts in any quotes."""
    return shlex.quote(option).replace("\\", "\\\\")


def seconds(time: str) -> int:
    """A time limit as Slurm reads it. Raises BadLaunch where it is none."""
    if not (found := TIME.fullmatch(time)):
        raise BadLaunch(
            f"--time {time!r} is no time limit of Slurm; write hours:minutes:seconds or "
            "days-hours, such as 24:00:00"
        )
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number]
    if days is not None:
        hours, minutes, left = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, left = numbers
    else:
        hours, (minutes, left) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


BODY = """\
set -u
{settings}export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT={wait}
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH={token}
export SRUN_CPUS_PER_TASK={cpus} # which srun does not take from the job
export PATH={venv}/bin:$PATH
unset RAY_ADDRESS # of the shell that submits: the run would go to that cluster

refuse() {{ echo "aligntune: $*" >&2; exit 2; }}
for program in aligntune ray; do
  command -v $program >/dev/null || refuse "no $program in {venv}/bin on $(hostname)"
done
[ -r "$RAY_AUTH_TOKEN_PATH" ] ||
  refuse "no token at $RAY_AUTH_TOKEN_PATH; ray get-auth-token --generate makes one"
[ $((0$(stat -Lc %a "$RAY_AUTH_TOKEN_PATH") & 077)) = 0 ] ||
  refuse "others can read $RAY_AUTH_TOKEN_PATH; chmod 600 it"
srun --ntasks-per-node=1 test -w "$PWD" ||
  refuse "$PWD cannot be written to on every node; submit from storage that all nodes share"

# Every node's Ray takes the folder for temporary files that the head has. Each needs its own there.
export RAY_TMPDIR="${{RAY_TMPDIR:-${{TMPDIR:-/tmp}}}}"
mark="$RAY_TMPDIR/.aligntune-$SLURM_JOB_ID"
{{ mkdir -p "$RAY_TMPDIR" && hostname > "$mark"; }} 2>/dev/null &&
  srun --ntasks-per-node=1 bash -c 'mkdir -p "$RAY_TMPDIR" 2>/dev/null && test -w "$RAY_TMPDIR" &&
    [ "$(cat "$0" 2>/dev/null || hostname)" = "$(hostname)" ]' "$mark"
own=$?
rm -f "$mark"
[ $own = 0 ] ||
  refuse "$RAY_TMPDIR, for Ray's temporary files, is shared by nodes or cannot be written to on" \
    "one; export RAY_TMPDIR=/tmp, or another folder that each node has for itself, and submit again"

# This script runs on the job's first node, which becomes the head.
head_ip=${{ALIGNTUNE_HEAD_IP:-$(getent ahostsv4 "$SLURMD_NODENAME" | awk 'NR == 1 {{print $1}}')}}
case $head_ip in
  "" | 127.*)
    refuse "$SLURMD_NODENAME has no address here that others reach; set ALIGNTUNE_HEAD_IP" ;;
esac

(exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null &&
  refuse "port {port} of $(hostname) is in use, by another Ray or a service; end it, or keep" \\
    "off this node (sbatch --exclude)"

# The run's process, and whether it is to stop. Both sides write their file before they look for the
# other's, so that a stop which comes while Ray starts is not lost.
driver="$PWD/.aligntune-$SLURM_JOB_ID.pid"
forget() {{ rm -f "$driver" "$driver.stop"; }}
forget # of a start whose node was lost
forward() {{ reason=$1; touch "$driver.stop"; [ -s "$driver" ] && kill -TERM "$(cat "$driver")"; }}
reason=
trap 'forward time' USR1
trap 'forward stop' TERM
trap forget EXIT

# A node that is lost costs the run what was on it; the job goes on with the others.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --no-kill --wait=0 \\
  ray symmetric-run --address "$head_ip:{port}" --min-nodes {nodes} \\
  {ray_start} \\
  -- bash -c 'echo $$ > "$0"; [ ! -e "$0.stop" ] || exit {stopped}; exec "$@"' "$driver" \\
  {command} &
steps=$!
wait $steps
code=$?
while kill -0 $steps 2>/dev/null; do # a signal ends `wait` before the steps have ended
  wait $steps
  code=$?
done

if [ -n "$reason" ] && [ $code = {killed} ]; then # before the run could hear of it
  code={stopped}
fi
if [ $code = 0 ] && [ ! -s "$driver" ]; then # a Ray that does not start ends with 0 too
  echo "aligntune: the run did not start; see above" >&2
  code=1
fi
# Only what was stopped goes on: a run that was done by then is done, and one that failed would fail
# again and again.
if [ "$reason" = time ] && [ $code = {stopped} ]; then
  echo "aligntune: out of time; back to the queue, from the newest checkpoint"
  forget
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""
