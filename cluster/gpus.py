"""Kinds of GPUs: the shipped table of them, and which of them this machine or a node of Ray has.

A GPU that the table lacks counts as one that it has with at most its memory. One with less memory
than all of them has a name of its own, such as bf16-16376mib: its memory, at the least rates.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from cluster.tables import DATA, UnknownName, nearest

NVIDIA_SMI_SECONDS = 60.0  # without persistence mode it loads the driver first, GPU after GPU
OWN_MEMORY = re.compile(r"(bf16|fp32)-([1-9]\d*)mib")


@dataclass(frozen=True)
class GpuType:
    """One kind of GPU; rates are peaks from data sheets."""

    name: str
    memory_bytes: int
    flops: float  # dense bfloat16 FLOP/s; of float32 where it has no bfloat16
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to another GPU of the node, one direction
    network_bandwidth: float  # bytes/s to another node, one direction
    bfloat16: bool = True


@cache
def _gpu_table() -> Mapping[str, Mapping[str, Any]]:
    table: dict[str, Mapping[str, Any]] = json.loads((DATA / "gpus.json").read_text())["gpus"]
    return table


def gpu_names() -> list[str]:
    """The GPUs that are known."""
    return sorted(_gpu_table())


@cache
def gpu_type(name: str) -> GpuType:
    """The GPU called `name`. Raises UnknownName with the nearest one."""
    row = _own_memory(name.lower()) or _gpu_table().get(name.lower())
    if row is None:
        raise UnknownName(f"unknown GPU {name!r}; {nearest(name, gpu_names())}")
    return GpuType(
        name=name.lower(),
        memory_bytes=row["memory_mib"] * 2**20,
        flops=_tflops(row) * 1e12,
        memory_bandwidth=row["memory_gb_s"] * 1e9,
        link_bandwidth=row["link_gb_s"] * 1e9,
        network_bandwidth=row["network_gb_s"] * 1e9,
        bfloat16="bf16_tflops" in row,
    )


def _tflops(row: Mapping[str, Any]) -> float:
    return float(row.get("bf16_tflops", row.get("fp32_tflops")))


def _own_memory(name: str) -> Mapping[str, Any] | None:
    """The row of a GPU that is called by its arithmetic and memory; None for another name."""
    if not (said := OWN_MEMORY.fullmatch(name)):
        return None
    alike = [row for row in _gpu_table().values() if f"{said[1]}_tflops" in row]
    least = min(alike, key=lambda row: _tflops(row))
    return {**least, "memory_mib": int(said[2])}


class LocalGpu(NamedTuple):
    """A GPU that nvidia-smi lists, or (0 MiB) a part of one, a MIG instance, of which it tells
    nothing."""

    product: str
    mib: int
    bfloat16: bool


def local_gpus() -> list[LocalGpu]:
    """The GPUs that CUDA would show a process here; none where there is no nvidia-smi.

    Raises UnknownName where it does not answer within `NVIDIA_SMI_SECONDS`.
    """
    return _listed(os.environ.get("CUDA_VISIBLE_DEVICES"))


def type_of_machine() -> str | None:
    """The type that all of this machine's GPUs are at least, whatever CUDA_VISIBLE_DEVICES says: a
    node offers its GPUs also to a Ray task that is shown none. None where there is none.

    Raises UnknownName, as `local_gpus`.
    """
    return least_type(_listed(None))


def least_type(gpus: Sequence[LocalGpu]) -> str | None:
    """The type that all of `gpus` are at least; None where there is none, or one of which nothing
    is known."""
    if not gpus or not all(gpu.mib for gpu in gpus):
        return None
    kinds = {type_by_memory(gpu) for gpu in gpus}
    least = LocalGpu("", min(gpu.mib for gpu in gpus), all(gpu.bfloat16 for gpu in gpus))
    return kinds.pop() if len(kinds) == 1 else type_by_memory(least)


def _listed(visible: str | None) -> list[LocalGpu]:
    """The GPUs of this machine, all or those that are `visible` to CUDA, in its order."""
    if visible in ("", "-1") or shutil.which("nvidia-smi") is None:
        return []
    query = [
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise UnknownName(
            f"nvidia-smi does not answer within {NVIDIA_SMI_SECONDS:g} s: keep the driver loaded "
            "with `nvidia-smi -pm 1`, see `aligntune doctor`, or set CUDA_VISIBLE_DEVICES= to use "
            "no GPU"
        ) from error
    if done.returncode:
        return []  # the tool is there and the driver is not
    found: dict[str, LocalGpu] = {}
    names: dict[str, str] = {}
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5 and fields[3].isdigit():
            index, uuid, product, mib, capability = fields
            found[index] = LocalGpu(product, int(mib), float(capability) >= 8.0)
            names |= {index: index, uuid: index}
    if visible is None:
        return list(found.values())
    shown = []
    for name in visible.split(","):  # CUDA stops at the first that it does not know
        if name.startswith("MIG-"):
            shown.append(LocalGpu(name, 0, True))
            continue
        alike = (uuid for uuid in names if uuid.startswith(name))  # a part of it will do
        known = name if name.isdigit() else next(alike, "")
        if not name or known not in names:
            break
        shown.append(found[names[known]])
    return shown


def type_by_memory(gpu: LocalGpu) -> str:
    """The known GPU with the longest name that is in the product name, and memory within 3 %; else
    the largest known one that it has the memory and the arithmetic of; else its own memory."""
    product = gpu.product.lower().replace(" ", "-")
    named = [
        name
        for name, row in _gpu_table().items()
        if abs(row["memory_mib"] - gpu.mib) <= 0.03 * row["memory_mib"]
        and name.rpartition("-")[0] in product
    ]
    if named:
        return max(named, key=len)
    smaller = [
        name
        for name, row in _gpu_table().items()
        if row["memory_mib"] <= gpu.mib and ("bf16_tflops" in row) == gpu.bfloat16
    ]
    own = f"{'bf16' if gpu.bfloat16 else 'fp32'}-{gpu.mib}mib"
    return max(smaller, key=lambda name: (_gpu_table()[name]["memory_mib"], name), default=own)


def type_by_ray(kinds: Sequence[str]) -> str | None:
    """The known GPU that Ray calls one of `kinds`; the one with a size in its name first. None
    where the table lacks it, and of an A100 or V100 without a size: Ray has one name for both."""
    for kind in sorted(kinds, key=len, reverse=True):
        for name, row in _gpu_table().items():
            if kind in row["ray"]:
                return name
    return None


def least_by_ray(kinds: Sequence[str]) -> str | None:
    """The smallest known GPU that Ray calls one of `kinds`, where one name is of several sizes."""
    for name, row in _gpu_table().items():
        if set(kinds) & set(row.get("ray_least", ())):
            return name
    return None
