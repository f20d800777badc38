"""DeepSpeed ZeRO 1, 2 and 3 over one or more ranks, gloo on CPU and NCCL on GPUs.

DeepSpeed averages gradients over ranks, while a share of the loss already has the denominator of
the whole optimiser step: the average is undone, so gradients add up. All ranks must call `forward`
and `backward` equally often, since ZeRO-3 gathers weights in each.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import struct
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from actors.models.wrapped import TrainedModel
from actors.specs import ModelSpec, RankSpec
from actors.strategies.base import (
    NamedTensors,
    NonFiniteGradient,
    adapter_state,
    flush,
    make_optimizer,
    merged_state,
    rng_state,
    set_rng_state,
)

# Weights with fewer elements are kept whole on every rank under ZeRO-3: gathering them costs more.
WHOLE_BELOW = 100_000
# Elements reduced at once. DeepSpeed makes a buffer of this size, however small the model is.
LARGEST_BUCKET = 200_000_000
TAG = "deepspeed"


class DeepSpeedStrategy:
    """See `Strategy`."""

    def __init__(
        self, model: TrainedModel, spec: RankSpec, model_spec: ModelSpec, rank: int
    ) -> None:
        self.rank = rank
        self.world = spec.ranks
        # Ray shows an actor its own GPU alone, as number 0.
        self.device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        self.model = model
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, model_spec.dtype)
        self._engine: Any = None
        self._api: Any = None

    def setup(self, master_address: str, master_port: int) -> None:
        """Meet the other ranks within `start_timeout_s`; later waits last `update_timeout_s`."""
        cpu = self.device.type == "cpu"
        os.environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world),
            LOCAL_RANK="0",
            MASTER_ADDR=master_address,
            MASTER_PORT=str(master_port),
        )
        if cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        else:
            torch.cuda.set_device(self.device)
        _bind_to_route(master_address, master_port)
        store = dist.TCPStore(
            master_address,
            master_port,
            self.world,
            is_master=self.rank == 0,
            timeout=timedelta(seconds=self._spec.start_timeout_s),
        )
        backend = "gloo" if cpu else "nccl"
        dist.init_process_group(
            backend,
            store=store,
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=self._spec.update_timeout_s),
        )
        import deepspeed

        self._api = deepspeed
        # DeepSpeed calls collectives by names that torch is about to drop, thousands of times.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # A shared-memory all-reduce that is compiled at first use; gloo does without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        self._engine, _, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=make_optimizer(self.model, self._spec),
            config=self._config(),
            dist_init_required=False,
        )

    def _config(self) -> dict[str, Any]:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        bucket = min(LARGEST_BUCKET, trained)
        zero: dict[str, Any] = {
            "stage": self._spec.deepspeed.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        if self._spec.deepspeed.stage == 3:
            zero["stage3_param_persistence_threshold"] = WHOLE_BELOW
        if self._spec.deepspeed.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self._spec.deepspeed.stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand
            "gradient_clipping": self._spec.max_grad_norm,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self._dtype == torch.bfloat16},
            "steps_per_print": 10**9,
        } | ({"data_types": {"grad_accum_dtype": "fp32"}} if self._dtype != torch.float32 else {})

    def forward(self, **inputs: Any) -> Any:
        """`model.forward` through the engine, whose hooks gather sharded weights."""
        return self._engine(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss` over the micro-batches and ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world)

    def step(self, learning_rate: float) -> float:
        """Clip, step, clear; returns the global norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        # DeepSpeed skips the step at a non-finite gradient, on every rank.
        if not math.isfinite(norm) or not self._engine.was_step_applied():
            raise NonFiniteGradient(f"gradient norm {norm}")
        return norm

    def gradients(self) -> NamedTensors:
        """Gradients after the last `backward`, gathered."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.model.model.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_grad(parameter).detach().cpu().clone()

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def full_state(self) -> NamedTensors:
        """Weights in the model's dtype, LoRA merged, gathered a layer at a time."""
        return merged_state(self.model, self._dtype, self._gatherer())

    def adapter_state(self) -> NamedTensors:
        """LoRA weights, gathered."""
        return adapter_state(self.model, self._gatherer())

    def _gatherer(self) -> Callable[[list[torch.Tensor]], AbstractContextManager[Any]]:
        if self._spec.deepspeed.stage < 3:
            return lambda _: nullcontext()
        return self._api.zero.GatheredParameters

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's own files, one set a rank, and the rank's RNG state."""
        folder.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        torch.save(rng_state(self.device), folder / f"rng-rank-{self.rank}.pt")
        if self.rank == 0:
            (folder / "layout.json").write_text(json.dumps(self._layout()))
        dist.barrier()
        if self.rank == 0:
            flush(folder)
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with the same stage and number of ranks."""
        path = folder / "layout.json"
        layout = json.loads(path.read_text()) if path.is_file() else None
        if layout != self._layout():
            raise ValueError(
                f"{folder} was written with {layout or f'another {self._spec.role}.strategy'}, "
                f"and this run has {self._layout()}; resume with the settings it was written with"
            )
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if loaded is None:
            raise ValueError(f"{folder} holds no complete DeepSpeed state")
        state = torch.load(folder / f"rng-rank-{self.rank}.pt", weights_only=True)
        set_rng_state(state, self.device)

    def _layout(self) -> dict[str, Any]:
        return {
            "strategy": "deepspeed",
            "stage": self._spec.deepspeed.stage,
            "offload": self._spec.deepspeed.offload,
            "ranks": self.world,
        }

    def close(self) -> None:
        """Leave the process group."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _bind_to_route(master_address: str, master_port: int) -> None:
    """Tell gloo and NCCL the interface that reaches rank 0; they guess by the host's name else."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master_address, master_port))  # a datagram socket sends nothing here
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:  # this interface has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
                return
