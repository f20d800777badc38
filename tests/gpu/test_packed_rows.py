"""On a GPU: packed rows are tried on a model that DeepSpeed has yet to place."""

from __future__ import annotations

from pathlib import Path

from aligntune.selftest.work import make_model
from tests.actors.preference.test_trainers import in_a_process

SIZES = {"hidden": 64, "layers": 2, "mlp": 128, "heads": 4, "kv_heads": 2, "vocabulary": 128}


def test_packing_starts_with_deepspeed(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from tests.actors.preference.test_sft import first_step, made_of
trainer = made_of(Path(sys.argv[1]), Path(sys.argv[2]), "algorithm.packing=true",
                  "train.deepspeed={zero_optimization: {stage: 2}}")
print("device", trainer.args.device.type, "loss", first_step(trainer)[0], flush=True)
os._exit(0)
"""
    make_model(tmp_path / "model", SIZES)
    said = in_a_process(script, str(tmp_path / "model"), str(tmp_path))
    assert "device cuda loss" in said
