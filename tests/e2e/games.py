"""Environments for whole runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

TURNS = 3
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


class Adding:
    """The sum of two numbers, which a tool knows."""

    def reset(self, **row: object) -> None:
        """Begin."""
        self.calls = 0

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        self.calls += 1
        return a + b

    def get_reward(self) -> float:
        """How often the tool was called."""
        return float(self.calls)


class Gated(Adding):
    """Says in the row's `log` when it begins and when its tool is called and answers, which is not
    before the row's `gate` is there."""

    def reset(self, *, log: str, gate: str, **row: object) -> None:
        """Begin."""
        super().reset()
        self._log, self._gate = Path(log), Path(gate)
        self._say("begun")

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        self._say("asked")
        while not self._gate.exists():
            time.sleep(0.02)
        self._say("answered")
        return super().add(a, b)

    def _say(self, what: str) -> None:
        with self._log.open("a") as log:
            log.write(what + "\n")


def asked(environments: list[Adding], **columns: object) -> list[float]:
    """How often the tool was called, as the living environment says."""
    return [float(one.calls) for one in environments]


def messages(completions: list[list[dict[str, object]]], **columns: object) -> list[float]:
    """How many messages there were after the prompt."""
    return [float(len(one)) for one in completions]


async def adds(data: dict[str, Any], *, base_url: str, api_key: str, http_client: Any) -> float:
    """An agent that does the sums that the model asks for; how often it was asked."""
    messages, calls = list(data["prompt"]), 0
    for _ in range(TURNS):
        reply = await http_client.post(
            f"{base_url}/chat/completions",
            json={"messages": messages, "tools": [ADD]},
            headers={"Authorization": f"Bearer {api_key}"},
        )
        if reply.status_code == 400:  # a limit of the episode
            break
        reply.raise_for_status()
        said = reply.json()["choices"][0]["message"]
        messages.append(said)
        if not said.get("tool_calls"):
            break
        for call in said["tool_calls"]:
            calls += 1
            try:
                given = json.loads(call["function"]["arguments"])
                told = str(int(given["a"]) + int(given["b"]))
            except (ValueError, KeyError, TypeError) as error:
                told = f"{type(error).__name__}: {error}"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": told})
    return float(calls)
