"""TRL's trainers for a preference job: the model loaded, the data in place, the model written.

In bfloat16 the trained weights are kept in float32 and the arithmetic runs under autocast, as in
online runs: at these learning rates an update is below bfloat16's last digit, and would be lost.
DeepSpeed does the same its own way, with float32 weights in its optimiser. The reference computes
like the policy, so that the two agree to the bit before the first step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.preference.dpo import dpo_trainer
from actors.preference.going_on import GoesOn
from actors.preference.held_out import HeldOutPairs, HeldOutTokens, with_row_lengths
from actors.preference.imitation import taught_loss
from actors.preference.relay import PreferenceJob
from actors.preference.routers import put_back, routing_of
from actors.specs import ModelSpec
from actors.storage import Store

if TYPE_CHECKING:
    import torch


def build_trainer(
    job: PreferenceJob,
    train: Any,
    evaluation: Any,
    scratch: Path,
    alive: Callable[[], None],
) -> Any:
    """TRL's trainer for this job, its model loaded and its data in place.

    `alive` is called now and then while this takes long.
    """
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable

    from actors.models.loading import load_tokenizer

    common = {
        "output_dir": str(scratch),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": job.model.dtype == "bfloat16",  # the arithmetic; TRL's default is True
        "optim": "adamw_torch_fused",  # transformers' own default has changed before
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
        # With checkpointing too, reentrant in Unsloth alone: text may not reach a weight.
        "ddp_find_unused_parameters": None if job.backend == "unsloth" else True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_on_each_node": False,
        **job.arguments,
    }
    if job.arguments["deepspeed"] is not None and not torch.cuda.is_available():
        common |= _deepspeed_without_gpu()
    torch.manual_seed(job.seed)  # of LoRA's first weights, drawn before the trainer sets its seed
    # TRL precomputes the reference of all rows to train on, also where none is trained on.
    train_set = Dataset(InMemoryTable(train if job.steps else train.slice(0, 1)))
    eval_set = None if evaluation is None else Dataset(InMemoryTable(evaluation))
    tokenizer = load_tokenizer(job.model)
    of_kind: dict[str, Callable[..., Any]] = {
        "dpo": partial(_dpo, alive=alive),
        "reward_model": _reward_model,
        "sft": _sft,
    }
    trainer = of_kind[job.kind](job, common, train_set, eval_set, tokenizer)
    for parameter in trainer.model.parameters():
        # Adapters on a base of fewer bits, and what Unsloth loads; not what is shared out.
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
    return trainer


def _share_out(model: Any, arguments: Any) -> None:
    """Under ZeRO-3, leave each worker its share of `model`, before all of it is on every GPU."""
    told = arguments.hf_deepspeed_config if arguments.deepspeed else None
    if told is not None and told.is_zero3():
        from actors.strategies.deepspeed import share_out

        share_out(model, told.dtype(), told.config)


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
    return {"accelerator_config": {"use_configured_state": True}}


def _dpo(
    job: PreferenceJob,
    common: dict[str, Any],
    train: Any,
    evaluation: Any,
    tokenizer: Any,
    alive: Callable[[], None],
) -> Any:
    from trl import DPOConfig

    trainer_class = dpo_trainer(job.reference_free, alive)
    model, reference = _policy_and_reference(job, common)
    arguments = DPOConfig(**common)  # made once the models are loaded, or they are shared out then
    for each in (model, reference):
        if each is not None:
            _give_float_logits(each)
            _share_out(each, arguments)
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    if "ref" in getattr(trainer.model, "peft_config", ()):
        # TRL's copy of adapters that it takes for trained ones. These are new and add nothing, so
        # the reference is the model without them, as TRL has it where there is no copy.
        trainer.model.delete_adapter("ref")
    return trainer


def _give_float_logits(model: Any) -> None:
    """Let `model` give logits in float32, whoever calls it: a difference of log-probs is far below
    bfloat16's last digit."""

    def widen(_: Any, __: Any, output: Any) -> Any:
        if output.logits is not None:
            output.logits = output.logits.float()
        return output

    model.register_forward_hook(widen)


def _policy_and_reference(job: PreferenceJob, common: dict[str, Any]) -> tuple[Any, Any]:
    """The trained model, and the frozen one where the trainer cannot have it otherwise."""
    from actors.models.loading import load_causal_lm

    precomputed = common["precompute_ref_log_probs"] and job.trained is None
    plain = _with_float_weights(job.model)
    if job.backend == "unsloth" and job.trained is None:
        from actors.models.unsloth import load_unsloth

        trained = plain if job.model.lora is None else job.model
        model = load_unsloth(trained, job.max_length, job.seed)
        alone = precomputed or job.model.lora is not None
        return model, None if alone else load_causal_lm(plain)
    if job.trained is not None:
        reference = _base_in_4_bits(job) if job.model.load_in_4bit else load_causal_lm(plain)
        return load_causal_lm(_renamed_model(job)), reference
    if job.model.lora is not None:
        return load_causal_lm(job.model, lora=True), None
    return load_causal_lm(plain), None if precomputed else load_causal_lm(plain)


def _base_in_4_bits(job: PreferenceJob) -> Any:
    """What a model in 4 bits was trained against: itself, without its adapters."""
    from actors.models.unsloth import load_unsloth

    model = load_unsloth(job.model, job.max_length, job.seed)
    model.base_model.disable_adapter_layers()
    return model


