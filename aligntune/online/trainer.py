"""OnlineTrainer: everything is checked before anything starts, then the controller runs."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from actors.messages import Prompt
from actors.models.configuration import ModelError
from actors.models.vocabulary import check_same_tokens
from aligntune import loops
from aligntune.config.auto import open_settings
from aligntune.config.online import RunConfig
from aligntune.data.prompts import PromptSource
from aligntune.errors import UserError
from aligntune.online.doing import starts
from aligntune.online.figures import check_best
from aligntune.online.first_prompt import NOTE
from aligntune.online.ignoring import ignore
from aligntune.online.inputs import RunInputs
from aligntune.online.ledger import audit
from aligntune.online.result import TrainResult
from aligntune.online.role_requests import role_requests
from aligntune.online.role_table import ROLES
from aligntune.online.starting import begin_from, starting_point
from aligntune.runs.best import best_of
from aligntune.runs.checkpoint import POLICY, Checkpoints
from aligntune.runs.choice import NEWEST, checkpoint_named, chosen_model
from aligntune.runs.ended import (
    Scored,
    is_over,
    last_figures,
    said_by_roles,
    started_with,
    tell_over,
)
from aligntune.runs.hub import check_hub
from aligntune.runs.jsonl import long_read
from aligntune.runs.lifecycle import check_programs, claimed, recorded
from aligntune.runs.measure import NOT_COMPARED
from aligntune.runs.mirror import mirror_of
from aligntune.runs.publish import push
from aligntune.runs.reading import open_run
from aligntune.runs.rundir import LOGS, TRIED, RunDir
from aligntune.tracking.advice import THINKS
from aligntune.tracking.lines import cut
from aligntune.tracking.output import say
from cluster.bundles import BadRequest, bundle_sets, totals

if TYPE_CHECKING:
    from actors.reward import Criterion
    from aligntune.evaluation.summary import Row
    from aligntune.online.evaluating import Heard
    from aligntune.online.evaluation import Decoding
    from aligntune.online.roles import Roles
    from aligntune.online.rolling import Rolling

T = TypeVar("T")


class OnlineTrainer:
    """PPO-family training through the controller."""

    def __init__(
        self, config: RunConfig, objects: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        """`objects` is what was given as Python objects, by place in the config: rewards, tools,
        environments and the agent."""
        self.inputs = RunInputs(config, objects or {})
        self._settled = False

    @property
    def config(self) -> RunConfig:
        """The config, as it was given until something is read, and settled from then on."""
        return self.inputs.config

    @property
    def criteria(self) -> tuple[Criterion, ...]:
        """The rewards as the reward actors get them. Raises UserError."""
        return self.inputs.criteria

    @property
    def prompts(self) -> PromptSource:
        """The training prompts, all checked. Raises DataError, a UserError."""
        return self.inputs.prompts

    @cached_property
    def eval_prompts(self) -> list[Prompt]:
        """The held-out prompts, in order. Raises DataError, a UserError."""
        held_out = self.inputs.held_out
        return list(held_out.epoch()) if held_out else []

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        train = self.config.train
        if train.steps is not None:
            return train.steps
        prompts = self.prompts.positions_in(train.epochs or 1.0)
        return max(1, math.ceil(prompts / train.groups_per_step))

    def check(self, resume: str = "auto") -> RunDir:
        """Everything that can be checked without starting Ray. Raises UserError."""
        rundir = self._rundir
        rundir.check_place()
        self._begin(resume)
        self.inputs.check_places()
        if not rundir.trained:  # one that goes on has its rows already
            self.inputs.data.check_apart()
        self.inputs.check_weights()
        self.inputs.settle(resume)
        rundir.check(self.config, resume)
        try:
            bundle_sets(role_requests(self.config), self.config.cluster.colocate)
        except BadRequest as error:
            raise UserError(str(error)) from error
        config = self.config
        check_programs(config.backend, config.tracking, config.cluster)
        check_hub(config.hub)
        needs, others = config.algorithm.needs, {"critic": config.critic.model}
        others["reference"] = config.reference.model
        for role, model in others.items():
            if getattr(needs, role):
                try:
                    check_same_tokens(config.model, model, role)
                except ModelError as error:
                    raise UserError(f"{role}.model: {error}") from error
        check_best(config, [criterion.name for criterion in self.criteria])
        _ = self.criteria, self.inputs.code, self.prompts, self.eval_prompts
        return rundir

    def settle(self, resume: str | None = None) -> None:
        """Decide, the first time for each start, what the config leaves open of what the roles
        take, by the machines that there are; connects to the cluster that the config names, if it
        names one. `resume` is as in `train`; None is for work without a start, on what is settled.
        Raises UserError."""
        if resume is not None:
            self._begin(resume)
        if self._settled:
            return
        mirror = mirror_of(self.config.checkpoint, self._rundir.path)
        steps = None if resume is None else lambda: self.total_steps
        self.inputs.settle_resources(resume or "auto", mirror.config() if mirror else None, steps)
        self._settled = True

    def _begin(self, resume: str) -> None:
        """Forget what was settled for another start than that with `resume`."""
        inputs = self.inputs.of_start(resume)
        if inputs is not self.inputs:
            self.inputs, self._settled = inputs, False
            vars(self).pop("eval_prompts", None)

    def summary(self, resume: str = "auto") -> str:
        """What `train(resume)` would do: data, steps, what was decided and what the roles ask for,
        and what the rewards say of the first prompt, on which they are called here.

        It settles first, and starts nothing. Raises UserError.
        """
        self.settle(resume)
        source, train = self.prompts, self.config.train
        requests = role_requests(self.config)
        asked = totals(requests)
        lines = [
            f"{self.config.algorithm_name}: {self.total_steps} steps of {train.groups_per_step} "
            f"groups x {train.completions_per_group} completions",
            f"data: {len(source)} prompts, longest {source.longest} tokens; the first one: "
            f"{cut(source.prompt_at(0).text, 200)}",
            *self.inputs.told(),
            *self.inputs.tried(),
            *(f"{r.role}: {r.replicas} x {r.cpus:g} CPU, {r.gpus:g} GPU" for r in requests),
            f"together: {asked['CPU']:g} CPU, {asked['GPU']:g} GPU",
        ]
        return "\n".join(lines)

    def train(self, resume: str = "auto") -> TrainResult:
        """Train to the last step, from the newest checkpoint in `output_dir` if there is one.

        Args:
            resume: auto, never, or a checkpoint folder.

        Raises:
            UserError: the input is wrong; nothing was started.
            RunFailed: the run cannot go on; what was trained is in its last checkpoint.
            Interrupted: SIGINT or SIGTERM; what was trained is in a checkpoint.
        """
        started = time.monotonic()
        rundir = self.check(resume)
        from aligntune.online.assemble import assemble  # with Ray, once nothing is wrong
        from aligntune.online.recorder import OnlineRecorder
        from aligntune.online.running import FAILURES

        self.settle(resume)
        rundir.check(self.config, resume)
        with claimed(rundir):
            checkpoints = Checkpoints(rundir.file("checkpoints"), self.config.checkpoint.keep_last)
            mirror = mirror_of(self.config.checkpoint, rundir.path)
            start = starting_point(
                self.config,
                rundir,
                checkpoints,
                mirror,
                resume,
                self.total_steps,
                self.prompts.fingerprint,
            )
            checkpoint = start.checkpoint
            at_end = not self.config.checkpoint.at_end or (
                checkpoint is not None and checkpoint.step == self.total_steps
            )
            if at_end and resume == "auto" and is_over(rundir, self.total_steps):
                return self._result_of_before(rundir)
            tried = self.inputs.tried(rundir.file(LOGS) / TRIED)
            rundir.describe(self.config)
            after = checkpoint.step if checkpoint else 0
            with recorded(
                OnlineRecorder(
                    self.config, rundir, self.total_steps, after, started, self.inputs.measure
                ),
                rundir,
                self.total_steps,
                FAILURES,
            ) as recorder:
                if self.inputs.thinks:
                    recorder.cures["truncated"] = THINKS
                for kind, fields in self.inputs.events():
                    recorder.event(kind, **fields)
                notes = [line for line in tried if line.startswith(NOTE)]
                for line in [*rundir.told(), *self.inputs.told(), *notes]:
                    recorder.note(line)
                start = begin_from(start, rundir, checkpoints, mirror, resume, recorder.stage)
                checkpoint = start.checkpoint
                if recorder.measured_anew:
                    recorder.note(NOT_COMPARED)
                start.tell(recorder)
                with self._roles(recorder.stage) as roles:
                    recorder.starting(starts(self.config))
                    controller = assemble(
                        self.config,
                        roles,
                        self.total_steps,
                        self.prompts,
                        self.eval_prompts,
                        rundir,
                        checkpoints,
                        recorder,
                        mirror,
                        self.criteria,
                    )

                    def stop(number: int) -> None:
                        recorder.stopping(loops.STOPPING)
                        controller.stop(number)

                    metrics = loops.run(controller.run(checkpoint), stop)
                push(rundir, self.config.hub, recorder)
                return TrainResult(
                    steps=self.total_steps,
                    metrics=metrics,
                    books=controller.books,
                    seconds=time.monotonic() - started,
                    output_dir=rundir.path,
                    model=rundir.model,
                    engine=recorder.engine,
                    backend=recorder.backend,
                )

    def _result_of_before(self, rundir: RunDir) -> TrainResult:
        tell_over(rundir, self.total_steps)
        ledger = rundir.file("ledger.jsonl")
        if (told := long_read("the books", ledger)) is not None:
            say(told)
        return TrainResult(
            steps=self.total_steps,
            metrics=last_figures(rundir),
            books=audit(ledger),
            seconds=0.0,
            output_dir=rundir.path,
            model=rundir.model,
            engine=said_by_roles(rundir, "engine"),
            backend=said_by_roles(rundir, "backend"),
            already=True,
        )

    def _roles(
        self, stage: Callable[[str], None] = ignore, only: Collection[str] = ROLES
    ) -> AbstractContextManager[Roles]:
        from aligntune.online.running import reserved

        return reserved(self.config, self.criteria, self.total_steps, self.inputs.code, stage, only)

    def scored(self, which: str = NEWEST) -> Scored:
        """The model of the run that `which` means: newest, best, export, start or a step. Raises
        UserError where there is none."""
        decided = self.inputs.settle_model()
        best = best_of(self.config.checkpoint)
        return started_with(
            chosen_model(self._rundir, self.config.model.name, which, best), decided
        )

    @property
    def _rundir(self) -> RunDir:
        return RunDir(Path(self.config.output_dir).absolute())

    def evaluate(self, which: str = NEWEST) -> dict[str, float]:
        """`eval/*` figures of the run's newest model, or of the one `which` means as in `scored`.

        Raises UserError where the config names no held-out prompts, or there is no such model.
        """

        from aligntune.online.evaluation import evaluate

        async def figures(rolling: Rolling) -> dict[str, float]:
            found, _ = await evaluate(self.config, self.eval_prompts, 0, rolling, ignore)
            return found

        return self.using(self.scored(which), figures)

    def evaluated(
        self,
        scored: Scored,
        ways: Mapping[str, Decoding],
        heard: Heard = ignore,
        stage: Callable[[str], None] = ignore,
    ) -> list[Row]:
        """Every held-out prompt's completions and scores under each decoding. Raises UserError."""

        from aligntune.online.evaluating import evaluation_rows

        async def rows(rolling: Rolling) -> list[Row]:
            return await evaluation_rows(self.config, self.eval_prompts, ways, rolling, heard)

        return self.using(scored, rows, stage)

    def using(
        self,
        scored: Scored,
        work: Callable[[Rolling], Awaitable[T]],
        stage: Callable[[str], None] = ignore,
    ) -> T:
        """What `work` makes with a model that rolls out and is scored. Raises UserError where there
        are no held-out prompts."""
        from aligntune.online.evaluating import ROLES_OF_AN_EVALUATION, with_model

        if not self.eval_prompts:
            raise UserError("nothing to evaluate on; set data.eval_path or data.eval_split")
        self.settle()
        ranks = (POLICY,) if scored.is_checkpoint else ()
        with self._roles(stage, only=(*ROLES_OF_AN_EVALUATION, *ranks)) as roles:
            return loops.run_until_signal(
                with_model(self.config, roles, self.criteria, scored, work, stage)
            )

    def export(self, path: str | Path, step: int | str | None = None) -> int:
        """Write the model of a checkpoint to a new folder, and return the checkpoint's step.

        This starts the policy's ranks, to load the checkpoint.

        Args:
            path: the folder to make.
            step: the step whose checkpoint is meant, or `best`; None is the newest one.

        Raises UserError where there is no such checkpoint, or the folder is there.
        """
        from aligntune.online.export import export_checkpoint
        from aligntune.online.running import reserved
        from aligntune.report.card import write_card

        target = Path(path).absolute()
        if target.exists():
            raise UserError(f"{target} is there; name a new folder")
        which = NEWEST if step is None else str(step)
        checkpoint, *_ = checkpoint_named(self._rundir, which, best_of(self.config.checkpoint))
        prompt = self.config.rollout.max_prompt_length
        open_ = [p for p in open_settings(self.config) if p.startswith(("model.", "policy."))]
        if open_ or prompt is None:
            self.settle()
        # Nothing is open in a run's own config.yaml. Neither rewards nor data are read then: they
        # may be of a program that is not there any more.
        steps = max(1, checkpoint.step)
        with reserved(self.config, (), steps, None, ignore, only=(POLICY,)) as roles:
            loops.run_until_signal(export_checkpoint(self.config, roles, checkpoint.path, target))
        write_card(open_run(self._rundir.path), target, checkpoint.step)
        return checkpoint.step

    def save_model(self, path: str | Path) -> Path:
        """Copy the trained model (safetensors, tokenizer, generation config) to a new folder."""
        return RunDir(Path(self.config.output_dir)).copy_model(Path(path))
