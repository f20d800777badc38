"""Settings of supervised warm-up, and what of a config's data goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from actors.specs import Spec
from aligntune.errors import UserError

if TYPE_CHECKING:
    from aligntune.config.preference import PreferenceConfig

OF_PAIRS = ("chosen_column", "rejected_column")
OF_TEXTS = ("messages_column", "text_column")


class SFTSpec(Spec):
    """Supervised fine-tuning: the answers of the data are imitated, as TRL's SFTTrainer does it."""

    title: ClassVar[str] = "SFT: answers to imitate, the warm-up before the others"
    learning_rate: ClassVar[float] = 2e-5

    name: Literal["sft"] = "sft"
    loss_on: Literal["answers", "all"] | None = Field(
        None,
        description="which tokens are trained; default: the answers, and of plain text, which does "
        "not say what they are, all",
    )
    packing: bool = Field(
        False, description="rows share sequences of data.max_length, none cut, each on its own"
    )


def check_texts(config: PreferenceConfig) -> None:
    """Refuse what one of the jobs over a table would ignore of the data. Raises UserError."""
    name, data = config.algorithm_name, config.data
    usual = type(data).model_fields
    for key in OF_PAIRS if name == "sft" else OF_TEXTS:
        if getattr(data, key) != usual[key].default:
            what = "on preference pairs" if name == "sft" else "by algorithm: sft"
            raise UserError(
                f"data.{key} is of data to train {what}, and {name} ignores it; remove it"
            )
    if not isinstance(config.algorithm, SFTSpec) or not config.algorithm.packing:
        return
    if config.backend == "unsloth":
        raise UserError(
            "algorithm.packing does not go with backend=unsloth, which cuts what is longer than "
            "one row may be; use backend=trl, or packing: false"
        )
    if ((config.train.deepspeed or {}).get("zero_optimization") or {}).get("stage") == 3:
        raise UserError(
            "algorithm.packing does not go with train.deepspeed stage 3, where it cannot be tried "
            "whether rows stay apart; use stage 2, or packing: false"
        )
