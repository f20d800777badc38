"""An agent behind OpenEnv's capture proxy: run by an interpreter that has `openenv`, not by ours.

Plays one episode against the session in `OPENAI_BASE_URL`, and prints as JSON what the proxy's
probe found, what the agent got and what the proxy would train on.
"""

import json
import os
import socket
import sys

import httpx
from openai import OpenAI
from openenv.core.harness.capture.contract import to_trace_entries
from openenv.core.harness.capture.export import export_session
from openenv.core.harness.capture.runner import CaptureServer
from openenv.core.harness.capture.validate_llm import validate_llm

MODEL, URL, KEY = "policy", os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
ASK = {"role": "user", "content": "What is 1 + 1?"}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
    "required": ["a", "b"],
}
ADD = {"name": "add", "description": "Add.", "parameters": SCHEMA}


def probe() -> object:
    report = validate_llm(URL, MODEL, api_key=KEY)
    return {name: getattr(report, name) for name in ("ok", "capture_level", "tool_support")} | {
        "findings": report.findings,
        "fixes": report.param_fixes,
    }


def chat(url: str, key: str) -> object:
    """Streams, calls a tool, has thought, and asks for a title of its own."""
    client = OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    tools = [{"type": "function", "function": ADD}]
    messages = [ASK]
    with client.chat.completions.stream(
        model="harness/other", messages=messages, tools=tools, temperature=0.2, top_p=0.9
    ) as stream:
        first = stream.get_final_completion().choices[0]
    (call,) = first.message.tool_calls
    said = first.message.to_dict()
    said["tool_calls"] = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
    ]
    messages += [said, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
    second = client.chat.completions.create(model="m", messages=messages, tools=tools)
    title = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": [{"type": "text", "text": "A title."}]}]
    )
    return [
        first.message.content,
        json.loads(call.function.arguments),
        first.finish_reason,
        second.choices[0].message.content,
        title.choices[0].message.content,
    ]


def messages(url: str, key: str) -> object:
    """Speaks Anthropic's messages, which the proxy translates."""
    tools = [{"name": "add", "description": "Add.", "input_schema": SCHEMA}]
    asked = [ASK]

    def post() -> dict:
        body = {"model": "m", "max_tokens": 500, "system": "Be brief.", "messages": asked}
        answer = httpx.post(
            f"{url}/v1/messages", json={**body, "tools": tools}, headers={"x-api-key": key}
        )
        answer.raise_for_status()
        return answer.json()

    first = post()
    use = next(block for block in first["content"] if block["type"] == "tool_use")
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "2"}
    asked += [
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    second = post()
    return [use["input"], first["stop_reason"], second["content"]]


def main() -> None:
    if sys.argv[1] == "probe":
        print(json.dumps(probe()))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = CaptureServer(llm_url=URL, model=MODEL, port=port, api_key=KEY)
    server.start()
    try:
        session = server.registry.create(purpose="train")
        play = {"chat": chat, "messages": messages}[sys.argv[1]]
        got = play(f"http://127.0.0.1:{port}", session.session_id)
        document = export_session(session, include_messages=True)
        print(
            json.dumps(
                {
                    "got": got,
                    "trainable": document["trainable"],
                    "validation": document["validation"],
                    "roots": document["stats"]["n_roots"],
                    "turns": [
                        {"prompt": node.prompt_ids, "sampled": node.sampled_ids}
                        | {"logprobs": node.sampled_logprobs}
                        for node in session.graph.nodes()
                    ],
                    "entries": to_trace_entries(session.graph, document),
                    "fixes": [str(fix) for fix in server.inference.param_fixes],
                },
                default=str,
            )
        )
    finally:
        server.stop()


main()
