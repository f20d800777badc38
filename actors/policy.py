"""One rank of the policy: log-probs, token-level targets, and its weights as others want them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch

from actors.fetching import Fetched, objects
from actors.messages import (
    Counts,
    GroupTensors,
    GroupWork,
    PrepareJob,
    Row,
    TokenBatch,
    TokenInputs,
    UpdateJob,
    last_rows,
    sum_rows,
)
from actors.models.attention import FLASH
from actors.models.checkpoint_names import checkpoint_weights
from actors.models.inputs import collate_rows, idle_inputs
from actors.models.loading import load_causal_lm
from actors.models.logprobs import (
    LogProbModel,
    check_model,
    check_packs,
    group_logprobs,
    rows_of,
)
from actors.packing import longest
from actors.padding import Padding
from actors.ranks import TrainedRank
from actors.specs import ModelSpec, PolicySpec
from actors.strategies.state import NamedTensors
from actors.transfer.base import Exported
from actors.transfer.bundle import WeightBundle
from actors.transfer.delta import Exports, WeightDelta


class PolicyActor(TrainedRank):
    """Rank `rank` of `world`. Methods that all ranks must be in together say so."""

    total_loss: ClassVar[str] = "loss/total"

    def __init__(
        self,
        model: ModelSpec,
        spec: PolicySpec,
        rank: int,
        world: int,
        total_steps: int,
        seed: int,
    ) -> None:
        """Keep the settings; `start` loads. `total_steps` are training steps, for the schedule."""
        super().__init__(model, spec, rank, world, total_steps, seed)
        self._tokens_per_chunk = spec.tokens_per_chunk
        self._shared = spec.shared_prompts
        self._exports = Exports()
        self._sender: Any = None
        self._own_old: set[Row] = set()  # whose old log-probs their first forward pass gives
        self._noisy: set[Row] = set()  # whose first pass has dropout, and weights as at the start

    def _load(self) -> LogProbModel:
        model = LogProbModel(self._causal_lm(), self._tokens_per_chunk)
        self._settle_packing(model)
        check_model(model, self._packing, training=True)
        return model

    def _causal_lm(self) -> Any:
        """The model that is trained, with adapters where the settings ask for them."""
        return load_causal_lm(self._model_spec, lora=self._model_spec.lora is not None)

    def _backend(self) -> str:
        """What loads and steps the model, with its version."""
        names = ["transformers"] if self._model_spec.lora is None else ["transformers", "peft"]
        return ", ".join(f"{name} {version(name)}" for name in names)

    def start(self, master_address: str, master_port: int) -> dict[str, Any]:
        """As every rank's, with the `backend` that really runs."""
        started = super().start(master_address, master_port)
        spec, strategy = self._model_spec, self._strategy
        if self._shared or (self._packing and spec.attention.startswith(FLASH)):
            # No CPU has shown what these kernels do.
            check_packs(strategy.forward, strategy.model, spec, strategy.device, self._shared)
        return {**started, "backend": self._backend()}

    def prepare(self, job: PrepareJob) -> Any:
        """Token-level targets of this rank's groups; all ranks together, even without a group.

        Called with `num_returns=1 + len(job.groups)`: figures of the whole step, which the driver
        waits for, and one TokenTargets a group, which it never fetches. Critic values are fetched
        last, so they may still be in the making at the call.
        """
        groups = self._fetch(job.groups)
        tensors = {index: group.tensors for index, group in groups.items()}
        if job.recompute_old:
            old = self._passes(tensors, rows_of(tensors), job.temperature)
        else:
            old = {index: group.logprobs for index, group in tensors.items()}
        values = objects([work.values for work in job.groups])
        inputs = [
            TokenInputs(
                lengths=sum_rows(work.lengths, work.rollouts),
                trained=work.trained,
                truncated=work.truncated,
                scores=work.scores,
                mask=groups[index].tensors.mask,
                old=old[index],
                reference=groups[index].reference,
                values=None if values[index] is None else values[index].values,
                final_values=None
                if values[index] is None
                else values[index].final[last_rows(work.rollouts)],
                rewards=turn_rewards(work, groups[index].tensors),
            )
            for index, work in enumerate(job.groups)
        ]
        targets, figures = job.prepare(inputs, self._all_sum)
        return (figures, *targets) if targets else figures

    def _all_sum(self, local: torch.Tensor) -> torch.Tensor:
        """A small float64 vector summed over ranks, in rank order, so every rank has the same."""
        parts = self._strategy.gather(local)
        return torch.stack(parts).sum(0)

    def export_weights(
        self, version: int, as_checkpoint: bool = False
    ) -> tuple[int, WeightBundle | None]:
        """(bytes, the weights as policy `version`), on rank 0; all ranks together. They have the
        names of transformers' model, or those of its checkpoint.

        Called with `num_returns=2`: the driver waits for the first and never fetches the second.
        """
        return self._lent(version, self._weights(as_checkpoint))

    def export_adapter(self, version: int) -> tuple[int, WeightBundle | None]:
        """As `export_weights`, of the LoRA adapter alone, under PEFT's names."""
        return self._lent(version, self._strategy.adapter_state())

    def _weights(self, as_checkpoint: bool) -> NamedTensors:
        weights = self._strategy.full_state()
        model = self._strategy.model.unwrapped
        return checkpoint_weights(model, weights) if as_checkpoint else weights

    def _lent(self, version: int, tensors: NamedTensors) -> tuple[int, WeightBundle | None]:
        if self._rank == 0:  # Ray copies it out before this rank is asked for anything else
            bundle = WeightBundle.lend(version, tensors)
            return bundle.nbytes, bundle
        for _ in tensors:
            pass
        return 0, None

    def export_changes(
        self, version: int, since: int | None, as_checkpoint: bool = False
    ) -> tuple[Exported | None, WeightBundle | WeightDelta | None]:
        """What the weights, as policy `version`, have changed since version `since`, or all of
        them; on rank 0, all ranks together.

        Named, and called with `num_returns=2`, as `export_weights`.
        """
        if self._rank == 0:
            made = self._exports.take(version, self._weights(as_checkpoint), since)
            whole = isinstance(made, WeightBundle)
            return Exported(made.nbytes, whole, self._exports.nbytes), made
        for _ in self._weights(as_checkpoint):
            pass
        return None, None

    def send(self, sender: str, method: str, *args: Any) -> Any:
        """What `method` answers of this rank's side of a transport: `sender` (module:Class), which
        is made of the strategy once. All ranks together, unless the method says otherwise."""
        if self._sender is None:
            module, _, name = sender.partition(":")
            self._sender = getattr(importlib.import_module(module), name)(self._strategy)
        return getattr(self._sender, method)(*args)

    def _complete(
        self, job: UpdateJob, groups: dict[int, Fetched], first: Sequence[Row]
    ) -> dict[int, Fetched]:
        """With old log-probs, from the targets, by one pass over this rank's rows, or (of `first`)
        by the forward pass of their own optimiser step, before which no weight has changed.

        Where LoRA has dropout, that pass has its noise. The ratio of `first` is taken against it,
        and is 1; what the rollout engine is compared with comes of a pass without.
        """
        lora = self._model_spec.lora
        self._own_old = set()
        self._noisy = set(first) if lora is not None and lora.dropout > 0 else set()
        if not job.recompute_old:
            return groups
        unknown = {i: group.tensors for i, group in groups.items() if group.targets is None}
        if not self._noisy:
            self._own_old = {row for row in first if row.work in unknown}
        rows = {row: None for part in job.minibatches for row in part if row.work in unknown}
        found = self._passes(
            unknown, [row for row in rows if row not in self._own_old], job.temperature
        )
        return groups | {index: replace(groups[index], old=old) for index, old in found.items()}

    def _keep_own_old(
        self, rows: Sequence[Row], groups: Mapping[int, Fetched], logp: torch.Tensor
    ) -> None:
        """Write log-probs [N of the rows] into the old ones of those that have none yet."""
        if self._own_old.isdisjoint(rows):
            return
        values = logp.detach().float().cpu().numpy()
        start = 0
        for row in rows:
            cut = groups[row.work].tensors.completion(row.completion)
            end = start + cut.stop - cut.start
            if row in self._own_old:
                old = groups[row.work].old
                assert old is not None
                old[cut] = values[start:end]
            start = end
        self._own_old.difference_update(rows)

    def _passes(
        self, tensors: Mapping[int, GroupTensors], rows: Sequence[Row], temperature: float
    ) -> dict[int, np.ndarray]:
        """Log-probs [N] of each group, for `rows`; all ranks together."""
        self._strategy.model.eval()
        batches = self._together(rows, tensors)
        own = self._head_calls(tensors, batches)
        return group_logprobs(
            self._forward,
            tensors,
            batches,
            longest(self._strategy.gather(own)),
            temperature,
            self._packing,
            self._strategy.device,
            self._shared,
        )

    def _idle_pass(self, job: UpdateJob, chunks: int) -> torch.Tensor:
        logp, _ = self._strategy.forward(
            **vars(idle_inputs().to(self._strategy.device)),
            temperature=job.temperature,
            entropy=True,
            chunks=chunks,
        )
        return logp.sum() * 0.0

    def _batch(
        self,
        job: UpdateJob,
        rows: Sequence[Row],
        chunks: int,
        counts: Counts,
        groups: Mapping[int, Fetched],
    ) -> TokenBatch:
        device = self._strategy.device
        tensors = {row.work: groups[row.work].tensors for row in rows}
        inputs = collate_rows(tensors, rows, self._packing, self._shared).to(device)
        logp, entropy = self._strategy.forward(
            **vars(inputs), temperature=job.temperature, entropy=True, chunks=chunks
        )
        self._keep_own_old(rows, groups, logp)
        padding = Padding(groups, rows, device)
        targets = padding.of_each("targets", lambda group: group.targets)
        references = padding.of_each("reference log-probs", lambda group: group.reference)
        if targets:
            advantages = padding.rows({i: t.advantages for i, t in targets.items()}, logp.dtype)
            old = {i: t.old for i, t in targets.items()}
        else:
            works = [groups[row.work].work for row in rows]
            numbers = [
                work.advantages[work.rollouts[row.completion]]
                for work, row in zip(works, rows, strict=True)
            ]
            advantages = padding.per_row(numbers, logp.dtype)
            old = padding.of_each("old log-probs", lambda group: group.old)
        before = padding.rows(old, logp.dtype) if old else None
        noisy = not self._noisy.isdisjoint(rows)
        self._noisy.difference_update(rows)
        return TokenBatch(
            logp=padding.pad(logp),
            old=padding.pad(logp.detach()) if before is None or noisy else before,
            roll=padding.rows({i: t.logprobs for i, t in tensors.items()}, logp.dtype),
            mask=padding.mask(),
            advantages=advantages,
            counts=counts,
            budget=job.budget,
            ref=padding.rows(references, logp.dtype) if references else None,
            entropy=None if entropy is None else padding.pad(entropy),
            rollouts=padding.rollouts(),
            start=before if noisy else None,
        )


def turn_rewards(work: GroupWork, tensors: GroupTensors) -> np.ndarray | None:
    """[N] the weighted rewards of single turns, where the algorithm places them."""
    if tensors.rewards is None or work.turn_weight == 0:
        return None
    return np.asarray(tensors.rewards * np.float32(work.turn_weight))
