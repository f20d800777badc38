"""The modules that a user's agents are, for tests."""

OPENAI = '''
import json

import openai

ADD = [{"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}}]


async def solves(data, *, base_url, api_key, http_client):
    """Asks until no tool is called; its reward says whether the answer is right."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client)
    messages = [{"role": "user", "content": data["prompt"]}]
    while True:
        answer = await client.chat.completions.create(model="m", messages=messages, tools=ADD)
        said = answer.choices[0].message
        messages.append(said)
        for call in said.tool_calls or ():
            given = json.loads(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id,
                             "content": str(given["a"] + given["b"])})
        if not said.tool_calls:
            return 1.0 if said.content == data["answer"] else 0.0


async def goes_on(data, *, base_url, api_key, http_client):
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, http_client=http_client)
    messages = [{"role": "user", "content": data["prompt"]}]
    while True:
        answer = await client.chat.completions.create(model="m", messages=messages)
        messages += [answer.choices[0].message, {"role": "user", "content": "more"}]
'''

PLAIN = '''
import json
import os
import subprocess
import sys
import time
import urllib.request

STATE = []


def ask(text):
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    key = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body, key)) as reply:
        return json.load(reply)


def asks_once(data):
    """Not async, and told of nothing but its row."""
    STATE.append(1)
    print("said", ask(data["prompt"])["choices"][0]["message"]["content"])
    return len(STATE)


def rates_each_answer(data):
    first = ask("a")
    ask("b")
    return {data.get("id", first["id"]): 0.5}


def raises(data):
    raise KeyError("lost")


def passes_proxies_by(data, base_url):
    asks_once(data)
    host = base_url.split("/")[2].rpartition(":")[0]
    return float(host in os.environ["NO_PROXY"].split(","))


def returns_text(data):
    asks_once(data)
    return "good"


def ends_its_process(data):
    os._exit(3)


def says_nothing(data):
    return 1.0


def hangs(data):
    """Has an answer, starts something, and does not end."""
    asks_once(data)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(data["pids"], "w") as file:
        file.write(f"{os.getpid()} {process.pid}")
    os.rename(data["pids"], data["pids"] + ".ready")
    time.sleep(600)


NO_FUNCTION = 3
'''

PROGRAM = """
import json, os, sys
sys.path.insert(0, os.path.dirname(__file__))
from user_agents import ask
row = json.load(sys.stdin)
assert "ALIGNTUNE_SEED" in os.environ
said = ask(row["prompt"])["choices"][0]["message"]["content"]
print("it said", said)
if row["prompt"] == "deep":
    print("[" * 5000)
    sys.exit()
if row["prompt"] == "fail":
    sys.exit(4)
if row["prompt"] == "leaves":
    import subprocess
    process = subprocess.Popen(["sleep", "600"])
    with open(row["pids"], "w") as file:
        file.write(str(process.pid))
if row["prompt"] != "quiet":
    print(json.dumps({"reward": float(said == row["answer"])}))
"""

DYING = """
import os
import signal

from user_agents import ask


def first(marker):
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except FileNotFoundError:  # its folder is not there: each time is the first
        return True
    return True


def plays(data):
    "Two turns; between them its process is killed, or it raises, unless a file is there."
    with open(data["begun"], "a") as file:
        file.write("x")
    ask("a")
    if "dies_unless" in data and first(data["dies_unless"]):
        os.kill(os.getpid(), signal.SIGKILL)
    if "raises_unless" in data and first(data["raises_unless"]):
        raise KeyError("lost")
    ask("b")
    return 1.0
"""

DYING_PROGRAM = """
import json, os, sys
sys.path.insert(0, os.path.dirname(__file__))
from dying_agents import plays
print(json.dumps({"reward": plays(json.load(sys.stdin))}))
"""
