"""How a run is saved, evaluated and tracked, as its config says."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from actors.settings import LOWEST_TEMPERATURE, Positive, Spec


class CheckpointSpec(Spec):
    """When the run is saved."""

    keep_last: Positive = Field(3, description="older ones are removed")
    at_end: bool = Field(True, description="one after the last step")
    storage: str | None = Field(
        None,
        description="a folder that outlives the node, or an fsspec URI: the run is copied there "
        "with every checkpoint, and fetched from there where output_dir is behind; default: none",
    )


class BestSpec(Spec):
    """Which checkpoint is kept beside the newest ones, as long as none is better."""

    metric: str = Field(description="a figure of evals.jsonl, such as eval/reward/mean")
    mode: Literal["max", "min"] = Field("max", description="whether the highest or lowest is best")


class OnlineCheckpointSpec(CheckpointSpec):
    """Those of an online run, which copies them itself."""

    every_steps: Positive | None = Field(
        50, description="steps between checkpoints; null: by every_minutes alone"
    )
    every_minutes: float | None = Field(
        None,
        gt=0,
        description="after so many minutes the end of a step makes one too; default: none",
    )
    copy_timeout_s: float = Field(
        1800.0, gt=0, description="longest wait for the storage to take, or give, a checkpoint"
    )
    best: BestSpec | None = Field(None, description="see checkpoint.best; default: none is kept")


class HubSpec(Spec):
    """A copy of the trained model on the hub; the token is HF_TOKEN's or a login's."""

    push_to: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="owner/name, made where it is not there; default: nothing is pushed",
    )
    private: bool = Field(
        True,
        description="its owner alone sees it; nothing goes to a name that is public there",
    )
    timeout_s: float = Field(3600.0, gt=0, description="longest wait; then the run ends without it")


class EvalSpec(Spec):
    """Evaluation on the eval set, scored by the run's own rewards."""

    every_steps: Positive | None = Field(
        None, description="steps between evaluations; none: only at the ends"
    )
    at_start: bool = Field(True, description="before the first step")
    at_end: bool = Field(True, description="after the last step")
    completions: Positive = Field(1, description="per prompt")
    temperature: float = Field(
        0.0, ge=0, description=f"0 is greedy; above it {LOWEST_TEMPERATURE} is the lowest"
    )

    @field_validator("temperature")
    @classmethod
    def _can_be_drawn_at(cls, temperature: float) -> float:
        if 0 < temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"give 0, which is greedy, or {LOWEST_TEMPERATURE} or more")
        return temperature


class TrackingSpec(Spec):
    """Beyond metrics.jsonl, which is always written."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio", "prometheus"]] = Field(
        ["tensorboard"], description="where figures go too"
    )
    project: str = Field("aligntune", description="its name at W&B, MLflow and Trackio")
    name: str | None = Field(
        None,
        description="of the run there; default: output_dir's last part. Trackio has the run's "
        "tracking_id behind it",
    )
    group: str | None = Field(None, description="of runs that belong together there")
    tags: list[str] = Field([], description="of the run at W&B, MLflow and Trackio")
    entity: str | None = Field(None, description="W&B's user or team; default: your own")


class OnlineTrackingSpec(TrackingSpec):
    """What an online run shows besides."""

    profile: bool = Field(False, description="write trace.json, a timeline of every remote call")
    samples_per_step: int = Field(4, ge=0, description="groups written to samples.jsonl")
    samples_per_evaluation: int = Field(
        16, ge=0, description="held-out prompts, if any, written to eval_samples.jsonl"
    )
