"""A policy's LoRA adapter as vLLM takes it: a folder, one adapter of one id, loaded in place.

Every request names the adapter, from the first on (whose weights are zero: the policy as it
starts), so one in flight goes on under the newest weights, as it does where whole weights come.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from actors.engines.base import WeightMismatch
from actors.models.adapters import adapters_of, in_a_file
from actors.scratch import OwnedFolder
from actors.specs import LoRASpec, ModelSpec
from actors.transfer.bundle import WeightBundle

_NAME, _ID = "policy", 1


def lora_options(lora: LoRASpec) -> dict[str, Any]:
    """Of vLLM's AsyncEngineArgs: one adapter at a time, of this rank or the next that it has."""
    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    if lora.r > ranks[-1]:
        raise ValueError(
            f"model.lora.r is {lora.r} and vLLM's adapters go up to {ranks[-1]}; lower it, or set "
            "rollout.weight_sync to full"
        )
    rank = next(each for each in ranks if each >= lora.r)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


class AdapterFolder:
    """The adapter of one engine, in a temporary folder of its node."""

    def __init__(self, model: ModelSpec) -> None:
        """An adapter that changes nothing. Raises ModelError."""
        adapters = adapters_of(model)
        self._shapes = adapters.shapes
        self._temporary = OwnedFolder("aligntune-adapter-")
        self._folder = Path(self._temporary.path)
        adapters.config.save_pretrained(str(self._folder))
        self._save({name: torch.zeros(shape) for name, shape in self._shapes.items()})

    def write(self, bundle: WeightBundle) -> None:
        """Put a version's weights there. Raises WeightMismatch where they are no such adapter."""
        tensors = dict(bundle.items())
        wanted = self._shapes.items()
        odd = dict(wanted ^ {name: tensor.shape for name, tensor in tensors.items()}.items())
        if odd:
            raise WeightMismatch(
                f"adapter of version {bundle.version}: {min(odd)!r} ({len(odd)} such names) is not "
                "in both, of one shape; policy and rollout must load the same model and model.lora"
            )
        self._save(tensors)

    def _save(self, tensors: dict[str, torch.Tensor]) -> None:
        named = {in_a_file(name): tensor for name, tensor in tensors.items()}
        save_file(named, self._folder / "adapter_model.safetensors")

    def request(self, load: bool = False) -> Any:
        """What vLLM calls the adapter by; `load`: whether it is to read it anew."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(_NAME, _ID, str(self._folder), load_inplace=load)

    def close(self) -> None:
        """Remove the folder."""
        self._temporary.remove()
