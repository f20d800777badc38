"""The learners' side of a step: policy and critic ranks, their targets, updates and checkpoints.

Invariant: a rank that dies takes the policy and the critic with it (`PolicyLost`), so that both are
always of the same step; nothing is retried on ranks that may be half-way through an update. The
controller decides what to go back to.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from actors.disk import Sums
from actors.engines.base import resolve_engine
from actors.fetching import ArraysLost
from actors.liveness import Patience, sign_of_life
from actors.messages import GroupWork, PrepareJob, UpdateResult
from actors.specs import RankSpec
from actors.transfer.base import Exported
from actors.waiting import all_of
from aligntune.algorithms.base import Algorithm
from aligntune.config.online import RunConfig
from aligntune.online.ignoring import ignore
from aligntune.online.ranks import PolicyLost as PolicyLost
from aligntune.online.ranks import Ranks
from aligntune.online.sharing import plan_step, whole_groups
from aligntune.runs.checkpoint import CRITIC, POLICY

WEIGHTS_LIMIT = "rollout.weight_timeout_s"  # what a transport's deadlines come from


class Learner:
    """The policy ranks, and the critic ranks where the algorithm has a critic."""

    def __init__(
        self,
        config: RunConfig,
        make_policy: Callable[[int, str], ActorHandle],
        make_critic: Callable[[int, str], ActorHandle],
        on_loss: Callable[[], None] = ignore,
    ) -> None:
        """`on_loss` is called where a rank is lost that nothing was asked of; see `lost`."""

        def ranks(spec: RankSpec, make: Callable[[int, str], ActorHandle]) -> Ranks:
            patience = Patience(config.train.silence_timeout_s)
            return Ranks(spec, make, sign_of_life(concurrent=False), patience, on_loss)

        self.nodes: set[str] = set()  # ids, in Ray, of those that ranks run on
        self._config = config
        self._as_checkpoint = resolve_engine(config.rollout).reads_checkpoints
        self._policy = ranks(config.policy, make_policy)
        self._critic = ranks(config.critic, make_critic) if config.algorithm.needs.critic else None

    @property
    def lost(self) -> str | None:
        """Why a rank is lost, and all of them with it; None while they live."""
        return next((ranks.lost for ranks in self._parts.values() if ranks.lost), None)

    @property
    def handles(self) -> dict[str, ActorHandle]:
        """Every rank, by its name."""
        return {
            name: each for ranks in self._parts.values() for name, each in ranks.handles.items()
        }

    @property
    def progress(self) -> int:
        """Goes up with whatever a rank says that it has done."""
        return sum(ranks.progress for ranks in self._parts.values())

    @property
    def _parts(self) -> dict[str, Ranks]:
        """What is trained, by its folder in a checkpoint."""
        critic = {} if self._critic is None else {CRITIC: self._critic}
        return {POLICY: self._policy, **critic}

    async def start(self) -> list[tuple[str, dict[str, Any]]]:
        """Start all ranks; (name, what it says of itself) of each."""
        parts = await all_of(*(ranks.start() for ranks in self._parts.values()))
        started = [info for part in parts for info in part]
        self.nodes = {str(info.get("node_id", "")) for _, info in started} - {""}
        return started

    async def blind(self, directory: Path) -> list[str]:
        """The ranks, with their nodes, that do not see what the driver writes to `directory`."""
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".seen-") as file:
            seen = [
                (ranks.spec.role, await ranks.all("sees", file.name))
                for ranks in self._parts.values()
            ]
        return [
            f"{role}-{rank} on {node}"
            for role, answers in seen
            for rank, (sees, node) in enumerate(answers)
            if not sees
        ]

    async def prepare(
        self, step: int, algorithm: Algorithm, groups: Sequence[GroupWork]
    ) -> tuple[list[GroupWork], dict[str, float]]:
        """The groups with token-level targets, and figures of the step; no array comes here.

        The critic's values and the policy's old log-probs are computed side by side. Raises
        ArraysLost as `update` does.
        """
        with self._with_critic():
            return await self._prepare(step, algorithm, groups)

    async def _prepare(
        self, step: int, algorithm: Algorithm, groups: Sequence[GroupWork]
    ) -> tuple[list[GroupWork], dict[str, float]]:
        works = list(groups)
        valued: list[Awaitable[list[Any]]] = []
        if self._critic is not None:
            shares = whole_groups(self._config, step, works, self._critic.spec.ranks)
            tensors = [([works[index].tensors for index in share],) for share in shares]
            wait, values = self._critic.begin("values", tensors, [len(s) for s in shares])
            valued.append(wait)
            for index, ref in _by_group(shares, values).items():
                works[index] = replace(works[index], values=ref)
        shares = whole_groups(self._config, step, works, self._policy.spec.ranks)
        jobs = [
            PrepareJob(
                step=step,
                groups=tuple(works[index] for index in share),
                prepare=algorithm.prepare,
                recompute_old=algorithm.old == "policy",
                temperature=self._config.rollout.temperature,
            )
            for share in shares
        ]
        prepared, targets = self._policy.begin(
            "prepare", [(job,) for job in jobs], [len(s) for s in shares]
        )
        (figures, *_), *_ = await all_of(prepared, *valued)
        found = _by_group(shares, targets)
        made = [replace(work, targets=found[i], values=None) for i, work in enumerate(works)]
        return made, figures

    async def update(
        self, step: int, algorithm: Algorithm, groups: Sequence[GroupWork]
    ) -> UpdateResult:
        """Every optimiser step of a training step, of policy and critic at the same time.

        Raises ArraysLost, before the first one, where groups have to be made again.
        """
        plans = plan_step(self._config, step, algorithm, groups)
        with self._with_critic():
            answers = await all_of(
                *(
                    ranks.each("update", [(job,) for job in plans[name]])
                    for name, ranks in self._parts.items()
                )
            )
        results: list[UpdateResult] = [ranks[0] for ranks in answers]
        return UpdateResult(
            metrics={name: x for result in results for name, x in result.metrics.items()},
            seconds=max(result.seconds for result in results),
        )

    @contextmanager
    def _with_critic(self) -> Iterator[None]:
        """Where one of policy and critic has lost arrays the other may be amid a step by now: both
        go back together."""
        try:
            yield
        except ArraysLost as lost:
            if self._critic is not None:
                raise PolicyLost(str(lost)) from lost
            raise

    async def export(self, version: int) -> Any:
        """The reference to a `WeightBundle` of `version`; the driver owns the one object."""
        _, ref = await self._exported("export_weights", version, self._as_checkpoint)
        return ref

    async def export_adapter(self, version: int) -> Any:
        """As `export`, of the LoRA adapter alone."""
        _, ref = await self._exported("export_adapter", version)
        return ref

    async def export_changes(self, version: int, since: int | None) -> tuple[Exported, Any]:
        """What changed in the weights since version `since`, or all: what rank 0 says of it, and
        the reference, which the driver owns."""
        exported: tuple[Exported, Any] = await self._exported(
            "export_changes", version, since, self._as_checkpoint
        )
        return exported

    async def send(self, sender: str, method: str, *args: Any, deadline_s: float) -> Any:
        """What rank 0 answers of `method` of a transport's own side, `sender` (module:Class), which
        all ranks run together."""
        calls = [(sender, method, *args)] * self._policy.spec.ranks
        said, *_ = await self._policy.each("send", calls, deadline_s, WEIGHTS_LIMIT)
        return said

    async def send_beside(self, sender: str, method: str, *args: Any, deadline_s: float) -> Any:
        """As `send`, on rank 0 alone and beside what it does."""
        return await self._policy.beside("send", sender, method, *args, deadline_s=deadline_s)

    async def _exported(self, method: str, *args: Any) -> tuple[Any, Any]:
        """What rank 0 says, and the reference to what it has exported."""
        ranks = self._policy.spec.ranks
        answers, objects = self._policy.begin(method, [args] * ranks, [1] * ranks)
        said, *_ = await answers
        return said, objects[0][0]

    async def snapshot(self) -> None:
        """Have every rank copy its part of a checkpoint to its host's memory."""
        await all_of(*(ranks.all("snapshot") for ranks in self._parts.values()))

    async def write(self, directory: Path) -> Sums:
        """Write the last snapshot, beside whatever is asked of the ranks; see `Ranks.write`.

        Returns, with what is in `directory` now, or raises, when nobody writes any more.
        """
        parts = [ranks.write(str(directory / name)) for name, ranks in self._parts.items()]
        found: Sums = {}
        for part, sums in zip(
            self._parts, await asyncio.gather(*parts, return_exceptions=True), strict=True
        ):
            if isinstance(sums, BaseException):
                raise sums
            found |= {f"{part}/{name}": each for name, each in sums.items()}
        return found

    async def load(self, directory: Path) -> None:
        """Take a checkpoint's state."""
        await all_of(
            *(ranks.all("load", str(directory / name)) for name, ranks in self._parts.items())
        )

    async def save_model(self, directory: Path) -> None:
        """Export the policy for use: safetensors, tokenizer, generation config."""
        await self._policy.all("save_model", str(directory))

    def kill(self) -> None:
        """Stop every rank at once."""
        for ranks in self._parts.values():
            ranks.kill()


def _by_group(shares: Sequence[Sequence[int]], refs: Sequence[Sequence[Any]]) -> dict[int, Any]:
    """Per-rank references by the index of the group each belongs to."""
    return {
        index: ref
        for share, own in zip(shares, refs, strict=True)
        for index, ref in zip(share, own, strict=True)
    }
