"""One rank, plain PyTorch: the model on one device, AdamW beside it.

In bfloat16 the trained weights are kept in float32 and the arithmetic runs under autocast: at
learning rates of RL an update is far below bfloat16's last digit, and would be lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actors.disk import Files
from actors.models.text_part import named_beside_text
from actors.models.wrapped import TrainedModel
from actors.specs import ModelSpec, RankSpec
from actors.strategies.optimizer import make_optimizer, put_back, settings_of, take_step, without
from actors.strategies.state import (
    NamedTensors,
    adapter_state,
    as_file,
    in_place,
    merged_state,
    rng_state,
    set_rng_state,
)


class TorchStrategy:
    """See `Strategy`; there is nobody to talk to."""

    rank = 0
    world = 1

    def __init__(
        self, model: TrainedModel, spec: RankSpec, model_spec: ModelSpec, rank: int
    ) -> None:
        if spec.ranks != 1:
            raise ValueError(
                f"{spec.role}.strategy torch has one rank, not {spec.ranks}; use deepspeed or "
                "fsdp for more"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, model_spec.dtype)
        self._optimizer: torch.optim.AdamW

    def setup(self, master_address: str, master_port: int) -> None:
        """Place the model; the address is not used."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.model.to(self.device)
        self._optimizer = make_optimizer(self.model, self._spec)

    def forward(self, **inputs: Any) -> Any:
        """`model.forward`, under autocast where the model is not float32."""
        with torch.autocast(
            self.device.type, dtype=self._dtype, enabled=self._dtype != torch.float32
        ):
            return self.model(**inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss`."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, step, clear; returns the norm before clipping."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, self._spec.max_grad_norm))
        return take_step(self._optimizer, norm, learning_rate)

    def gather(self, value: Any) -> list[Any]:
        """Only this rank's."""
        return [value]

    def full_state(self) -> NamedTensors:
        """Weights in the model's dtype, LoRA merged."""
        return merged_state(self.model, self._dtype, in_place)

    def adapter_state(self) -> NamedTensors:
        """LoRA weights."""
        return adapter_state(self.model, in_place)

    def snapshot(self) -> Files:
        """`rank-0.pt`."""
        state = {
            "strategy": "torch",
            "model": {n: p for n, p in self.model.named_parameters() if p.requires_grad},
            "optimizer": self._optimizer.state_dict(),
            "rng": rng_state(self.device),
        }
        return {"rank-0.pt": as_file(state)}

    def load(self, folder: Path) -> None:
        """Read `rank-0.pt`. An old one has weights that text never reaches, which nothing ever
        changed; they are left out."""
        path = folder / "rank-0.pt"
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no state of {self._spec.role}.strategy torch (rank-0.pt); resume "
                "with the strategy and ranks it was written with"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        beside = named_beside_text(self.model, state["model"].keys() - wanted.keys())
        if wanted.keys() != state["model"].keys() - beside:
            raise ValueError(f"{path} holds the weights of another model or of other LoRA settings")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(state["model"][name])
        settings = settings_of(self._optimizer)
        self._optimizer.load_state_dict(without(state["optimizer"], state["model"], beside))
        put_back(self._optimizer, settings)
        set_rng_state(state["rng"], self.device)

    def close(self) -> None:
        """Nothing to leave."""
