"""PreferenceConfig: the one typed tree of a job over a table: DPO, a reward model, or SFT.

Its sections are those of a RunConfig where the two mean the same. A resolved tree says everything
the job will do; what TRL would ignore is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from actors.settings import AUTO, Beta, OneKind
from actors.specs import (
    ModelSpec,
    OptimizerSpec,
    Positive,
    RewardFunctionSpec,
    RoleResources,
    Seconds,
    Spec,
)
from aligntune.config.backends import check_backend
from aligntune.config.ignored import check_held_out, check_length, check_table_keys
from aligntune.config.records import CheckpointSpec, HubSpec, TrackingSpec
from aligntune.config.tree import explain
from aligntune.config.warm_up import SFTSpec, check_texts
from aligntune.data.dropped import RowRules
from aligntune.data.spec import DatasetSpec
from aligntune.errors import UserError, nearest
from aligntune.names import preference_name
from cluster.specs import ClusterSpec

Loss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
"""The losses in which TRL 1.13 uses `label_smoothing`; the others ignore it."""
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""The losses that TRL 1.13 takes with an `f_divergence` other than reverse_kl."""
SORTED = ("aot", "aot_unpaired")
"""The losses in which TRL sorts the log ratios of a forward pass; of one pair they are sigmoid."""
UNWEIGHTED = (*SORTED, "sft")
"""The losses that are not weighed pair by pair: they sort the pairs, or TRL has one number."""


def _known_losses(value: Any) -> Any:
    """`value`, where every name in it is a loss. Raises ValueError with the nearest name."""
    for name in value if isinstance(value, list) else [value]:
        if name not in get_args(Loss):
            raise ValueError(f"no loss is called {name!r}; {nearest(str(name), get_args(Loss))}")
    return value


class DPOSpec(Spec):
    """Direct preference optimisation (2305.18290), as TRL's DPOTrainer runs it."""

    title: ClassVar[str] = "DPO: preferences without a reward model"
    learning_rate: ClassVar[float] = 1e-6

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="how strongly the policy is held to the reference")
    loss_type: Annotated[Loss | list[Loss], BeforeValidator(_known_losses)] = Field(
        "sigmoid", description="several are added, with weights; sft only beside another"
    )
    loss_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, description="of the losses; default 1 each"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description=f"share of flipped preferences; for {', '.join(SMOOTHED)}"
    )
    reference_free: bool = Field(False, description="reference log-probs of 0, no reference model")
    precompute_reference: bool = Field(
        False, description="reference log-probs before training, no second model during it"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl", description=f"of policy and reference; another for {', '.join(DIVERGENT)}"
    )
    weighting: bool = Field(False, description="weigh pairs by their likelihood (WPO, 2406.11827)")

    @property
    def losses(self) -> list[str]:
        """The losses as a list."""
        return list(self.loss_type) if isinstance(self.loss_type, list) else [self.loss_type]

    @property
    def sorted_losses(self) -> list[str]:
        """Those of them that are of all pairs of a forward pass together."""
        return [loss for loss in self.losses if loss in SORTED]

    @model_validator(mode="after")
    def _options_make_sense(self) -> Self:
        if not self.losses:
            raise ValueError("loss_type is an empty list; name one or more losses")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"{len(self.loss_weights)} loss_weights for {len(self.losses)} losses")
        if self.label_smoothing:
            if not set(self.losses) & set(SMOOTHED):
                raise ValueError(
                    f"label_smoothing has no effect on loss_type {self.losses[0]} in TRL; use "
                    f"{', '.join(SMOOTHED)} (robust is for noisy preferences), or set it to 0"
                )
            if "robust" in self.losses and self.label_smoothing >= 0.5:
                raise ValueError("label_smoothing of loss_type robust must be below 0.5")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0, such as 1e-3")
        if set(self.losses) == {"sft"}:
            raise ValueError(
                "loss_type sft alone reads no rejected side, no reference and no beta; add it to "
                "another loss, as in [sigmoid, sft]"
            )
        fixed = [loss for loss in self.losses if loss not in DIVERGENT]
        if self.f_divergence != "reverse_kl" and fixed:
            raise ValueError(
                f"f_divergence {self.f_divergence} does not go with loss_type {fixed[0]}; use "
                f"reverse_kl, or a loss_type of {', '.join(DIVERGENT)}"
            )
        unweighted = [loss for loss in self.losses if loss in UNWEIGHTED]
        if self.weighting and unweighted:
            raise ValueError(
                f"weighting does not go with loss_type {unweighted[0]}, which is not weighed pair "
                "by pair; set it to false, or use another loss"
            )
        if self.reference_free and self.precompute_reference:
            raise ValueError("reference_free leaves no reference to precompute; drop one of them")
        return self


