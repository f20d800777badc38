"""What a trainer that goes on from a checkpoint keeps in one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models import text_part
from actors.preference.going_on import GoesOn


def test_a_checkpoint_holds_the_figures_of_all_steps_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or to write those of 100,000 steps takes 10 s, at each checkpoint."""
    from transformers.trainer_callback import TrainerControl, TrainerState

    class Saves:
        """transformers' trainer, as far as it saves its state."""

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            self.state.save_to_json(str(tmp_path / trial))  # type: ignore[attr-defined]

    class Trainer(GoesOn, Saves):
        pass

    history = [{"loss": 1 / step, "epoch": 0.1 * step, "step": step} for step in range(1, 101)]
    trainer = Trainer()
    trainer.state = state = TrainerState(
        global_step=100, log_history=history, stateful_callbacks=[TrainerControl()]
    )
    state.save_to_json(str(tmp_path / "theirs"))
    monkeypatch.setattr(dataclasses, "asdict", None)
    trainer._save_checkpoint(None, "ours")
    written = (tmp_path / "ours").read_text()
    assert written.count("\n") == 1
    assert len(written) < 0.8 * len((tmp_path / "theirs").read_text())
    read = TrainerState.load_from_json(str(tmp_path / "ours"))
    assert read == TrainerState.load_from_json(str(tmp_path / "theirs")) == state
    assert vars(state).keys() == vars(read).keys()


@pytest.mark.parametrize(
    ("beside", "told"),
    [(["model.vision_tower"], "old was written by a version that trained"), ([], "size of opt")],
)
def test_moments_of_parts_that_are_trained_no_more_are_refused(
    beside: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loads:
        """transformers' trainer, as far as it loads an optimiser."""

        def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
            old = torch.optim.AdamW([torch.ones(1), torch.ones(1)])
            torch.optim.AdamW([torch.ones(1)]).load_state_dict(old.state_dict())

    class Trainer(GoesOn, Loads):
        model = torch.nn.Linear(1, 1)

    monkeypatch.setattr(text_part, "beside_text", lambda model: beside)
    with pytest.raises(ValueError, match=told):
        Trainer()._load_optimizer_and_scheduler("old")
