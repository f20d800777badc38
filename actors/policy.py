"""One rank of the policy: log-probs, the update, and its weights as others want them.

The loss is a callable; nothing here knows which algorithm made it. The gradient of an optimiser
step does not depend on how its rows are cut into micro-batches, packed, padded or shared over
ranks: the loss gets denominators that are global over the step before the first backward pass.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.loading import load_causal_lm, load_tokenizer
from actors.logprobs import (
    LogProbModel,
    check_model,
    collate_rows,
    group_logprobs,
    idle_inputs,
    plan_passes,
    rows_of,
)
from actors.messages import (
    Counts,
    GroupTensors,
    GroupWork,
    LossTerms,
    Row,
    TokenBatch,
    TokenTargets,
    UpdateJob,
    UpdateResult,
)
from actors.specs import ModelSpec, PolicySpec
from actors.strategies.base import NonFiniteGradient, Strategy, flush, learning_rate
from actors.weights import WeightBundle


class NonFiniteUpdate(ArithmeticError):
    """A loss or gradient was NaN or infinite; the optimiser step in question was not applied."""


@dataclass(frozen=True)
class _Fetched:
    """The arrays of one group, on this rank."""

    work: GroupWork
    tensors: GroupTensors
    reference: np.ndarray | None  # [N]
    targets: TokenTargets | None


@dataclass(frozen=True)
class _Minibatch:
    """One optimiser step as this rank runs it."""

    batches: tuple[tuple[Row, ...], ...]  # this rank's micro-batches
    chunks: list[int]  # head calls of each micro-batch of the longest-running rank
    counts: Counts  # global
    tokens: int  # prompt and response tokens, global


class _Tally:
    """Numerators and maxima of one optimiser step on one rank, to be joined with the others'."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.sums: dict[str, tuple[float, str]] = {}
        self.maxima: dict[str, float] = {}

    def add(self, terms: LossTerms) -> None:
        """Take in one micro-batch."""
        self.loss += float(terms.loss.detach())
        for name, (value, count) in terms.sums.items():
            known, _ = self.sums.get(name, (0.0, count))
            self.sums[name] = (known + float(value.detach()), count)
        for name, peak in terms.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), float(peak.detach()))


