"""TRL's trainers for a preference job: the model loaded, the data in place, the model written."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.specs import ModelSpec
from actors.storage import Store

if TYPE_CHECKING:
    from actors.preference import PreferenceJob


def build_trainer(job: PreferenceJob, train: Any, evaluation: Any, scratch: Path) -> Any:
    """TRL's trainer for this job, its model loaded and its data in place."""
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable

    from actors.loading import load_tokenizer

    common = {
        "output_dir": str(scratch),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # weights and arithmetic are of model.dtype
        "seed": job.seed,
        "max_steps": job.steps or 1,
        "save_strategy": "no",  # the follower says when
        "eval_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "gradient_checkpointing": job.model.gradient_checkpointing,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_on_each_node": False,
        **job.arguments,
    }
    if job.arguments["deepspeed"] is not None and not torch.cuda.is_available():
        common |= _deepspeed_without_gpu()
    train_set = Dataset(InMemoryTable(train))
    eval_set = None if evaluation is None else Dataset(InMemoryTable(evaluation))
    tokenizer = load_tokenizer(job.model)
    build = _dpo if job.kind == "dpo" else _reward_model
    return build(job, common, train_set, eval_set, tokenizer)


def _deepspeed_without_gpu() -> dict[str, Any]:
    """Bring this rank into a group that DeepSpeed steps on a CPU; returns what the trainer is told.

    Left to itself, accelerate takes no notice of a DeepSpeed config where there is no GPU.
    """
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true")
    import deepspeed
    from accelerate import PartialState

    # A shared-memory all-reduce that is compiled at first use; gloo does without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    PartialState(backend="gloo")
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}


def _dpo(
    job: PreferenceJob, common: dict[str, Any], train: Any, evaluation: Any, tokenizer: Any
) -> Any:
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        """DPOTrainer on tokens, and without a reference where the job says so."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            if not job.reference_free:
                return super()._precompute_ref_logps(dataset, *args, **kwargs)
            zeros = [0.0] * len(dataset)
            with_chosen = dataset.add_column("ref_chosen_logps", zeros)
            return with_chosen.add_column("ref_rejected_logps", zeros)

    model, reference = _policy_and_reference(job, common)
    arguments = DPOConfig(**common)
    trainer = Trainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    return trainer


def _policy_and_reference(job: PreferenceJob, common: dict[str, Any]) -> tuple[Any, Any]:
    """The trained model, and the frozen one where the trainer cannot have it otherwise."""
    from actors.loading import load_causal_lm

    precomputed = common["precompute_ref_log_probs"] and job.trained is None
    if job.backend == "unsloth" and job.trained is None:
        from actors.unsloth_backend import load_unsloth

        model = load_unsloth(job.model, job.max_length, job.seed)
        alone = precomputed or job.model.lora is not None
        return model, None if alone else load_causal_lm(job.model)
    if job.trained is not None:
        return load_causal_lm(_renamed_model(job)), load_causal_lm(job.model)
    if job.model.lora is not None:
        return load_causal_lm(job.model, lora=True), None
    return load_causal_lm(job.model), None if precomputed else load_causal_lm(job.model)


def _renamed_model(job: PreferenceJob) -> ModelSpec:
    return job.model.model_copy(update={"name": job.trained, "lora": None})


def _reward_model(
    job: PreferenceJob, common: dict[str, Any], train: Any, evaluation: Any, tokenizer: Any
) -> Any:
    from trl import RewardConfig, RewardTrainer

    from actors.reward_model import new_reward_model

    spec = job.model if job.trained is None else _renamed_model(job)
    lora = None
    if spec.lora is not None:
        from peft import LoraConfig, TaskType

        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=spec.lora.r,
            lora_alpha=spec.lora.alpha,
            lora_dropout=spec.lora.dropout,
            target_modules=spec.lora.target_modules,
            modules_to_save=["score"],
        )
    return RewardTrainer(
        model=new_reward_model(spec, job.seed),
        args=RewardConfig(**common),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=lora,
    )


def export_model(trainer: Any, job: PreferenceJob, scratch: Path) -> None:
    """Write the trained model where the job says; with LoRA merged, and the adapter beside it."""
    from peft import PeftModel

    model = trainer.accelerator.unwrap_model(trainer.model)
    adapted = isinstance(model, PeftModel)
    # Under ZeRO-3 this gathers the shards, which takes every rank.
    state = None if adapted else trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    folder = scratch / "export"
    if adapted:
        model.save_pretrained(folder / "adapter")
        if job.model.load_in_4bit:  # merging in place would round the sum to 4 bits again
            state, model = _whole(model, job)
        else:
            model = model.merge_and_unload()
    model.save_pretrained(folder, state_dict=state)
    trainer.processing_class.save_pretrained(folder)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    Store(job.export).put(folder)


def _whole(model: Any, job: PreferenceJob) -> tuple[dict[str, Any], Any]:
    """The weights of a model in 4 bits with its adapters added, and a model to save them with."""
    import torch

    from actors.loading import whole_model
    from actors.strategies.base import merged_state
    from actors.trained import TrainedModel

    dtype: torch.dtype = getattr(torch, job.model.dtype)
    weights = merged_state(TrainedModel(model), dtype, lambda _: nullcontext())
    state = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
    return state, whole_model(model.get_base_model(), job.model)


def backend_in_use(job: PreferenceJob) -> str:
    """What runs, with versions, for people."""
    from importlib.metadata import version

    names = ["unsloth", "trl"] if job.backend == "unsloth" else ["trl"]
    return ", ".join(f"{name} {version(name)}" for name in names)
