"""TRL's DPO trainer on tokens, with reference log-probs of its own where none are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actors.preference.going_on import GoesOn
from actors.preference.held_out import HeldOutPairs
from actors.preference.imitation import ImitatesPairs


def dpo_trainer(reference_free: bool, alive: Callable[[], None]) -> Any:
    """The class of the trainer, made once TRL is imported. `alive` is called now and then while the
    reference's log-probs are made; `reference_free`: they count as 0."""
    import torch
    from trl import DPOTrainer
    from trl.models import prepare_deepspeed

    class Trainer(GoesOn, HeldOutPairs, ImitatesPairs, DPOTrainer):
        """DPOTrainer on tokens."""

        _precompute_engine: Any

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            """`dataset` with the reference's log-probs, on every rank.

            TRL's own leaves them in a file that rank 0 writes below a folder of its process.
            """
            if reference_free:
                found = torch.zeros(2, len(dataset))
            else:
                found = self._reference_logps(dataset, batch_size)
            with_chosen = dataset.add_column("ref_chosen_logps", found[0].tolist())
            return with_chosen.add_column("ref_rejected_logps", found[1].tolist())

        def _reference_logps(self, dataset: Any, batch_size: int) -> torch.Tensor:
            """Log-probs of the chosen and the rejected sides in float32, [2, rows]."""
            loader = torch.utils.data.DataLoader(
                dataset, batch_size=batch_size, collate_fn=self.data_collator, shuffle=False
            )
            model = self.ref_model or self.model
            if self.ref_model is None and self.is_deepspeed_enabled:
                # The model is neither placed nor, under ZeRO-3, gathered before training starts.
                if self._precompute_engine is None:
                    self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
                model = self._precompute_engine
            found = []
            for batch in self.accelerator.prepare(loader):
                alive()
                with self.accelerator.autocast():
                    sides = self.compute_ref_log_probs(model, batch)
                gathered = self.accelerator.gather_for_metrics(sides)
                found.append(torch.stack([side.float().cpu() for side in gathered]))
            return torch.cat(found, dim=1)

    return Trainer
