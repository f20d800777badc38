"""Which environments agree, and which workers can be forked at all."""

from __future__ import annotations

import json
import sys

import pytest

from cluster.forks import agree, start_worker
from cluster.forks.owner import with_ray

THERE = {"HOME": "/home", "HF_HOME": "/models", "OMP_NUM_THREADS": "1", "RAY_RAYLET_PID": "1"}


@pytest.mark.parametrize(
    "name", ["HF_HOME", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS"]
)
def test_a_variable_counts_that_an_import_may_read(name: str) -> None:
    assert agree.differing(THERE, THERE | {name: "other"}) == [name]
    assert agree.differing(THERE | {name: "other"}, THERE) == [name]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "RAY_RAYLET_PID", "PWD", "PYTEST_X"])
def test_a_variable_does_not_count_that_is_applied_anew_or_never_read(name: str) -> None:
    assert agree.differing(THERE, THERE | {name: "other"}) == []


def test_a_branch_is_for_those_with_the_same_variables_of_ray() -> None:
    other = {"RAY_JOB_ID": "2", "HOME": "/elsewhere"}
    assert agree.of_ray(THERE | other) == (("RAY_JOB_ID", "2"), ("RAY_RAYLET_PID", "1"))


def test_who_sees_no_gpu_is_of_the_same_branch_and_may_have_its_own_forked() -> None:
    from ray._private.accelerators import (
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR,
        get_all_accelerator_managers,
    )

    assert agree.NO_GPU == RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO_ENV_VAR
    assert agree.of_ray(THERE | {agree.NO_GPU: "1"}) == agree.of_ray(THERE)
    managers = get_all_accelerator_managers()
    emptied = {manager.get_visible_accelerator_ids_env_var() for manager in managers} - {None}
    assert "CUDA_VISIBLE_DEVICES" in emptied
    assert agree.changed(THERE, THERE | dict.fromkeys(emptied, "")) == []


def test_what_imports_set_is_set_in_a_fork_but_where_it_is_to_be_otherwise() -> None:
    after = THERE | {"SET": "by an import", "HF_HOME": "changed", "OMP_NUM_THREADS": "8"}
    made = agree.environment(THERE | {"OMP_NUM_THREADS": "2"}, THERE, after)
    assert made == THERE | {"SET": "by an import", "HF_HOME": "changed", "OMP_NUM_THREADS": "2"}


def arguments(**context: object) -> list[str]:
    shown = json.dumps({"py_executable": sys.executable, "command_prefix": []} | context)
    return ["/r/default_worker.py", "--a=1", "--language=PYTHON", start_worker._CONTEXT + shown]


def test_a_worker_has_its_own_arguments_and_the_variables_of_its_runtime_environment() -> None:
    command, environment = start_worker.wanted(arguments(env_vars={"A": "2"}), {"A": "1", "B": "1"})
    assert command == ["/r/default_worker.py", "--a=1"]
    assert environment == {"A": "2", "B": "1"}


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["-s", "/r/default_worker.py"],
        ["/r/default_worker.py", "--language=JAVA"],
        arguments(py_executable="uv run"),
        arguments(command_prefix=["nice"]),
        arguments(override_worker_entrypoint="/mine.py"),
        arguments(env_vars={"PATH": "/x:${PATH}"}),
    ],
)
def test_a_worker_that_is_no_plain_one_starts_by_itself(line: list[str]) -> None:
    with pytest.raises(start_worker.NotForked):
        start_worker.wanted(line, {})


def test_modules_that_import_ray_are_for_the_branches() -> None:
    assert with_ray("ray.actor")
    assert with_ray("actors.policy")
    assert with_ray("vllm.v1.engine.core")
    assert not with_ray("vllm.v1.sample.sampler")