class RewardModelTrainingSpec(Spec):
    """A Bradley-Terry reward model, as TRL's RewardTrainer runs it."""

    title: ClassVar[str] = "reward model: one score a text, trained on preferences"
    learning_rate: ClassVar[float] = 1e-5

    name: Literal["reward_model"] = "reward_model"
    center_coefficient: float | None = Field(
        None, gt=0, description="weight of (s_chosen + s_rejected)^2, which keeps scores around 0"
    )


ALGORITHMS: dict[str, type[DPOSpec] | type[RewardModelTrainingSpec] | type[SFTSpec]] = {
    "dpo": DPOSpec,
    "reward_model": RewardModelTrainingSpec,
    "sft": SFTSpec,
}


def _parse_algorithm(value: Any) -> Any:
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        return options
    name = preference_name(options.get("name"))
    return ALGORITHMS[name].model_validate({**options, "name": name}) if name else options


class PreferenceDataSpec(DatasetSpec):
    """What to train on, and optionally what is held out."""

    prompt_column: str = Field(
        "prompt", description="of pairs it may be absent: it is what the two sides share"
    )
    chosen_column: str = Field(
        "chosen", description="the better completion, with or without its prompt"
    )
    completion_column: str = Field(
        "completion",
        description="sft: what follows the prompt; reward_model: the text that `rewards` score, "
        "one a row, where these are given",
    )
    messages_column: str = Field(
        "messages", description="sft: whole conversations; default too: conversations (ShareGPT's)"
    )
    text_column: str = Field("text", description="sft: plain text, where there is none of these")
    system_prompt: str | None = Field(
        None, description="first message of every prompt or conversation; dpo and sft"
    )
    apply_chat_template: bool = Field(
        True, description="false: prompt and completion are text already in the model's format"
    )
    long_rows: Literal["drop", "error", "keep_start", "keep_end"] = Field(
        "drop", description="what becomes of rows over max_length; keep_* cuts them, dpo and sft"
    )
    max_length: Positive | None = Field(
        None,
        description="tokens of prompt and completion; default: the 95th percentile of the rows, "
        "within the model's positions",
    )

    @property
    def rules(self) -> RowRules:
        """What becomes of rows that cannot be used."""
        return RowRules(self.bad_rows, self.long_rows, self.max_dropped_fraction, "data.max_length")


