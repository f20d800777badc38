"""verifiers' train client: run by an interpreter that has `verifiers`, not by ours.

Plays one episode against the session in `OPENAI_BASE_URL` with the tokenizer in the folder of its
argument: a turn that calls a tool, one that goes on from it, and one of the user's. Prints as JSON
what it would train on.
"""

import asyncio
import json
import os
import sys

from renderers import Qwen3RendererConfig
from verifiers.v1.clients.train import TrainClient
from verifiers.v1.configs.client import TrainClientConfig
from verifiers.v1.dialects import ChatDialect
from verifiers.v1.graph import prepare_turn
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


async def play(url: str, folder: str) -> dict:
    config = TrainClientConfig(
        base_url=url,
        api_key_var="OPENAI_API_KEY",
        renderer=Qwen3RendererConfig(thinking_retention="all"),
        renderer_model_name=folder,
    )
    client, dialect = TrainClient(config), ChatDialect()
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
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    turns = []
    for follow in ({"role": "tool", "content": "2"}, {"role": "user", "content": "And?"}, None):
        body = {"model": "policy", "messages": messages, "tools": [TOOL]}
        request = dialect.parse_request(body)
        turn = prepare_turn(trace, request.messages, request.tools)
        answer = await client.get_response(dialect, body, sampling, session_id=trace.id, turn=turn)
        turns.append(
            {
                "prompt": answer.tokens.prompt_ids,
                "sampled": answer.tokens.completion_ids,
                "logprobs": answer.tokens.completion_logprobs,
                "bridged": answer.tokens.bridged,
                "finish_reason": answer.finish_reason,
                "content": answer.message.content,
            }
        )
        turn.commit(answer)
        message = answer.raw["choices"][0]["message"]
        messages = [*messages, message]
        if follow is not None:
            calls = message.get("tool_calls") or [{}]
            named = {"tool_call_id": calls[0]["id"]} if follow["role"] == "tool" else {}
            messages.append({**follow, **named})
    await client.close()
    (branch,) = trace.branches
    return {
        "turns": turns,
        "token_ids": branch.token_ids,
        "mask": branch.sampled_mask,
        "logprobs": branch.logprobs,
    }


def main() -> None:
    print(json.dumps(asyncio.run(play(os.environ["OPENAI_BASE_URL"], sys.argv[1]))))


main()
