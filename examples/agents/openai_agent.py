"""An agent of your own that speaks to an OpenAI-compatible address, here by the `openai` package.

`run` plays one episode: it gets the data row, the address of a session and its key, and returns the
reward. What the model samples behind that address is what is trained.
"""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI


async def run(data: dict[str, Any], *, base_url: str, api_key: str, http_client: Any) -> float:
    """Ask, have the answer checked once, and be rewarded for what is said then."""
    client = AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client)
    messages: list[Any] = [{"role": "user", "content": data["prompt"]}]
    for check in ("Check your answer. Then say only the number.", None):
        answer = await client.chat.completions.create(model="policy", messages=messages)
        said = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": said})
        if check:
            messages.append({"role": "user", "content": check})
    return float(said.strip() == data["answer"])
