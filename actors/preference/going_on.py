"""What a trainer of TRL's does that goes on from a checkpoint, and how it writes one.

Invariant: weights, moments, the place in the schedule and the count of tokens are the checkpoint's;
learning rate, decay, betas, epsilon and clipping are the job's.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any


def _write_state(state: Any, path: str) -> None:
    """A trainer's state as `TrainerState.load_from_json` reads it."""
    own = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    Path(path).write_text(json.dumps(own, sort_keys=True) + "\n", encoding="utf-8")


class GoesOn:
    """Before a trainer among the bases. transformers alone would take all settings of the optimiser
    from the checkpoint, and train a step more where the checkpoint has them all."""

    args: Any
    model: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    model_wrapped: Any
    is_deepspeed_enabled: bool
    _total_train_tokens: int

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        """As transformers', but for adapters: that one passes over `default` where another lies in
        a folder of its own, as TRL's copy for the reference, `ref`, did."""
        from peft import PeftModel

        if isinstance(self.model, PeftModel):
            self.model.load_adapter(checkpoint, "default", is_trainable=True)
        else:
            super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', but for its state, which has the figures of all steps: that one copies
        them deep and indents them, 0.1 ms a step each time, while all workers wait."""
        state = self.state
        state.save_to_json = partial(_write_state, state)
        try:
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            del state.save_to_json

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which calls it when the optimiser is whole and nothing is loaded."""
        from actors.strategies.optimizer import settings_of

        made = super().create_scheduler(*args, **kwargs)  # type: ignore[misc]
        self._settings = settings_of(self.optimizer)
        for group in self._settings:
            del group["lr"]  # the schedule's
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers', but for the settings. Raises ValueError where it was written when parts
        of the model that text never reaches were trained: it does not name their moments."""
        from actors.models.text_part import OF_BEFORE, beside_text
        from actors.strategies.optimizer import put_back

        try:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        except ValueError as error:  # torch's, of groups of other sizes
            adapted = hasattr(self.model, "peft_config")
            inner = self.model.get_base_model() if adapted else self.model
            if "parameter group" in str(error) and beside_text(inner):
                raise ValueError(f"{checkpoint} {OF_BEFORE}") from error
            raise
        if checkpoint is None:
            return
        counts = [row["num_tokens"] for row in self.state.log_history if "num_tokens" in row]
        self._total_train_tokens = int(counts[-1]) if counts else 0
        put_back(self.optimizer, self._settings)
        if self.is_deepspeed_enabled:  # which loads its optimiser with the model, and clips itself
            self.optimizer.optimizer.clip_grad = self.model_wrapped.gradient_clipping()
        schedule = self.lr_scheduler  # a LambdaLR
        schedule.base_lrs = [group["initial_lr"] for group in self._settings]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        rates = [full * f for full, f in zip(schedule.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
