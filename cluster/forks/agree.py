"""Whether a process that has imported already stands for one that would import now. Pure.

What a module read from the environment when it was imported holds for all that is forked from it.
So every variable must agree, but for those that no import reads, and those that are applied anew.
"""

from __future__ import annotations

from collections.abc import Mapping

# Of shells, terminals and test runners, read by no import; and those that imports set themselves,
# which are read each time they are used.
_NEVER_READ = {"_", "PWD", "OLDPWD", "SHLVL", "TERM", "COLUMNS", "LINES"} | {
    "PYGAME_HIDE_SUPPORT_PROMPT",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
}
_NEVER_READ_PREFIXES = ("PYTEST_", "ALIGNTUNE_")
# Ray's own are read by `import ray`, which a branch of the server does for each set of them.
OF_RAY = ("RAY_", "SPT_", "PYTHONBREAKPOINT")
NO_GPU = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""With 1, Ray shows a worker that has no GPU none, else all. It is read as an actor is made."""
# What Ray sets in a worker as it makes an actor there: which accelerators it may use.
_ACCELERATORS = {
    "ASCEND_RT_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "FURIOSA_DEVICES",
    "HABANA_VISIBLE_MODULES",
    "HIP_VISIBLE_DEVICES",
    "NEURON_RT_VISIBLE_CORES",
    "ONEAPI_DEVICE_SELECTOR",
    "QBRUNTIME_VISIBLE_DEVICES",
    "RBLN_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TT_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
}
# Applied to the fork: by `threads.limit`.
_APPLIED = {"OMP_NUM_THREADS"}
# What Ray and vLLM set in a worker before it starts vLLM's engine. Each is read when it is used;
# but vLLM hands its level over to the engine, which applies it, and two are `threads.follow`'s.
_LATER = _ACCELERATORS | {
    "LD_PRELOAD",
    "LOCAL_WORLD_SIZE",
    "NUMEXPR_MAX_THREADS",
    "PYTHONBREAKPOINT",
    "RAY_ADDRESS",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_NO_USAGE_STATS",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    "VLLM_WORKER_MULTIPROC_METHOD",
}


def differing(there: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The variables in which the server's environment is another than the process is to have."""
    return sorted(
        name
        for name in there.keys() | wanted.keys()
        if there.get(name) != wanted.get(name) and _counts(name)
    )


def changed(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What a fork has changed of its environment since, and an import in a process that it starts
    would read: such a process is not to be forked. Ray's own variables count here."""
    return sorted(
        name
        for name in was.keys() | now.keys()
        if was.get(name) != now.get(name)
        and name not in _LATER
        and (_counts(name) or name.startswith(OF_RAY))
    )


def of_ray(wanted: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What `import ray` reads, or may: who has the same may be forked from the same branch."""
    read = ((n, v) for n, v in wanted.items() if n.startswith(OF_RAY) and n != NO_GPU)
    return tuple(sorted(read))


def environment(
    wanted: dict[str, str], before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a fork: what it is to have, with what imports have set meanwhile."""
    changed = {name: value for name, value in after.items() if before.get(name) != value}
    return wanted | {n: v for n, v in changed.items() if wanted.get(n) == before.get(n)}


def _counts(name: str) -> bool:
    return not (
        name in _NEVER_READ or name in _APPLIED or name.startswith((*_NEVER_READ_PREFIXES, *OF_RAY))
    )
