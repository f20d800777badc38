"""What a raylet runs to start a worker, in place of Ray's own script: asks the fork server for one.

Where there is no server, or it does not start the worker in time, the worker starts as Ray would
have started it. Standard library only: this costs what a bare Python costs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import NoReturn

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from cluster.forks import ask, wire  # noqa: E402

_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
PLAIN: dict[str, object] = {"command_prefix": [], "override_worker_entrypoint": None}


class NotForked(Exception):
    """Why a worker must start by itself."""


def wanted(arguments: list[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The worker's own command line and environment. Raises NotForked. Pure."""
    if not arguments or not arguments[0].endswith("default_worker.py"):
        raise NotForked("it is no plain Python worker")
    command, context = [], {}
    for argument in arguments:
        if argument.startswith(_CONTEXT):
            context = json.loads(argument.removeprefix(_CONTEXT))
        elif argument.startswith(_LANGUAGE):
            if argument != f"{_LANGUAGE}PYTHON":
                raise NotForked(f"it is a worker of {argument.removeprefix(_LANGUAGE)}")
        else:
            command.append(argument)
    if context.get("py_executable") not in (None, sys.executable):
        raise NotForked("it has an interpreter of its own")
    for name, value in PLAIN.items():
        if context.get(name, value) != value:
            raise NotForked(f"its runtime environment has a {name}")
    variables = context.get("env_vars") or {}
    if any("$" in value for value in variables.values()):
        raise NotForked("its runtime environment names variables in variables")
    return command, environment | variables


def start_plainly() -> NoReturn:
    """Become the worker as Ray starts it."""
    found = importlib.util.find_spec("ray")
    assert found is not None, "Ray runs this"
    assert found.submodule_search_locations is not None
    folder = os.path.join(found.submodule_search_locations[0], "_private", "workers")
    script = os.path.join(folder, "setup_worker.py")
    os.execv(sys.executable, [sys.executable, script, *sys.argv[1:]])


def main() -> None:
    try:
        command, environment = wanted(sys.argv[1:], dict(os.environ))
        path = environment.get(wire.SOCKET, "off")
        if path == "off":
            raise NotForked("there is no fork server")
        ask.fork(path, command, environment, ray=True)
    except (NotForked, OSError, ValueError) as why:
        print(f"a worker imports for itself: {why}", file=sys.stderr, flush=True)
        start_plainly()


if __name__ == "__main__":
    main()
