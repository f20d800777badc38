"""DeepSpeed ZeRO 1, 2 and 3 over one or more ranks, gloo on CPU and NCCL on GPUs.

DeepSpeed averages gradients over ranks, while a share of the loss already has the denominator of
the whole optimiser step: the average is undone, so gradients add up. All ranks must call `forward`
and `backward` equally often, since ZeRO-3 gathers weights in each.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actors.disk import Files
from actors.models.text_part import check_text_part
from actors.models.wrapped import TrainedModel
from actors.specs import ModelSpec, RankSpec
from actors.strategies.base import NonFiniteGradient
from actors.strategies.optimizer import make_optimizer, put_back, settings_of
from actors.strategies.process_group import join, leave, of_every_rank, own_device
from actors.strategies.specs import DeepSpeedSpec
from actors.strategies.state import (
    NamedTensors,
    adapter_state,
    as_file,
    in_place,
    merged_state,
    rng_state,
    set_rng_state,
)

# Weights with fewer elements are kept whole on every rank under ZeRO-3: gathering them costs more.
WHOLE_BELOW = 100_000
TAG = "deepspeed"
NOWHERE = "/nowhere"  # the folder that DeepSpeed takes itself to write to


class DeepSpeedStrategy:
    """See `Strategy`."""

    def __init__(
        self, model: TrainedModel, spec: RankSpec, model_spec: ModelSpec, rank: int
    ) -> None:
        self.rank = rank
        self.world = spec.ranks
        self.device = own_device()
        self.model = model
        self._spec = spec
        self._zero = DeepSpeedSpec.model_validate(spec.strategy)
        self._dtype: torch.dtype = getattr(torch, model_spec.dtype)
        self._engine: Any = None
        self._api: Any = None

    def setup(self, master_address: str, master_port: int) -> None:
        """Meet the other ranks within `start_timeout_s`; later waits last `update_timeout_s`."""
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        backend = join(self._spec, self.rank, self.device, master_address, master_port)
        import deepspeed

        self._api = deepspeed
        # DeepSpeed calls collectives by names that torch is about to drop, thousands of times.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # A shared-memory all-reduce that is compiled at first use; gloo does without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
        config, optimizer = self._config(), make_optimizer(self.model, self._spec)
        if self._zero.stage == 3:
            share_out(self.model, self._dtype, config)
        self._engine, _, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._engine.checkpoint_engine.load = _load_tensors

    def _config(self) -> dict[str, Any]:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        bucket = min(self._zero.largest_bucket, trained)
        zero: dict[str, Any] = {
            "stage": self._zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        if self._zero.stage == 3:
            zero["stage3_param_persistence_threshold"] = WHOLE_BELOW
        if self._zero.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self._zero.stage == 3:
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

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank."""
        return of_every_rank(value)

    def full_state(self) -> NamedTensors:
        """Weights in the model's dtype, LoRA merged, gathered a layer at a time."""
        return merged_state(self.model, self._dtype, self._whole)

    def adapter_state(self) -> NamedTensors:
        """LoRA weights, gathered."""
        return adapter_state(self.model, self._whole)

    def _whole(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._zero.stage < 3:
            return in_place(parameter, dtype)
        with self._api.zero.GatheredParameters([parameter]):
            return parameter.detach().to(dtype, copy=True)

    def snapshot(self) -> Files:
        """DeepSpeed's own files, one set a rank, and the rank's RNG state.

        Without frozen weights, which are those that the model is loaded with.
        """
        files: dict[str, memoryview | bytes] = {}
        frozen = _frozen(self.model)

        def keep(state_dict: Any, path: str) -> None:
            if (weights := state_dict.get("module")) is not None:  # tied ones by their other name
                weights = {name: kept for name, kept in weights.items() if name not in frozen}
                state_dict = {**state_dict, "module": weights}
            files[path.removeprefix(f"{NOWHERE}/")] = as_file(state_dict)

        engine = self._engine.checkpoint_engine
        engine.save, engine.makedirs = keep, lambda path, exist_ok=False: None
        self._engine._copy_recovery_script = lambda path: None  # a program; `load` needs none
        try:
            self._engine.save_checkpoint(
                NOWHERE, tag=TAG, save_latest=False, exclude_frozen_parameters=True
            )
        finally:
            del engine.save, engine.makedirs  # or the files stay in memory, by `keep`
        files[f"rng-rank-{self.rank}.pt"] = as_file(rng_state(self.device))
        if self.rank == 0:
            files["layout.json"] = json.dumps(self._layout()).encode()
        return files

    def load(self, folder: Path) -> None:
        """Read what `snapshot` made with the same stage and number of ranks."""
        path = folder / "layout.json"
        layout = json.loads(path.read_text()) if path.is_file() else None
        if layout != self._layout():
            raise ValueError(
                f"{folder} was written with {layout or f'another {self._spec.role}.strategy'}, "
                f"and this run has {self._layout()}; resume with the settings it was written with"
            )
        settings = settings_of(self._engine.optimizer)

        def take(src: Mapping[str, torch.Tensor], dst: nn.Module) -> None:
            check_text_part(self.model, src, folder)
            _take(src, dst)

        loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, custom_load_fn=take)
        if loaded is None:
            raise ValueError(f"{folder} holds no complete DeepSpeed state")
        put_back(self._engine.optimizer, settings)
        self._engine.optimizer.clip_grad = self._spec.max_grad_norm  # which stages 1 and 2 load
        state = torch.load(folder / f"rng-rank-{self.rank}.pt", weights_only=True)
        set_rng_state(state, self.device)

    def _layout(self) -> dict[str, Any]:
        return {
            "strategy": "deepspeed",
            "stage": self._zero.stage,
            "offload": self._zero.offload,
            "ranks": self.world,
        }

    def close(self) -> None:
        """Leave the process group."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        leave()


def _frozen(model: nn.Module) -> set[str]:
    """The names of weights that are not trained."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _take(src: Mapping[str, torch.Tensor], dst: nn.Module) -> None:
    """Have a model take what a checkpoint says of it, with frozen weights or without.

    Raises:
        ValueError: it says it of another model or LoRA.
    """
    missing, unexpected = dst.load_state_dict(src, strict=False)
    if unexpected or set(missing) - _frozen(dst):
        raise ValueError(
            "the checkpoint holds the weights of another model or of other LoRA settings"
        )


def share_out(model: nn.Module, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """Leave each rank its share of every weight, as ZeRO-3 of the DeepSpeed `config` keeps it.

    One weight at a time is whole on the device; `deepspeed.initialize` would put all of them there
    first. It leaves a model that is shared out as it is, so weights are cast to `dtype`, in which
    they compute, and buffers are moved here. Make the optimiser before: a weight has no shape then.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(get_accelerator().current_device_name())


def _load_tensors(path: str, map_location: Any = None) -> Any:
    """A file of DeepSpeed's; its own loader would run whatever code stands in it.

    Raises:
        ValueError: there is more in it than tensors and settings.
    """
    try:
        with torch.serialization.safe_globals(_known()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and is not loaded: {error}") from error


def _known() -> list[Any]:
    """What DeepSpeed writes beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
