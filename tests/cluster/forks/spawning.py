"""What tests of spawned processes run in a fork: it starts processes and writes what it saw."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Lock
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")


def answer(to: Connection, lock: Lock, code: int) -> None:
    """Say where this runs, with what, and end with `code`."""
    with lock:
        files = {n: os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
        to.send(
            {
                "parent": os.getppid(),
                "name": multiprocessing.current_process().name,
                "imported": "statistics" in sys.modules,
                "variable": os.environ.get("VLLM_NO_USAGE_STATS"),
                "starter": getattr(multiprocessing.parent_process(), "pid", None),
                "files": files,
                "processors": len(os.sched_getaffinity(0)),
                "badness": open("/proc/self/oom_score_adj").read().strip(),  # noqa: SIM115
            }
        )
    sys.exit(code)


def started(code: int = 0) -> tuple[dict[str, Any], Any]:
    """What a process says, and the process, which has ended then."""
    here, there = CONTEXT.Pipe(duplex=False)
    lock = CONTEXT.Lock()
    process = CONTEXT.Process(target=answer, args=(there, lock, code), name="told")
    process.start()
    there.close()
    said = here.recv()
    assert wait([process.sentinel], 20)
    return said, process


def main(file: str) -> None:
    saw: dict[str, Any] = {"pid": os.getpid(), "parent": os.getppid()}
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # as an engine sets it
    with open("/proc/self/oom_score_adj", "w") as badness:
        badness.write("1000")
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    saw["said"], process = started(code=7)
    saw["code"] = (process.exitcode, process.is_alive(), bool(wait([process.sentinel], 0)))
    process.close()

    sleeper = CONTEXT.Process(target=time.sleep, args=(600,))
    sleeper.start()
    sleeper.join(0)
    saw["before"] = (sleeper.exitcode, sleeper.is_alive(), sleeper.exitcode)
    saw["sleeper_parent"] = int(open(f"/proc/{sleeper.pid}/stat").read().split()[3])  # noqa: SIM115
    sleeper.terminate()
    sleeper.join(20)
    saw["terminated"] = sleeper.exitcode
    sleeper.terminate()  # it has ended: nothing is sent
    killed = CONTEXT.Process(target=time.sleep, args=(600,))
    killed.start()
    killed.kill()
    killed.join(20)
    saw["killed"] = killed.exitcode

    other = CONTEXT.Process(target=print, args=("not of a module that the server imports",))
    other.start()
    saw["other_parent"] = int(open(f"/proc/{other.pid}/stat").read().split()[3])  # noqa: SIM115
    other.join(20)
    os.environ["HF_HOME"] = "/elsewhere"
    saw["changed"], process = started(code=3)
    process.join(20)
    saw["changed_code"] = process.exitcode
    del os.environ["HF_HOME"]

    last = CONTEXT.Process(target=time.sleep, args=(600,))
    last.start()
    saw["last"] = last.pid
    with open(f"{file}.part", "w") as whole:
        json.dump(saw, whole)
    os.rename(f"{file}.part", file)
    last.join()


def without_server(file: str) -> None:
    """A process goes on when what forked it is killed, and its end is seen, if not its code."""
    sleeper = CONTEXT.Process(target=time.sleep, args=(600,))
    sleeper.start()
    os.kill(os.getppid(), signal.SIGKILL)
    sleeper.join(0.3)
    saw = [sleeper.is_alive()]
    sleeper.kill()
    sleeper.join(20)
    with open(f"{file}.part", "w") as whole:
        json.dump([*saw, sleeper.is_alive(), sleeper.exitcode], whole)
    os.rename(f"{file}.part", file)