class PolicyActor:
    """Rank `rank` of `world`. Methods that all ranks must be in together say so."""

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
        if world != spec.ranks:
            raise ValueError(f"policy.ranks is {spec.ranks}, but {world} ranks were made")
        self._model_spec = model
        self._spec = spec
        self._rank = rank
        self._world = world
        self._total_steps = total_steps
        self._seed = seed
        self._strategy: Strategy

    def address(self) -> tuple[str, int]:
        """This node's address and a free port; rank 0's is where the ranks meet."""
        host = _node_address()
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def start(self, master_address: str, master_port: int) -> dict[str, Any]:
        """Load, check and place the model; all ranks together.

        Returns:
            `device`, `pid`, `node`, `rank`, and the numbers of `parameters` and `trainable` ones.

        Raises:
            ModelError: the model cannot be loaded, or its log-probs cannot be trusted.
        """
        torch.manual_seed(self._seed + self._rank)
        if not torch.cuda.is_available():
            torch.use_deterministic_algorithms(True)
            # Or every buffer is filled with NaN first; none is read here before it is written.
            torch.utils.deterministic.fill_uninitialized_memory = False
        wrapped = LogProbModel(
            load_causal_lm(self._model_spec, lora=self._model_spec.lora is not None),
            self._spec.tokens_per_chunk,
        )
        check_model(wrapped, self._spec.packing)
        parameters = [(p.numel(), p.requires_grad) for p in wrapped.parameters()]
        self._strategy = make_strategy(wrapped, self._spec, self._model_spec, self._rank)
        self._strategy.setup(master_address, master_port)
        return {
            "device": str(self._strategy.device),
            "pid": os.getpid(),
            "node": _node_address(),
            "rank": self._rank,
            "parameters": sum(size for size, _ in parameters),
            "trainable": sum(size for size, trained in parameters if trained),
        }

    def update(self, job: UpdateJob) -> UpdateResult:
        """Every optimiser step of `job`; all ranks together, each with its own rows.

        Raises:
            NonFiniteUpdate: on all ranks, before the optimiser step in question; its gradients are
                spent, so the policy goes on from a checkpoint.
        """
        began = time.perf_counter()
        groups = self._fetch(job)
        plan = self._plan(job, groups)
        rate = learning_rate(self._spec, job.step, self._total_steps)
        old = self._old(job, groups) if job.recompute_old else {}
        self._strategy.model.train()
        tallies, norms = [], []
        for index, minibatch in enumerate(plan):
            if minibatch.counts.tokens == 0:  # nothing to learn from; Adam would still move
                continue
            tally = self._accumulate(job, minibatch, groups, old, f"optimiser step {index + 1}")
            try:
                norms.append(self._strategy.step(rate))
            except NonFiniteGradient as error:
                raise NonFiniteUpdate(
                    f"training step {job.step}, optimiser step {index + 1} of {len(plan)}: {error} "
                    f"with a finite loss of {tally.loss:.6g} on rank {self._rank}; no weight was "
                    "changed. Lower policy.learning_rate or look at the rewards of this step"
                ) from error
            tallies.append((tally, minibatch.counts))
        metrics = self._join(tallies)
        metrics["policy/learning_rate"] = rate
        if norms:
            metrics["policy/grad_norm"] = sum(norms) / len(norms)
        if len(norms) < len(plan):
            metrics["policy/empty_minibatches"] = float(len(plan) - len(norms))
        return UpdateResult(
            metrics=metrics,
            seconds=time.perf_counter() - began,
            tokens=sum(minibatch.tokens for minibatch in plan),
        )

    def logprobs(self, groups: Sequence[Any], temperature: float) -> list[np.ndarray]:
        """Log-probs [N] float32 of each group (GroupTensors or references to them).

        All ranks together, each with its own groups; a rank without any still takes part.
        """
        tensors = dict(enumerate(_get(list(groups))))
        self._strategy.model.eval()
        found = self._passes(tensors, rows_of(tensors), temperature)
        return [found[index] for index in sorted(found)]

    def export_weights(self, version: int) -> tuple[int, WeightBundle | None]:
        """(bytes, the weights as policy `version`), on rank 0; all ranks together.

        Called with `num_returns=2`: the driver waits for the first and never fetches the second.
        """
        if self._rank == 0:
            bundle = WeightBundle.pack(version, self._strategy.full_state())
            return bundle.nbytes, bundle
        for _ in self._strategy.full_state():
            pass
        return 0, None

    def save(self, folder: str | Path) -> None:
        """Write the complete training state, each rank its part; all ranks together.

        `torch` writes rank-0.pt. `deepspeed` writes layout.json, rng-rank-*.pt and DeepSpeed's own
        files. Everything is on disk when this returns; making `folder` appear at once is the
        caller's.
        """
        self._strategy.save(Path(folder))

    def load(self, folder: str | Path) -> None:
        """Take back what `save` wrote; all ranks together.

        Raises:
            ValueError: it was written with another strategy, stage or number of ranks.
        """
        self._strategy.load(Path(folder))

    def save_model(self, folder: str | Path) -> None:
        """Write a model that transformers and vLLM load; all ranks together, rank 0 writes.

        safetensors, config, generation config and tokenizer; with LoRA the merged model, and the
        adapter in `folder`/adapter.
        """
        keep = self._rank == 0
        state = _copied(self._strategy.full_state(), keep)
        adapter = _copied(self._strategy.adapter_state(), keep)
        if not keep:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        wrapped = self._strategy.model
        causal = wrapped.causal_lm
        parameters = {name for name, _ in causal.named_parameters(remove_duplicate=False)}
        for name, buffer in causal.state_dict().items():  # persistent buffers are part of a model
            if name not in parameters and "lora_" not in name:
                state[name] = buffer.detach().cpu()
        causal.save_pretrained(folder, state_dict=state)
        load_tokenizer(self._model_spec).save_pretrained(folder)
        if adapter:
            wrapped.model.save_pretrained(folder / "adapter", state_dict=adapter)
        flush(folder)

    def close(self) -> None:
        """Leave the other ranks."""
        self._strategy.close()

    def _fetch(self, job: UpdateJob) -> dict[int, _Fetched]:
        """The groups that this rank's rows come from, by their index in the job."""
        needed = sorted({row.work for rows in job.minibatches for row in rows})
        works = [job.groups[index] for index in needed]
        tensors = _get([work.tensors for work in works])
        references = _get([work.reference for work in works])
        targets = _get([work.targets for work in works])
        return {
            index: _Fetched(*parts)
            for index, *parts in zip(needed, works, tensors, references, targets, strict=True)
        }

    def _plan(self, job: UpdateJob, groups: dict[int, _Fetched]) -> list[_Minibatch]:
        """Micro-batches of every optimiser step, with what only all ranks together know."""
        own = []
        for rows in job.minibatches:
            masks = [_mask(groups[row.work], row.completion) for row in rows]
            batches, chunks = self._cut({index: g.tensors for index, g in groups.items()}, rows)
            counts = Counts(
                tokens=float(sum(mask.sum() for mask in masks)),
                rows=float(len(rows)),
                nonempty_rows=float(sum(bool(mask.any()) for mask in masks)),
            )
            own.append(_Minibatch(batches, chunks, counts, sum(row.tokens for row in rows)))
        shared = self._strategy.gather([(m.chunks, m.counts, m.tokens) for m in own])
        if len({len(plan) for plan in shared}) != 1:
            raise ValueError(
                f"training step {job.step}: the ranks were given different numbers of optimiser "
                f"steps, {[len(plan) for plan in shared]}"
            )
        return [
            replace(
                minibatch,
                chunks=_longest([chunks for chunks, _, _ in parts]),
                counts=Counts(
                    tokens=sum(counts.tokens for _, counts, _ in parts),
                    rows=sum(counts.rows for _, counts, _ in parts),
                    nonempty_rows=sum(counts.nonempty_rows for _, counts, _ in parts),
                ),
                tokens=sum(tokens for _, _, tokens in parts),
            )
            for minibatch, parts in zip(own, zip(*shared, strict=True), strict=True)
        ]

    def _cut(
        self, tensors: Mapping[int, GroupTensors], rows: Sequence[Row]
    ) -> tuple[tuple[tuple[Row, ...], ...], list[int]]:
        return plan_passes(
            self._strategy.model,
            tensors,
            rows,
            self._spec.tokens_per_microbatch,
            self._spec.packing,
        )

    def _old(self, job: UpdateJob, groups: dict[int, _Fetched]) -> dict[int, np.ndarray]:
        """Log-probs at the start of the update, by group index; one pass over this rank's rows."""
        known = {i: g.targets.old for i, g in groups.items() if g.targets is not None}
        rows = {(r.work, r.completion): r for part in job.minibatches for r in part}
        self._strategy.model.eval()
        found = self._passes(
            {index: group.tensors for index, group in groups.items() if index not in known},
            [row for row in rows.values() if row.work not in known],
            job.temperature,
        )
        return known | found

    def _passes(
        self, tensors: Mapping[int, GroupTensors], rows: Sequence[Row], temperature: float
    ) -> dict[int, np.ndarray]:
        batches, own = self._cut(tensors, rows)
        return group_logprobs(
            self._strategy.forward,
            tensors,
            batches,
            _longest(self._strategy.gather(own)),
            temperature,
            self._spec.packing,
            self._strategy.device,
        )

    def _accumulate(
        self,
        job: UpdateJob,
        minibatch: _Minibatch,
        groups: dict[int, _Fetched],
        old: dict[int, np.ndarray],
        where: str,
    ) -> _Tally:
        """The gradient of one optimiser step, over its micro-batches; raises on a bad loss."""
        tally = _Tally()
        trouble: list[str] = []
        last = len(minibatch.chunks) - 1
        for index, chunks in enumerate(minibatch.chunks):
            rows = minibatch.batches[index] if index < len(minibatch.batches) else ()
            if rows:
                batch = self._token_batch(job, rows, chunks, minibatch.counts, groups, old)
                terms = job.loss(batch)
                if not math.isfinite(float(terms.loss.detach())):
                    trouble.append(_describe(terms, batch, rows, groups, self._rank))
                tally.add(terms)
                loss = terms.loss
            else:  # other ranks have more micro-batches: keep in step with them
                inputs = idle_inputs().to(self._strategy.device)
                logp, _ = self._strategy.forward(
                    **vars(inputs), temperature=job.temperature, entropy=True, chunks=chunks
                )
                loss = logp.sum() * 0.0
            self._strategy.backward(loss, last=index == last)
        # All ranks hear of it, so none waits for one that has given up.
        troubles = [text for texts in self._strategy.gather(trouble) for text in texts]
        if troubles:
            raise NonFiniteUpdate(
                f"training step {job.step}, {where}: {troubles[0]}; the optimiser step was not "
                f"applied ({len(troubles)} micro-batches like this)"
            )
        return tally

    def _token_batch(
        self,
        job: UpdateJob,
        rows: Sequence[Row],
        chunks: int,
        counts: Counts,
        groups: dict[int, _Fetched],
        old: dict[int, np.ndarray],
    ) -> TokenBatch:
        """Forward pass of one micro-batch, with everything its loss needs, padded to [B, T]."""
        device = self._strategy.device
        tensors = {index: group.tensors for index, group in groups.items()}
        inputs = collate_rows(tensors, rows, self._spec.packing).to(device)
        logp, entropy = self._strategy.forward(
            **vars(inputs), temperature=job.temperature, entropy=True, chunks=chunks
        )
        lengths = [tensors[row.work].lengths[row.completion] for row in rows]
        width = max(1, *lengths)
        cells = torch.cat(
            [torch.arange(length) + width * place for place, length in enumerate(lengths)]
        ).to(device)
        shape = (len(rows), width)

        def padded(flat: torch.Tensor) -> torch.Tensor:
            return flat.new_zeros(len(rows) * width).index_copy(0, cells, flat).view(shape)

        def per_row(arrays: dict[int, np.ndarray]) -> torch.Tensor:
            parts = [arrays[r.work][tensors[r.work].completion(r.completion)] for r in rows]
            flat = torch.as_tensor(np.concatenate(parts), device=device)
            return padded(flat if flat.dtype == torch.bool else flat.to(logp.dtype))

        used = {row.work: groups[row.work] for row in rows}
        masks = torch.as_tensor(
            np.concatenate([_mask(groups[row.work], row.completion) for row in rows]), device=device
        )
        targets = {i: g.targets for i, g in used.items() if g.targets is not None}
        references = {i: g.reference for i, g in used.items() if g.reference is not None}
        for kind, have in (("targets", targets), ("reference log-probs", references)):
            if have and len(have) < len(used):
                raise ValueError(
                    f"training step {job.step}: some groups have {kind} and others have none"
                )
        if targets:
            advantages = per_row({i: t.advantages for i, t in targets.items()})
            before = per_row({i: t.old for i, t in targets.items()})
        else:
            advantages = padded(
                torch.cat(
                    [
                        torch.full((length,), groups[row.work].work.advantages[row.completion])
                        for row, length in zip(rows, lengths, strict=True)
                    ]
                ).to(device, logp.dtype)
            )
            before = per_row(old) if job.recompute_old else padded(logp.detach())
        return TokenBatch(
            logp=padded(logp),
            old=before,
            roll=per_row({i: g.tensors.logprobs for i, g in used.items()}),
            mask=padded(masks),
            advantages=advantages,
            counts=counts,
            budget=job.budget,
            ref=per_row(references) if references else None,
            entropy=None if entropy is None else padded(entropy),
        )

    def _join(self, tallies: Sequence[tuple[_Tally, Counts]]) -> dict[str, float]:
        """Figures over all micro-batches and ranks, averaged over the optimiser steps."""
        own = [tally for tally, _ in tallies]
        steps: list[dict[str, float]] = []
        for (_, counts), *ranks in zip(tallies, *self._strategy.gather(own), strict=True):
            figures = {"loss/total": sum(rank.loss for rank in ranks)}
            names = {name: count for rank in ranks for name, (_, count) in rank.sums.items()}
            for name, count in names.items():
                numerator = sum(rank.sums[name][0] for rank in ranks if name in rank.sums)
                denominator = getattr(counts, count)
                if denominator > 0:
                    figures[name] = numerator / denominator
            for name in {name for rank in ranks for name in rank.maxima}:
                figures[name] = max(rank.maxima[name] for rank in ranks if name in rank.maxima)
            steps.append(figures)
        joined = {}
        for name in sorted({name for figures in steps for name in figures}):
            seen = [figures[name] for figures in steps if name in figures]
            joined[name] = sum(seen) / len(seen)
        return joined


