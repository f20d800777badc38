"""Log-probs under the frozen model. Calls keep no state, so any of them may be made again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actors.liveness import Alive
from actors.messages import GroupTensors
from actors.models.attention import settle
from actors.models.loading import load_causal_lm
from actors.models.logprobs import (
    LogProbModel,
    check_model,
    check_packs,
    group_logprobs,
    head_calls,
    rows_of,
)
from actors.packing import a_microbatch, microbatches
from actors.specs import ModelSpec
from actors.whereabouts import whereabouts


class ReferenceActor(Alive):
    """One replica of the frozen model, on a GPU where it was given one."""

    def __init__(
        self,
        model: ModelSpec,
        tokens_per_microbatch: int,
        tokens_per_chunk: int | None,
        shared_prompts: bool,
    ) -> None:
        self._spec = model
        self._tokens_per_microbatch = tokens_per_microbatch
        self._tokens_per_chunk = tokens_per_chunk
        self._shared = shared_prompts
        self._model: LogProbModel | None = None
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def start(self) -> dict[str, object]:
        """Load the model, without adapters; a second call loads nothing. Returns `device` and
        where it runs.

        Raises:
            ModelError: the model cannot be loaded, or its log-probs cannot be trusted.
        """
        if self._model is not None:
            return {"device": str(self._device), **whereabouts()}
        model = LogProbModel(load_causal_lm(self._spec), self._tokens_per_chunk)
        model.requires_grad_(False)
        model.eval()
        if self._shared:
            settle("auto", self._spec, model.unwrapped, self._device, shared=True)
        check_model(model, packing=self._shared)
        model.to(self._device)
        if self._shared:
            check_packs(model, model, self._spec, self._device, shared=True)
        self._model = model
        return {"device": str(self._device), **whereabouts()}

    def logprobs(self, tensors: GroupTensors, temperature: float) -> tuple[int, np.ndarray]:
        """(N, log-probs [N] float32) of a group's response tokens at `temperature`.

        Called with `num_returns=2`: the driver waits for the first and never fetches the second.
        """
        if self._model is None:
            raise RuntimeError("the reference model is not loaded; call start first")
        groups = {0: tensors}
        each = a_microbatch(self._device.type)
        rows, budget = rows_of(groups), self._tokens_per_microbatch
        prompts = {0: len(tensors.prompt_ids)} if self._shared else None
        batches = microbatches(rows, budget, packed=False, each=each, prompts=prompts)
        chunks = head_calls(self._model, groups, batches)
        found = group_logprobs(
            self._forward,
            groups,
            batches,
            chunks,
            temperature,
            False,
            self._device,
            self._shared,
        )
        return len(found[0]), found[0]

    def _forward(self, **inputs: Any) -> Any:
        """A pass of one micro-batch. Each shows that this replica moves."""
        assert self._model is not None, "it is loaded"
        made = self._model(**inputs)
        self.done += 1
        return made
