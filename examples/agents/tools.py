"""An agent with tools, as in TRL: typed functions with docstrings that the model may call. GRPO.

    python examples/agents/tools.py
    python examples/agents/tools.py model.name=models/agent data.path=data/sums

The data have a `prompt` and an `answer`. As written it asks for two GPUs; without any:
policy.resources.gpus=0 rollout.resources.gpus=0
"""

from __future__ import annotations

import sys

from aligntune import create_rl_trainer


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their sum.
    """
    return a + b


async def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        Their product.
    """
    return a * b


def used_a_tool(completions: list[list[dict[str, object]]], **columns: object) -> list[float]:
    """1 where a tool was called, else 0; a completion is a conversation here."""
    return [float(any(m.get("tool_calls") for m in messages)) for messages in completions]


def main() -> None:
    """Train, then show what came of it."""
    trainer = create_rl_trainer(
        algorithm="grpo",
        model_name="Qwen/Qwen3-0.6B",
        dataset_name="data/sums",
        tools=[add, multiply],
        reward_functions=["exact_match", used_a_tool],
        reward_function_weights=[1.0, 0.1],
        num_generations=8,
        max_prompt_length=512,
        max_completion_length=1024,
        output_dir="runs/agent-tools",
        overrides=[
            "algorithm.beta=0",
            "episodes.max_turns=6",
            "policy.resources.gpus=1",
            "rollout.resources.gpus=1",
            *sys.argv[1:],
        ],
    )
    result = trainer.train()
    print(f"{result.steps} steps with {result.engine}; the model is in {result.model}")


if __name__ == "__main__":
    main()
