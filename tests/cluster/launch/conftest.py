"""A config, and `aligntune launch` of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aligntune import cli


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Four policy ranks and two rollout replicas of two GPUs: eight GPUs, seven roles' CPUs."""
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.0},
        "model": {"name": "Qwen/Qwen2.5-0.5B-Instruct"},
        "data": {"path": "openai/gsm8k", "name": "main", "prompt_column": "question"},
        "rewards": ["math"],
        "output_dir": "runs/My_Run",
        "policy": {"strategy": "deepspeed", "ranks": 4, "resources": {"gpus": 1}},
        "rollout": {
            "replicas": 2,
            "engine": {"name": "vllm", "tensor_parallel_size": 2},
            "resources": {"gpus": 2},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def launch(config: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`aligntune launch TARGET CONFIG ...`: exit code, output, errors."""

    def call(target: str, *options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["launch", target, str(config), *options])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call
