"""An agent behind verifiers' interception server: run by an interpreter that has `verifiers`, not
by ours.

The server has the session in `OPENAI_BASE_URL` as its model, by its train client (with the
tokenizer in the folder of the second argument) or by its eval client, as the first argument says.
The agent speaks to the server by OpenAI's client: a stream that calls a tool, and a turn after it.
Prints as JSON what the agent got and what verifiers would train on.
"""

import asyncio
import json
import os
import sys

from openai import AsyncOpenAI
from renderers import Qwen3RendererConfig
from verifiers.v1.clients import EvalClientConfig, ModelContext, TrainClientConfig
from verifiers.v1.interception.server import InterceptionServer
from verifiers.v1.session import RolloutLimits, RolloutSession
from verifiers.v1.trace import AgentInfo, Trace, TraceTask
from verifiers.v1.types import Sampling

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        },
    },
}


async def agent(url: str, key: str) -> list:
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    content, thought, called, ended = "", "", {}, None
    async for chunk in await client.chat.completions.create(
        model="the-agents-own", messages=messages, tools=[TOOL], temperature=0.2, stream=True
    ):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            thought += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            for part in choice.delta.tool_calls or []:
                call = called.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
                call["id"] += part.id or ""
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
            ended = choice.finish_reason or ended
    (call,) = called.values()
    function = {"name": call["name"], "arguments": call["arguments"]}
    said = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": call["id"], "type": "function", "function": function}],
    }
    messages += [
        {**said, **({"reasoning_content": thought} if thought else {})},
        {"role": "tool", "tool_call_id": call["id"], "content": "2"},
    ]
    second = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
    await client.close()
    answer = second.choices[0].message.content
    return [content, json.loads(call["arguments"]), ended, answer]


async def play(kind: str, url: str, folder: str) -> dict:
    of_both = {"base_url": url, "api_key_var": "OPENAI_API_KEY"}
    client = (
        TrainClientConfig(
            **of_both,
            renderer=Qwen3RendererConfig(thinking_retention="all"),
            renderer_model_name=folder,
        )
        if kind == "train"
        else EvalClientConfig(**of_both)
    )
    trace = Trace.model_construct(
        id="episode",
        nodes=[],
        calls=[],
        tools=[],
        rewards={},
        task=TraceTask.model_construct(),
        agent=AgentInfo.model_construct(),
    )
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=400)
    session = RolloutSession(
        ctx=ModelContext(model="policy", client=client, sampling=sampling),
        trace=trace,
        limits=RolloutLimits(max_turns=4),
    )
    async with InterceptionServer() as server, server.acquire(session) as (address, key, _):
        got = await agent(address, key)
    (branch,) = trace.branches
    return {
        "got": got,
        "turns": trace.num_turns,
        "errors": [call.error.message for call in trace.calls if call.error is not None],
        "token_ids": branch.token_ids if kind == "train" else None,
        "mask": branch.sampled_mask if kind == "train" else None,
        "logprobs": branch.logprobs if kind == "train" else None,
    }


def main() -> None:
    kind, folder = sys.argv[1:]
    print(json.dumps(asyncio.run(play(kind, os.environ["OPENAI_BASE_URL"], folder))))


main()
