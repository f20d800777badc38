"""What the whole test session shares: one Ray, one tiny model."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from aligntune import cycles, imports
from cluster import local
from cluster.forks import owner, wire

cycles.seldom()  # collection imports all that tests need

# A suite that passed passes again, on a busy machine too; new examples are looked for with
# --hypothesis-profile=search.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", derandomize=False, deadline=None)
settings.load_profile("repeatable")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Or Ray lists all logs of a session ten times a second, to find those that nobody has asked to see.
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "5")
# Nor does anybody look at the figures that Ray's processes take of themselves and of the machine.
for _name, _value in {
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "AUTOSCALER_UPDATE_INTERVAL_S": "60",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
}.items():
    os.environ.setdefault(_name, _value)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # as engines set it
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and their tensors are tiny
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # nobody here is a machine of Amazon's

# Programs that tests start in other folders find this repository, and their workers are forked.
os.environ.setdefault("PYTHONPATH", str(Path(__file__).parents[1]))

STARTED = dict(os.environ)  # before anything is imported that sets variables of its own

IMPORTS = (
    *imports.MODELS,
    *imports.LORA,
    *imports.TRL,
    *imports.DEEPSPEED,
    *imports.FSDP,
    *imports.VLLM,
    *imports.WORKERS,
    *imports.ROLES,
)
WHOLE_RUNS = "tests/e2e/"
# Minutes long: no worker is to be alone with one at the end. Those of tests/cluster share nodes.
FIRST = ("tests/cluster/test_three_nodes.py", "tests/cluster/test_joining_nodes.py")
FIRST_OF_WHOLE_RUNS = tuple(
    f"{WHOLE_RUNS}test_{name}.py" for name in ("recovery", "quickstart", "documents", "storage")
)


def pytest_configure(config: pytest.Config) -> None:
    """One process imports for the workers of every Ray of the tests, once one asks for it; what
    they fetch lies in one folder. A shell that starts a command in the background has it ignore
    Ctrl-C, and all that the command starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        shared = ExitStack()
        cache = shared.enter_context(tempfile.TemporaryDirectory(prefix="aligntune-cache-"))
        os.environ["ALIGNTUNE_CACHE"] = cache
        shared.enter_context(owner.server(("later", *IMPORTS)))
        config.add_cleanup(shared.close)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long is slow too: `-m "not slow"` takes the place of `-m "not long"`."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: _turn(item.nodeid.partition("::")[0]))


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: to look for cycles among them again and again would
    take a part of every test's time."""
    cycles.as_usual()
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """pytest collects five times at its end, and Python once more: what was imported is left out
    of the five. A worker, whose fixtures have ended what they started, takes nothing down: that
    took 10 s. What is still frozen where a process ends by itself would be told as leaked."""
    if hasattr(config, "workerinput"):
        atexit.register(os._exit, 0)
    else:
        atexit.register(gc.unfreeze)


def _turn(file: str) -> tuple[bool, int]:
    """Whole runs go after all else, whose modules they leave behind; of each, the longest first."""
    whole = file.startswith(WHOLE_RUNS)
    longest = FIRST_OF_WHOLE_RUNS if whole else FIRST
    return whole, longest.index(file) if file in longest else len(longest)


@pytest.fixture(autouse=True, scope="module")
def _environment() -> None:
    """Variables that imports have set are gone, or no worker of the Rays that a module's tests
    start would be forked: an import may have read them."""
    for name in _set_meanwhile():
        del os.environ[name]


def plain_environment() -> dict[str, str]:
    """That of the session's start, in which a program is forked; an import may have set more."""
    return {**STARTED, wire.SOCKET: os.environ.get(wire.SOCKET, "off")}


def _set_meanwhile() -> list[str]:
    ours = ("RAY_", "ALIGNTUNE_", "PYTEST_")
    return [name for name in os.environ.keys() - STARTED.keys() if not name.startswith(ours)]


@pytest.fixture(autouse=True)
def _search_path() -> Iterator[None]:
    """A folder that a test puts on `sys.path` leaves it with the test."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(autouse=True, scope="session")
def _disk() -> Iterator[None]:
    """No test of this process waits for a real disk; what a disk holds after a crash is played in
    tests/torn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of this test session, with more logical CPUs than the machine need have. It starts in
    the environment of the fork server's imports, or none of its workers would be forked."""
    import ray

    with pytest.MonkeyPatch.context() as patch, local.unread_logs(), owner.workers():
        for name in _set_meanwhile():
            patch.delenv(name)
        for name, value in STARTED.items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=16,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 * 2**20,
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen-architecture model of a few thousand parameters with its tokenizer."""
    from aligntune.quickstart.task import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    make_model(seed=0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
