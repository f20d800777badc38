"""One rank of a model that is trained, policy or critic: how it starts, steps and is saved.

The loss is a callable; nothing here knows which algorithm made it. The gradient of an optimiser
step does not depend on how its rows are cut into micro-batches, packed, padded or shared over
ranks: the loss gets denominators that are global over the step before the first backward pass.
"""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from actors.disk import Files, Sums, sync_below, write_files, writing
from actors.engines.base import name_ends
from actors.fetching import ArraysLost, Fetched, fetch_or_lost, of_several_rows
from actors.figures import Tally, count, describe, join, over_steps, total
from actors.liveness import Alive
from actors.messages import Counts, GroupTensors, GroupWork, Row, UpdateJob, UpdateResult
from actors.models.attention import settle
from actors.models.checkpoint_names import kept_buffers
from actors.models.loading import load_tokenizer, name_dtype, whole_model
from actors.models.logprobs import head_calls
from actors.models.wrapped import TrainedModel
from actors.packing import a_microbatch, longest, microbatches, widest
from actors.specs import ModelSpec, RankSpec
from actors.strategies.base import NonFiniteGradient, Strategy, make_strategy
from actors.strategies.optimizer import learning_rate
from actors.strategies.process_group import own_device
from actors.whereabouts import node_address, whereabouts


@dataclass(frozen=True)
class Minibatch:
    """One optimiser step as this rank runs it."""

    batches: tuple[tuple[Row, ...], ...]  # this rank's micro-batches
    chunks: list[int]  # head calls of each micro-batch of the longest-running rank
    counts: Counts  # global


class NonFiniteUpdate(ArithmeticError):
    """A loss or gradient was NaN or infinite; the optimiser step in question was not applied."""


