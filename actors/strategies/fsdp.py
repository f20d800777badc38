"""FSDP2: weights, gradients and optimiser state in shares, over one or more ranks.

Gloo on CPU and NCCL on GPUs. A layer's weights are gathered for its forward and its backward pass,
so all ranks must call both equally often. FSDP averages gradients over ranks, while a share of the
loss already has the denominator of the whole optimiser step: here they are summed. Checkpoints are
torch's distributed ones, as safetensors: they load on another number of ranks.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from actors.disk import Files
from actors.models.wrapped import TrainedModel
from actors.specs import ModelSpec, RankSpec
from actors.strategies.optimizer import make_optimizer, take_step
from actors.strategies.process_group import join, leave, of_every_rank, own_device
from actors.strategies.state import (
    NamedTensors,
    adapter_state,
    as_file,
    merged_state,
    rng_state,
    set_rng_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


class FSDPStrategy:
    """See `Strategy`."""

    def __init__(
        self, model: TrainedModel, spec: RankSpec, model_spec: ModelSpec, rank: int
    ) -> None:
        self.rank = rank
        self.world = spec.ranks
        self.device = own_device()
        self.model = model
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, model_spec.dtype)
        self._optimizer: torch.optim.AdamW

    def setup(self, master_address: str, master_port: int) -> None:
        """Meet the other ranks, and keep this rank's share of each weight.

        A layer is moved to the device whole and alone, and cast to float32 just before.
        """
        join(self._spec, self.rank, self.device, master_address, master_port)
        # What a forward pass returns is changed in place nowhere.
        warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
        mesh = init_device_mesh(self.device.type, (self.world,))
        low = self._dtype != torch.float32
        computes = MixedPrecisionPolicy(
            param_dtype=self._dtype if low else None, reduce_dtype=torch.float32 if low else None
        )
        for part in _layers(self.model):
            fully_shard(self._in_float32(part), mesh=mesh, mp_policy=computes)
        if (head := getattr(self.model.unwrapped, "score", None)) is not None:
            fully_shard(self._in_float32(head), mesh=mesh)  # a value in bfloat16 has three digits
        root = fully_shard(self._in_float32(self.model), mesh=mesh, mp_policy=computes)
        for part in root.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)
                # Or it would ask for a multiplied sum, which gloo does not have.
                part.set_force_sum_reduction_for_comms(True)
                # Or ranks whose rows use different weights (experts) would wait for each other.
                part.set_reduce_scatter_unused_params(True)
        self._optimizer = make_optimizer(self.model, self._spec)

    def _in_float32(self, part: nn.Module) -> nn.Module:
        """`part`, with those of its trained weights that are not shared out yet as on rank 0."""
        for parameter in part.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                # New adapters are drawn, and every rank draws its own: rank 0's it is.
                parameter.data = parameter.data.to(self.device, torch.float32)
                dist.broadcast(parameter.data, src=0)
        return part

    @property
    def _root(self) -> FSDPModule:
        return cast(FSDPModule, self.model)

    def forward(self, **inputs: Any) -> Any:
        """`model.forward`, whose hooks gather what they need."""
        outputs = self.model(**inputs)
        if not torch.is_grad_enabled():
            self._root.reshard()  # else the root's weights stay gathered, for a backward pass
        return outputs

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss` over the micro-batches and ranks."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, step, clear; returns the global norm before clipping."""
        found = torch.nn.utils.clip_grad_norm_(
            [p for _, p in self._trained()], self._spec.max_grad_norm
        )
        return take_step(self._optimizer, float(_whole(found, found.dtype)), learning_rate)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank."""
        return of_every_rank(value)

    def full_state(self) -> NamedTensors:
        """Weights in the model's dtype, LoRA merged, gathered one by one.

        A share is cast before it is sent where nothing is added to it: the same bits, half the
        bytes.
        """
        return merged_state(self.model, self._dtype, _whole)

    def adapter_state(self) -> NamedTensors:
        """LoRA weights, gathered."""
        return adapter_state(self.model, _whole)

    def snapshot(self) -> Files:
        """Safetensors, one file a rank, with the ranks' RNG states beside them."""
        writer = HuggingFaceStorageWriter("", save_distributed=True)
        memory = writer.fs = _Memory()
        writer.sync_files = False
        checkpoint.save(self._state(), storage_writer=writer)
        files = {name: buffer.getbuffer() for name, buffer in memory.files.items()}
        files[f"rng-rank-{self.rank}.pt"] = as_file(rng_state(self.device))
        if self.rank == 0:
            layout = {"strategy": "fsdp", "ranks": self.world, "optimiser_steps": self._steps()}
            files["layout.json"] = memoryview(json.dumps(layout).encode())
        return files

    def load(self, folder: Path) -> None:
        """Read what `snapshot` made, on any number of ranks.

        A rank that was not there draws (LoRA's dropout) as in a new run.
        """
        path = folder / "layout.json"
        layout = json.loads(path.read_text()) if path.is_file() else {}
        if layout.get("strategy") != "fsdp":
            raise ValueError(
                f"{folder} holds no state of {self._spec.role}.strategy fsdp; resume with the "
                "strategy it was written with"
            )
        state = self._state()
        reader = HuggingFaceStorageReader(str(folder))
        if set(state) != set(reader.read_metadata().state_dict_metadata):
            raise ValueError(f"{folder} holds the weights of another model or LoRA settings")
        self._root.reshard()
        checkpoint.load(state, storage_reader=reader)
        for _, parameter in self._trained():
            self._optimizer.state[parameter]["step"].fill_(layout["optimiser_steps"])
        rng = folder / f"rng-rank-{self.rank}.pt"
        if rng.is_file():
            set_rng_state(torch.load(rng, weights_only=True), self.device)

    def _state(self) -> dict[str, torch.Tensor]:
        """Every trained weight and its moments, which are made here where no step has been."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained():
            kept = self._optimizer.state[parameter]
            if not kept:
                kept["step"] = torch.zeros((), dtype=torch.float32, device=self.device)
                kept.update({moment: torch.zeros_like(parameter) for moment in MOMENTS})
            state[f"weight.{name}"] = parameter.detach()
            state.update({f"{moment}.{name}": kept[moment] for moment in MOMENTS})
        return state

    def _steps(self) -> float:
        """Optimiser steps made, the same for every weight."""
        steps = {float(self._optimizer.state[p]["step"]) for _, p in self._trained()}
        if len(steps) != 1:
            raise ValueError(f"weights differ in how often they were stepped: {sorted(steps)}")
        return steps.pop()

    def close(self) -> None:
        """Leave the process group."""
        leave()


class _Kept(io.BytesIO):
    """A file in memory, which is there after it was closed."""

    def close(self) -> None:
        """It stays."""


class _Memory(FileSystem):
    """The files that torch writes of a checkpoint, in memory, by name."""

    def __init__(self) -> None:
        self.files: dict[str, _Kept] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[_Kept]:
        """A file."""
        yield self.files.setdefault(Path(path).name, _Kept())

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """There are no folders."""


def _layers(model: TrainedModel) -> list[nn.Module]:
    """What is gathered as one: the layers, as transformers names them."""
    layers = set(getattr(model.unwrapped, "_no_split_modules", None) or ())
    return [part for part in model.modules() if type(part).__name__ in layers]


def _whole(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All of a sharded tensor in `dtype`; all ranks together."""
    tensor = tensor.detach().to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