def make_strategy(
    model: LogProbModel, spec: PolicySpec, model_spec: ModelSpec, rank: int
) -> Strategy:
    """The strategy that `spec` names; imports DeepSpeed only where it is used."""
    if spec.strategy == "deepspeed":
        from actors.strategies.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(model, spec, model_spec, rank)
    from actors.strategies.torch import TorchStrategy

    return TorchStrategy(model, spec, model_spec)


def _mask(group: _Fetched, completion: int) -> np.ndarray:
    """Which response tokens of a completion are trained on, [n] bool."""
    mask = np.asarray(group.tensors.mask[group.tensors.completion(completion)], dtype=bool)
    return mask if group.work.trained[completion] else np.zeros_like(mask)


def _longest(chunks: Sequence[Sequence[int]]) -> list[int]:
    """Elementwise maximum of lists of unequal length: what every rank has to keep up with."""
    return [
        max(part[index] for part in chunks if index < len(part))
        for index in range(max(map(len, chunks)))
    ]


def _describe(
    terms: LossTerms,
    batch: TokenBatch,
    rows: Sequence[Row],
    groups: dict[int, _Fetched],
    rank: int,
) -> str:
    """What a person needs to find the cause of a non-finite loss."""
    ids = sorted({groups[row.work].tensors.group_id for row in rows})
    bad = [
        name
        for name in ("logp", "old", "roll", "advantages", "ref", "entropy")
        if getattr(batch, name) is not None and not bool(getattr(batch, name).isfinite().all())
    ]
    seen = f"not finite in its inputs: {', '.join(bad)}" if bad else "its inputs are finite"
    return f"loss {float(terms.loss.detach())} on rank {rank} over groups {ids}, {seen}"


def _copied(state: Any, keep: bool) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in state if keep}


def _get(values: list[Any]) -> list[Any]:
    """Values with Ray references replaced by what they refer to; plain objects need no Ray."""
    if all(value is None or _is_data(value) for value in values):
        return values
    import ray

    places = [index for index, value in enumerate(values) if isinstance(value, ray.ObjectRef)]
    fetched = ray.get([values[index] for index in places])
    found = list(values)
    for index, value in zip(places, fetched, strict=True):
        found[index] = value
    return found


def _is_data(value: Any) -> bool:
    return isinstance(value, GroupTensors | TokenTargets | np.ndarray)


def _node_address() -> str:
    import ray

    if ray.is_initialized():
        return ray.util.get_node_ip_address()
    return "127.0.0.1"