class TrainedRank(Alive):
    """Rank `rank` of `world`. Methods that all ranks must be in together say so."""

    total_loss: ClassVar[str]  # the metric that the whole loss is

    def __init__(
        self,
        model: ModelSpec,
        spec: RankSpec,
        rank: int,
        world: int,
        total_steps: int,
        seed: int,
    ) -> None:
        """Keep the settings; `start` loads. `total_steps` are training steps, for the schedule."""
        if world != spec.ranks:
            raise ValueError(f"{spec.role}.ranks is {spec.ranks}, but {world} ranks were made")
        self._model_spec = model
        self._spec = spec
        self._rank = rank
        self._total_steps = total_steps
        self._seed = seed
        self._strategy: Strategy
        self._files: Files = {}  # that are to be written
        self._attention = ""  # how rows attend, for people
        self._shared = False  # whether a pack holds the prompt of a group once

    def _load(self) -> TrainedModel:
        """The model as it starts, checked, on CPU."""
        raise NotImplementedError

    def _complete(
        self, job: UpdateJob, groups: dict[int, Fetched], first: Sequence[Row]
    ) -> dict[int, Fetched]:
        """`groups` with what must be known of them before the first optimiser step, that of the
        rows `first`."""
        return groups

    def _batch(
        self,
        job: UpdateJob,
        rows: Sequence[Row],
        chunks: int,
        counts: Counts,
        groups: Mapping[int, Fetched],
    ) -> Any:
        """Forward pass of one micro-batch, with everything its loss needs, padded to [B, T]."""
        raise NotImplementedError

    def _idle_pass(self, job: UpdateJob, chunks: int) -> torch.Tensor:
        """A forward pass that counts for nothing; a scalar loss of 0 with a gradient of 0."""
        raise NotImplementedError

    def _settle_packing(self, model: TrainedModel) -> None:
        """Decide where `packing` is auto, and have `model`, still on CPU, attend accordingly."""
        packing, self._attention = settle(
            self._spec.packing, self._model_spec, model.unwrapped, own_device(), self._shared
        )
        self._spec = self._spec.model_copy(update={"packing": packing})

    @property
    def _packing(self) -> bool:
        """Whether rows are packed; settled when the model is loaded."""
        return self._spec.packing is True

    def address(self) -> tuple[str, int]:
        """This node's address and a free port; rank 0's is where the ranks meet."""
        host = node_address()
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def sees(self, path: str) -> tuple[bool, str]:
        """(whether this node has a file of the driver's at `path`, this node's address)."""
        return Path(path).is_file(), node_address()

    def start(self, master_address: str, master_port: int) -> dict[str, Any]:
        """Load, check and place the model; all ranks together.

        Returns:
            `device`, `rank`, where it runs, how rows attend (`attention`), and the numbers of
            `parameters` and `trainable` ones.

        Raises:
            ModelError: the model cannot be loaded, or what it says cannot be trusted.
        """
        torch.manual_seed(self._seed + self._rank)
        if not torch.cuda.is_available():
            torch.use_deterministic_algorithms(True)
            # Or every buffer is filled with NaN first; none is read here before it is written.
            torch.utils.deterministic.fill_uninitialized_memory = False
        wrapped = self._load()
        parameters = [(p.numel(), p.requires_grad) for p in wrapped.parameters()]
        self._strategy = make_strategy(wrapped, self._spec, self._model_spec, self._rank)
        self._strategy.setup(master_address, master_port)
        return {
            "device": str(self._strategy.device),
            **whereabouts(),
            "rank": self._rank,
            "attention": self._attention,
            "parameters": sum(size for size, _ in parameters),
            "trainable": sum(size for size, trained in parameters if trained),
        }

    def update(self, job: UpdateJob) -> UpdateResult:
        """Every optimiser step of `job`; all ranks together, each with its own rows.

        With `job.early_stop`, the figure it names of an optimiser step that has been made ends the
        update where it is above the limit.

        Raises:
            NonFiniteUpdate: on all ranks, before the optimiser step in question; its gradients are
                spent, so the run goes on from a checkpoint.
        """
        began = time.perf_counter()
        role = self._spec.role
        groups = self._fetch(job.groups)
        plan = self._plan(job, groups)
        rate = learning_rate(self._spec, job.step, self._total_steps)
        steps_made = (i for i, minibatch in enumerate(plan) if minibatch.counts.tokens > 0)
        first = next(steps_made, None)
        groups = self._complete(job, groups, () if first is None else job.minibatches[first])
        self._strategy.model.train()
        steps: list[dict[str, float]] = []
        norms: list[float] = []
        peaks: set[str] = set()
        empty = 0
        stopped = False
        for index, minibatch in enumerate(plan):
            if minibatch.counts.tokens == 0:  # nothing to learn from; Adam would still move
                empty += 1
                continue
            where = f"{role}, training step {job.step}, optimiser step {index + 1} of {len(plan)}"
            figures, highest = self._accumulate(job, minibatch, groups, where)
            peaks |= highest
            try:
                norms.append(self._strategy.step(rate))
            except NonFiniteGradient as error:
                raise NonFiniteUpdate(
                    f"{where}: {error} with a finite loss of {figures[self.total_loss]:.6g}; no "
                    f"weight was changed. Lower {role}.learning_rate or look at the rewards of "
                    "this step"
                ) from error
            steps.append(figures)
            if job.early_stop is not None and figures[job.early_stop[0]] > job.early_stop[1]:
                stopped = True
                break
        metrics = over_steps(steps, peaks)
        metrics[f"{role}/learning_rate"] = rate
        if norms:
            metrics[f"{role}/grad_norm"] = sum(norms) / len(norms)
        if empty:
            metrics[f"{role}/empty_minibatches"] = float(empty)
        if job.early_stop is not None:
            metrics[f"{role}/early_stopped"] = float(stopped)
        return UpdateResult(metrics=metrics, seconds=time.perf_counter() - began)

    def snapshot(self) -> int:
        """Copy the complete training state to the host's memory, for `write`; all ranks together.

        Takes as many bytes, which it returns, as the files of this rank. `torch` has rank-0.pt;
        `deepspeed` and `fsdp` have layout.json and rng-rank-*.pt, and DeepSpeed's own files or a
        safetensors file a rank.
        """
        self._files = self._strategy.snapshot()
        return sum(len(content) for content in self._files.values())

    def write(self, folder: str | Path) -> Sums:
        """Write what `snapshot` kept, and forget it; runs beside whatever the ranks do meanwhile,
        in a thread of the actor's group `DISK`.

        All is on disk when this returns; making `folder` appear at once is the caller's, who needs
        to read nothing of it: what is returned says it all.

        Raises:
            OSError: the disk does not take it. The other ranks do not know.
        """
        files, self._files = self._files, {}
        if not files:  # these are not the ranks that made it
            raise OSError(f"{folder}: rank {self._rank} keeps no snapshot")
        return write_files(Path(folder), files)

    def save(self, folder: str | Path) -> None:
        """`snapshot` and `write`; all ranks together."""
        self.snapshot()
        self.write(folder)

    def load(self, folder: str | Path) -> None:
        """Take back what was written; all ranks together.

        Raises:
            ValueError: it was written with another strategy or stage, or with a number of ranks
                that this one cannot take it from.
        """
        self._strategy.load(Path(folder))

    def save_model(self, folder: str | Path) -> None:
        """Write a model that transformers loads; all ranks together, rank 0 writes.

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
        model = wrapped.unwrapped
        state |= {name: buffer.cpu() for name, buffer in kept_buffers(model)}
        with writing(folder):
            whole_model(model, self._model_spec).save_pretrained(folder, state_dict=state)
            name_dtype(folder, self._model_spec.dtype)
            name_ends(folder, self._model_spec)
        load_tokenizer(self._model_spec).save_pretrained(folder)
        if adapter:
            wrapped.model.save_pretrained(folder / "adapter", state_dict=adapter)
        sync_below(folder)

    def close(self) -> None:
        """Leave the other ranks."""
        self._strategy.close()

    def _fetch(self, works: Sequence[GroupWork]) -> dict[int, Fetched]:
        """The arrays of this rank's groups, by their index; all ranks together.

        Raises ArraysLost on all ranks where one of them cannot have its own: none has begun.
        """
        found, own = fetch_or_lost(works)
        lost = {group for part in self._strategy.gather(own) for group in part}
        if lost:
            raise ArraysLost(tuple(sorted(lost)))
        return found

    def _plan(self, job: UpdateJob, groups: Mapping[int, Fetched]) -> list[Minibatch]:
        """Micro-batches of every optimiser step, with what only all ranks together know."""
        tensors = {index: group.tensors for index, group in groups.items()}
        apart = [
            of_several_rows(rows, groups) if job.whole_rollouts else {} for rows in job.minibatches
        ]
        free = []  # rows that may lie in any micro-batch
        for rows, rollouts in zip(job.minibatches, apart, strict=True):
            whole = {row for rollout in rollouts.values() for row in rollout}
            free.append([row for row in rows if row not in whole])
        lengths = self._strategy.gather([[row.tokens for row in rows] for rows in free])
        if len({len(plan) for plan in lengths}) != 1:
            raise ValueError(
                f"training step {job.step}: the ranks were given different numbers of optimiser "
                f"steps, {[len(plan) for plan in lengths]}"
            )
        own = []
        for index, rows in enumerate(job.minibatches):
            widths = widest([plan[index] for plan in lengths])
            batches = (
                *self._cut(free[index], widths, tensors),
                *map(tuple, apart[index].values()),
            )
            own.append(Minibatch(batches, self._head_calls(tensors, batches), count(rows, groups)))
        shared = self._strategy.gather([(m.chunks, m.counts) for m in own])
        return [
            replace(
                minibatch,
                chunks=longest([chunks for chunks, _ in parts]),
                counts=total([counts for _, counts in parts]),
            )
            for minibatch, parts in zip(own, zip(*shared, strict=True), strict=True)
        ]

    def _together(
        self, rows: Sequence[Row], tensors: Mapping[int, GroupTensors]
    ) -> tuple[tuple[Row, ...], ...]:
        """Micro-batches of `rows`, cut with all ranks' rows in view; all ranks together."""
        lengths = self._strategy.gather([row.tokens for row in rows])
        return self._cut(rows, widest(lengths), tensors)

    def _cut(
        self, rows: Sequence[Row], widths: Sequence[int], tensors: Mapping[int, GroupTensors]
    ) -> tuple[tuple[Row, ...], ...]:
        each = a_microbatch(self._strategy.device.type)
        budget = self._spec.tokens_per_microbatch
        prompts = {work: len(group.prompt_ids) for work, group in tensors.items()}
        shared = prompts if self._shared else None
        return microbatches(rows, budget, self._packing, widths, each, shared)

    def _forward(self, **inputs: Any) -> Any:
        """A pass without a gradient. Each shows that this rank moves, as each of an update does."""
        made = self._strategy.forward(**inputs)
        self.done += 1
        return made

    def _head_calls(
        self, tensors: Mapping[int, GroupTensors], batches: Sequence[Sequence[Row]]
    ) -> list[int]:
        return head_calls(self._strategy.model, tensors, batches)

    def _accumulate(
        self, job: UpdateJob, minibatch: Minibatch, groups: Mapping[int, Fetched], where: str
    ) -> tuple[dict[str, float], set[str]]:
        """The gradient of one optimiser step over its micro-batches; its figures over all ranks,
        and which of them are maxima.

        Raises:
            NonFiniteUpdate: the loss of a micro-batch is not finite, on whichever rank.
        """
        tally = Tally()
        trouble: list[str] = []
        last = len(minibatch.chunks) - 1
        for index, chunks in enumerate(minibatch.chunks):
            rows = minibatch.batches[index] if index < len(minibatch.batches) else ()
            if rows:
                batch = self._batch(job, rows, chunks, minibatch.counts, groups)
                terms = job.loss(batch)
                if not math.isfinite(float(terms.loss.detach())):
                    trouble.append(describe(terms, batch, rows, groups, self._rank))
                tally.add(terms)
                loss = terms.loss
            else:  # other ranks have more micro-batches: keep in step with them
                loss = self._idle_pass(job, chunks)
            self._strategy.backward(loss, last=index == last)
            self.done += 1
        # All ranks hear of trouble, so none waits for one that has given up.
        tallies, troubles = zip(*self._strategy.gather((tally, trouble)), strict=True)
        if texts := [text for texts in troubles for text in texts]:
            raise NonFiniteUpdate(
                f"{where}: {texts[0]}; the optimiser step was not applied "
                f"({len(texts)} micro-batches like this)"
            )
        figures = join(tallies, minibatch.counts)
        peaks = {name for rank in tallies for name in rank.maxima}
        return figures | {self.total_loss: sum(rank.loss for rank in tallies)}, peaks


def _copied(state: Any, keep: bool) -> dict[str, torch.Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in state if keep}
