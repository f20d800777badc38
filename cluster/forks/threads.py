"""Threads and the GPU, before and after a fork."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# Its library starts it anew in a fork.
_HARMLESS = {"jemalloc_bg_thd"}
_OPENBLAS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def trouble() -> str | None:
    """Why nothing may be forked from this process, or None; forks once to see.

    OpenBLAS ends its own threads at a fork, so those that are left then are others'.
    """
    child = os.fork()
    if child == 0:
        os._exit(1 if _touched_gpu() else 0)
    _, status = os.waitpid(child, 0)
    if status != 0:
        return "an import has touched a GPU, which no fork may use then"
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    extra = len([name for name in names if name not in _HARMLESS]) - 1
    return f"imports have started {extra} threads, which a fork would lose" if extra else None


def _touched_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda._is_in_bad_fork())


def limit(number: int) -> None:
    """Have what is imported compute in `number` threads, as OMP_NUM_THREADS has at an import."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(number)
    if "numpy" not in sys.modules:
        return
    for path in {line.split()[-1] for line in _maps() if "openblas" in line}:
        library = ctypes.CDLL(path)
        for name in _OPENBLAS:
            if hasattr(library, name):
                getattr(library, name)(number)
                break


def follow(environment: Mapping[str, str]) -> None:
    """Have hold for what is imported what vLLM sets for its engine's imports. Raises OSError where
    a library is to be loaded first, and is not: for torch's OpenMP, which is, vLLM asks."""
    loaded = {line.split()[-1] for line in _maps()}
    for path in environment.get("LD_PRELOAD", "").replace(":", " ").split():
        if os.path.realpath(path) not in loaded:
            raise OSError(f"{path} is to be loaded first")
    if config := sys.modules.get("torch._inductor.config"):
        dynamic = environment.get("TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "0") == "1"
        if config.cpp.dynamic_threads != dynamic:
            config.cpp.dynamic_threads = dynamic


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def follow_ray() -> None:
    """Have Ray's own choice of OMP_NUM_THREADS, made after the start, hold for what is imported."""
    from ray._private import utils as of_ray

    before = of_ray.set_omp_num_threads_if_unset

    def set_and_limit() -> bool:
        changed = bool(before())
        if changed:
            limit(int(os.environ["OMP_NUM_THREADS"]))
        return changed

    of_ray.set_omp_num_threads_if_unset = set_and_limit
