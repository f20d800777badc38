"""An agent made from an environment that takes steps: Gymnasium's, OpenEnv's, or one like them.

Each answer of the model is an action, and what the step is worth is that answer's own reward: PPO
places it at the answer's last token, group algorithms add the steps' rewards up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

Messages = list[dict[str, Any]]
Agent = Callable[..., Coroutine[Any, Any, dict[str, float]]]


def step_agent(
    make: Callable[[dict[str, Any]], Any],
    show: Callable[[Any], str] = str,
    read: Callable[[str], Any] = int,
) -> Agent:
    """An agent for the `agent` setting.

    The conversation begins with the row's prompt and the first observation; then answers and
    observations follow each other until the environment ends the episode or a limit does.

    Args:
        make: from the data row to a new environment: `reset` (which may take `seed`) and `step`
            return Gymnasium's tuples, or objects with `observation`, `reward` and `done`; both
            may be async. Its `close` is called, if there is one.
        show: from an observation to what the model is told.
        read: from an answer's text to an action. A ValueError is told to the model, takes no step
            and is worth nothing; so is an action that the environment's `action_space`, where it
            has one, does not contain. What `step` raises fails the episode.
    """

    async def run(
        data: dict[str, Any], *, base_url: str, api_key: str, http_client: Any, seed: int
    ) -> dict[str, float]:
        environment = await _awaited(make(data))
        rewards: dict[str, float] = {}
        try:
            seeded = "seed" in inspect.signature(environment.reset).parameters
            options = {"seed": seed % 2**31} if seeded else {}
            seen, _, done = _outcome(await _awaited(environment.reset(**options)))
            messages = _beginning(data.get("prompt") or "", show(seen))
            while not done:
                answer = await _answer(http_client, base_url, api_key, messages)
                if answer is None:
                    break
                message = answer["choices"][0]["message"]
                try:
                    action = _allowed(environment, read(message["content"] or ""))
                except ValueError as error:
                    rewards[answer["id"]], told = 0.0, str(error)
                else:
                    seen, reward, done = _outcome(await _awaited(environment.step(action)))
                    rewards[answer["id"]], told = reward, show(seen)
                messages += [message, {"role": "user", "content": told}]
        finally:
            if (close := getattr(environment, "close", None)) is not None:
                await _awaited(close())
        return rewards

    return run


async def _answer(client: Any, url: str, key: str, messages: Messages) -> dict[str, Any] | None:
    """The model's answer; None where a limit of the episode leaves no room for one."""
    reply = await client.post(
        f"{url}/chat/completions",
        json={"messages": messages},
        headers={"Authorization": f"Bearer {key}"},
    )
    answer: dict[str, Any] = reply.json()
    limits = ("episode_limit", "context_length_exceeded")
    if reply.status_code == 400 and answer["error"]["code"] in limits:
        return None
    if reply.status_code != 200:
        raise RuntimeError(f"the policy gave no answer: {answer['error']['message']}")
    return answer


def _outcome(result: Any) -> tuple[Any, float, bool]:
    """Observation, reward and whether the episode is over, of a reset or a step."""
    if not isinstance(result, tuple):
        return result.observation, float(result.reward or 0.0), bool(result.done)
    if len(result) == 2:
        return result[0], 0.0, False
    observation, reward, terminated, truncated, _ = result
    return observation, float(reward), bool(terminated or truncated)


def _allowed(environment: Any, action: Any) -> Any:
    """`action`, which Gymnasium's environments do not check themselves. Raises ValueError where
    their space does not contain it."""
    space = getattr(environment, "action_space", None)
    if space is None:
        return action
    # Floats count by their values: a space of float32 contains no float64, and `step` takes both.
    kinds = [getattr(getattr(it, "dtype", None), "kind", "") for it in (action, space)]
    asked = action.astype(space.dtype) if kinds == ["f", "f"] else action
    if not space.contains(asked):
        raise ValueError(f"{action} is no action of {space}")
    return action


def _beginning(prompt: str | Messages, observation: str) -> Messages:
    """The row's prompt and the first observation, which goes on from what the user says last."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not messages or messages[-1].get("role") != "user":
        return [*messages, {"role": "user", "content": observation}]
    *before, last = messages
    content: Any = last.get("content") or ""
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": observation}]
    else:
        content = f"{content}\n{observation}" if content else observation
    return [*before, {**last, "content": content}]


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
