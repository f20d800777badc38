"""One rank of the critic: values of states, and the update of the model that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from actors.fetching import Fetched, objects
from actors.messages import Counts, GroupTensors, Row, UpdateJob, ValueBatch
from actors.models.inputs import collate_rows, idle_inputs
from actors.models.logprobs import rows_of
from actors.models.values import (
    ValueModel,
    asked,
    check_packing,
    check_training,
    critic_model,
    group_values,
    load_value_model,
)
from actors.models.vocabulary import check_same_tokens
from actors.padding import Padding
from actors.ranks import TrainedRank
from actors.specs import CriticSpec, ModelSpec


class CriticActor(TrainedRank):
    """Rank `rank` of `world`. Methods that all ranks must be in together say so."""

    total_loss: ClassVar[str] = "loss/value"

    def __init__(
        self,
        model: ModelSpec,
        spec: CriticSpec,
        rank: int,
        world: int,
        total_steps: int,
        seed: int,
    ) -> None:
        """Keep the settings; `model` is the policy's, from which `spec.model` may differ."""
        super().__init__(critic_model(model, spec), spec, rank, world, total_steps, seed)
        self._policy_model = model
        self._critic_spec = spec

    def _load(self) -> ValueModel:
        check_same_tokens(self._policy_model, self._critic_spec.model, "critic")
        model = load_value_model(self._model_spec)
        check_training(model, self._model_spec.name)
        self._settle_packing(model)
        if self._packing:
            check_packing(model, self._model_spec.name)
        return model

    def values(self, groups: Sequence[Any]) -> Any:
        """Values of the states of each group (GroupTensors or references to them).

        All ranks together, each with its own groups; a rank without any still takes part. Called
        with `num_returns=1 + len(groups)`: the number of tokens, which the driver waits for, and
        one StateValues a group, which it never fetches.
        """
        tensors: dict[int, GroupTensors] = dict(enumerate(objects(groups)))
        self._strategy.model.eval()
        batches = self._together(rows_of(tensors), tensors)
        found = group_values(
            self._forward,
            tensors,
            batches,
            max(self._strategy.gather(len(batches))),
            self._packing,
            self._strategy.device,
        )
        tokens = sum(len(group.token_ids) for group in tensors.values())
        return (tokens, *(found[index] for index in sorted(found))) if found else tokens

    def _idle_pass(self, job: UpdateJob, chunks: int) -> torch.Tensor:
        values = self._strategy.forward(**asked(idle_inputs().to(self._strategy.device)))
        loss: torch.Tensor = values.sum() * 0.0
        return loss

    def _batch(
        self,
        job: UpdateJob,
        rows: Sequence[Row],
        chunks: int,
        counts: Counts,
        groups: Mapping[int, Fetched],
    ) -> ValueBatch:
        device = self._strategy.device
        tensors = {row.work: groups[row.work].tensors for row in rows}
        inputs = collate_rows(tensors, rows, self._packing).to(device)
        values = self._strategy.forward(**asked(inputs))
        padding = Padding(groups, rows, device)
        targets = padding.of_each("targets", lambda group: group.targets)
        old = {i: t.values for i, t in targets.items() if t.values is not None}
        returns = {i: t.returns for i, t in targets.items() if t.returns is not None}
        if not len(old) == len(returns) == len(tensors):
            raise ValueError(
                f"training step {job.step}: the critic learns returns against the values it had, "
                "and the algorithm's `prepare` gave none"
            )
        return ValueBatch(
            values=padding.pad(values),
            old=padding.rows(old, values.dtype),
            returns=padding.rows(returns, values.dtype),
            mask=padding.mask(),
            counts=counts,
            budget=job.budget,
            rollouts=padding.rollouts(),
        )
