"""What a trainer that goes on from a checkpoint keeps in one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

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