class PreferenceTrainSpec(OptimizerSpec):
    """How much is trained, in which units, where, and with which steps."""

    scheduler: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="of the learning rate after the warm-up"
    )
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of AdamW")
    steps: Positive | None = Field(None, description="optimiser steps; or give epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data; default 1")
    workers: Positive = Field(1, description="of the Ray Train job", json_schema_extra=AUTO)
    resources: RoleResources = Field(RoleResources(), description="of each worker")
    pairs_per_worker: Positive = Field(
        8, description="in one forward pass of one worker", json_schema_extra=AUTO
    )
    accumulation_steps: Positive = Field(
        1, description="forward passes of an optimiser step", json_schema_extra=AUTO
    )
    seed: int = Field(0, ge=0, description="of data order and new weights")
    deepspeed: dict[str, Any] | None = Field(
        None, description="a DeepSpeed config, passed on; without optimizer and scheduler"
    )
    max_failures: int = Field(3, ge=0, description="restarts from the last checkpoint per run")
    start_timeout_s: Seconds = Field(600.0, description="longest wait for the workers to start")
    step_timeout_s: Seconds = Field(3600.0, description="longest time without a sign of life")

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimiser step over all workers."""
        return self.pairs_per_worker * self.accumulation_steps * self.workers


class PreferenceEvalSpec(Spec):
    """Evaluation on the held-out pairs."""

    every_steps: Positive | None = Field(
        None, description="steps between evaluations; none: only at the ends"
    )
    at_start: bool = Field(True, description="before the first step")
    at_end: bool = Field(True, description="after the last step")
    pairs_per_worker: Positive = Field(
        16, description="in one forward pass of one worker", json_schema_extra=AUTO
    )


class PreferenceCheckpointSpec(CheckpointSpec):
    """When and where the job is saved."""

    every_steps: Positive = Field(50, description="steps between checkpoints")
    storage: str | None = Field(
        None, description="a folder all nodes see, or an fsspec URI; default: output_dir"
    )


class PreferenceConfig(Spec):
    """Everything a preference job will do."""

    algorithm: Annotated[
        DPOSpec | RewardModelTrainingSpec | SFTSpec, BeforeValidator(_parse_algorithm)
    ]
    model: ModelSpec
    data: PreferenceDataSpec
    output_dir: str = Field(description="the run directory")
    backend: Literal["trl", "unsloth"] = Field(
        "trl", description="unsloth loads the model through Unsloth; dpo and sft"
    )
    rewards: list[Annotated[RewardFunctionSpec, OneKind({"function": RewardFunctionSpec})]] = Field(
        [], description="functions that score texts, which makes the pairs; reward_model only"
    )
    train: PreferenceTrainSpec = PreferenceTrainSpec()
    eval: PreferenceEvalSpec = PreferenceEvalSpec()
    checkpoint: PreferenceCheckpointSpec = PreferenceCheckpointSpec()
    tracking: TrackingSpec = TrackingSpec()
    hub: HubSpec = HubSpec()
    cluster: ClusterSpec = ClusterSpec()

    @property
    def algorithm_name(self) -> str:
        """dpo, reward_model or sft."""
        return self.algorithm.name


def load_preference_config(tree: Mapping[str, Any]) -> PreferenceConfig:
    """The resolved config of a preference job. Raises UserError."""
    try:
        config = PreferenceConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, tree, PreferenceConfig, _algorithm_options)) from error
    train = config.train
    filled = train.model_copy(
        update={
            "epochs": train.epochs if train.epochs or train.steps else 1.0,
            "learning_rate": train.learning_rate or config.algorithm.learning_rate,
        }
    )
    resolved = config.model_copy(update={"train": filled})
    _check(resolved)
    return resolved


def _algorithm_options(name: str) -> Iterable[str]:
    return ALGORITHMS[preference_name(name) or ""].model_fields


def _check(config: PreferenceConfig) -> None:
    """Refuse a tree that cannot be run, before anything starts (UserError)."""
    name, data, train = config.algorithm_name, config.data, config.train
    check_length(train.steps, train.epochs)
    check_held_out(config.eval != PreferenceEvalSpec(), data.evaluates)
    if config.rewards and name != "reward_model":
        raise UserError(
            f"{name} takes no rewards; remove them, or train a reward_model of what they score"
        )
    if config.rewards and any(source.weight for source in data.sources):
        raise UserError(
            "data.train gives weights, and rewards form the pairs, of which no source has a share; "
            "leave the weights out"
        )
    check_texts(config)
    if name != "sft" and not config.rewards and data.completion_column != "completion":
        raise UserError(
            "data.completion_column is for texts that rewards score, and rewards names none"
        )
    if name == "reward_model":
        if data.system_prompt is not None:
            raise UserError(
                "data.system_prompt: a reward model scores prompts as the data have them; write it "
                "into the prompts, for training and for scoring"
            )
        if data.long_rows in ("keep_start", "keep_end"):
            raise UserError(
                f"data.long_rows={data.long_rows}: a reward model never reads a part of a text; "
                "use drop or error, or raise data.max_length"
            )
        if config.backend == "unsloth":
            raise UserError(
                "reward_model does not run with backend=unsloth: without a GPU Unsloth loads "
                "causal models only, also where one that scores is asked for, and with one it has "
                "not been tried; use backend=trl"
            )
    check_backend(
        config.backend,
        config.model,
        train.resources,
        "train",
        "train.deepspeed" if train.deepspeed is not None else None,
    )
    for section in ("optimizer", "scheduler"):
        if section in (train.deepspeed or {}):
            raise UserError(
                f"train.deepspeed has the section {section}, and train has the settings of AdamW "
                "and its schedule (learning_rate, weight_decay, adam_betas, adam_epsilon, "
                "scheduler, warmup_steps); remove the section"
            )
    stage = ((train.deepspeed or {}).get("zero_optimization") or {}).get("stage")
    if stage == 3 and config.model.lora is not None:
        raise UserError("train.deepspeed stage 3 and model.lora do not go together; use stage 2")
    check_table_keys(config)


def check_passes(config: PreferenceConfig, held_out: bool) -> None:
    """Whether a forward pass has the pairs that the loss sorts, where a run starts: the config of
    one that an earlier version has trained is still read. Raises UserError."""
    if isinstance(config.algorithm, DPOSpec) and (sort := config.algorithm.sorted_losses):
        passes = {"train": config.train.pairs_per_worker}
        passes |= {"eval": config.eval.pairs_per_worker} if held_out else {}
        for section in (name for name, pairs in passes.items() if pairs == 1):
            raise UserError(
                f"{section}.pairs_per_worker=1 does not go with loss_type {sort[0]}, which sorts "
                "the pairs of one forward pass and would be sigmoid; set it to 2 or more"
            )