def _with_float_weights(spec: ModelSpec) -> ModelSpec:
    return spec.model_copy(update={"dtype": "float32"})


def _renamed_model(job: PreferenceJob) -> ModelSpec:
    named = {"name": job.trained, "revision": None, "lora": None}
    return _with_float_weights(job.model.model_copy(update=named))


def _reward_model(
    job: PreferenceJob, common: dict[str, Any], train: Any, evaluation: Any, tokenizer: Any
) -> Any:
    from trl import RewardConfig, RewardTrainer

    from actors.models.reward import new_reward_model
    from actors.models.text_part import lora_config

    class Trainer(GoesOn, HeldOutPairs, RewardTrainer):
        """RewardTrainer that goes on with the settings of its job."""

    spec = job.model if job.trained is None else _renamed_model(job)
    model = new_reward_model(spec if spec.lora else _with_float_weights(spec), job.seed)
    lora = spec.lora and lora_config(model, spec.lora, "SEQ_CLS", modules_to_save=["score"])
    # By which a score's place is found. TRL sets it at the top, where a composite's is not read.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    _give_float_logits(model)
    arguments = RewardConfig(**common)
    _share_out(model, arguments)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=lora,
    )


def _sft(
    job: PreferenceJob, common: dict[str, Any], train: Any, evaluation: Any, tokenizer: Any
) -> Any:
    from trl import SFTConfig, SFTTrainer

    class Trainer(GoesOn, HeldOutTokens, SFTTrainer):
        """SFTTrainer that goes on with the settings of its job."""

    model = _taught_model(job)
    routing = routing_of(model.config)
    _give_float_logits(model)
    trainer = Trainer(
        model=model,
        args=SFTConfig(**common),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        # Unsloth's models have it from Unsloth, which looks at how each takes the denominator.
        compute_loss_func=None if job.backend == "unsloth" else taught_loss,
    )
    trainer.routing = routing
    if common["padding_free"]:
        from actors.preference.packed import check_apart

        check_apart(trainer)
        trainer.data_collator = with_row_lengths(trainer.data_collator)
    _share_out(model, trainer.args)  # what looks at packed rows needs whole weights
    return trainer


def _taught_model(job: PreferenceJob) -> Any:
    from actors.models.loading import load_causal_lm

    if job.trained is not None:
        return load_causal_lm(_renamed_model(job))
    lora = job.model.lora is not None
    spec = job.model if lora else _with_float_weights(job.model)
    if job.backend == "unsloth":
        from actors.models.unsloth import load_unsloth

        return load_unsloth(spec, job.max_length, job.seed)
    return load_causal_lm(spec, lora=lora)


def export_model(trainer: Any, job: PreferenceJob, scratch: Path) -> None:
    """Write the trained model in model.dtype where the job says; with LoRA merged, and the adapter
    beside it."""
    import torch
    from peft import PeftModel

    from actors.engines.base import name_ends
    from actors.models.loading import name_dtype

    dtype: torch.dtype = getattr(torch, job.model.dtype)
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
    if state is None:
        state = model.state_dict()
    if job.kind == "sft":
        put_back(trainer.routing, model.config)
    weights = dict(model.named_parameters(remove_duplicate=False)).keys()
    model.save_pretrained(folder, state_dict=_in_dtype(state, dtype, weights))
    name_dtype(folder, job.model.dtype)
    name_ends(folder, job.model)
    trainer.processing_class.save_pretrained(folder)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    Store(job.export).put(folder)
    Store(job.export).to_disk()


def _in_dtype(
    state: dict[str, torch.Tensor], dtype: torch.dtype, weights: Collection[str]
) -> dict[str, torch.Tensor]:
    """`state` with its `weights` in `dtype`; tied ones stay one, for they are written once. A
    buffer stays as wide as it is where its numbers need that, as biases of routers do."""
    import torch

    cast: dict[tuple[Any, ...], torch.Tensor] = {}
    for name, tensor in state.items():
        if (place := _place(tensor)) not in cast:
            narrow = tensor.to(dtype) if tensor.is_floating_point() else tensor
            alike = name in weights or torch.equal(narrow.to(tensor.dtype), tensor)
            cast[place] = narrow if alike else tensor
    return {name: cast[_place(tensor)] for name, tensor in state.items()}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _whole(model: Any, job: PreferenceJob) -> tuple[dict[str, Any], Any]:
    """The weights of a model in 4 bits with its adapters added, its buffers, and a model to save
    them with."""
    import torch

    from actors.models.checkpoint_names import kept_buffers
    from actors.models.loading import whole_model
    from actors.models.wrapped import TrainedModel
    from actors.strategies.state import in_place, merged_state

    dtype: torch.dtype = getattr(torch, job.model.dtype)
    weights = merged_state(TrainedModel(model), dtype, in_place)
    state = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
    base = model.get_base_model()
    state |= {name: buffer.cpu() for name, buffer in kept_buffers(base)}
    return state, whole_model(base, job.model)


def backend_in_use(job: PreferenceJob) -> str:
    """What runs, with versions, for people."""
    from importlib.metadata import version

    names = ["unsloth", "trl"] if job.backend == "unsloth" else ["trl"]
    return ", ".join(f"{name} {version(name)}" for name in names)
