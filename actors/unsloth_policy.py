"""One rank of a policy whose model is loaded and stepped through Unsloth.

Nothing that Unsloth patches is imported with this module, so that `start` imports Unsloth first.
"""

from __future__ import annotations

from typing import Any

from actors.models.logprobs import LogProbModel, check_model
from actors.models.unsloth import load_unsloth, versions
from actors.models.wrapped import TrainedModel
from actors.policy import PolicyActor
from actors.specs import ModelSpec, PolicySpec


class UnslothPolicyActor(PolicyActor):
    """A policy rank; `max_length` is the longest sequence in tokens, prompt and completion."""

    def __init__(
        self,
        model: ModelSpec,
        spec: PolicySpec,
        rank: int,
        world: int,
        total_steps: int,
        seed: int,
        max_length: int,
    ) -> None:
        super().__init__(model, spec, rank, world, total_steps, seed)
        # A pack is one sequence to Unsloth, and a row that is over the budget is one of its own.
        self._max_length = max(
            max_length, spec.tokens_per_microbatch if spec.packing is True else 0
        )

    def _load(self) -> LogProbModel:
        model = super()._load()
        # Unsloth takes another path through the model when it trains, without the padding mask.
        check_model(model, self._packing)
        return model

    def _settle_packing(self, model: TrainedModel) -> None:
        # Unsloth has an attention of its own.
        packing = self._spec.packing is True
        self._spec = self._spec.model_copy(update={"packing": packing})
        self._attention = f"{'packed' if packing else 'padded'} rows, unsloth"

    def _causal_lm(self) -> Any:
        return load_unsloth(self._model_spec, self._max_length, self._seed + self._rank)

    def _backend(self) -> str:
        return versions()
