"""A hub on loopback that keeps what it is sent: as much of the Hugging Face hub's API as its client
asks when it pushes a folder, by LFS or by Xet, whose chunks lie in a folder of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_secretsecretsecretsecret"
LARGE = (".safetensors",)  # of these a commit holds the hash alone


@dataclass(frozen=True)
class Large:
    """A file of which a commit names the content by its SHA-256."""

    oid: str
    size: int


class Gate:
    """Holds calls until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def open(self) -> None:
        """Let them go on, and all later ones."""
        self._opened.set()

    def pass_through(self) -> None:
        """Wait here."""
        self.reached.set()
        self._opened.wait()


@dataclass
class Repository:
    """What the hub has under one name."""

    private: bool
    files: dict[str, bytes | Large] = field(default_factory=dict)
    commits: int = 0


class Hub:
    """The hub's state, and what tests want it to do. Calls are named by the last word of their
    path: create, preupload, batch, lfs, token, commit."""

    def __init__(self, chunks: Path) -> None:
        self.chunks = f"local://{chunks}"  # for the client's own store in place of Xet's servers
        self.address = ""
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # what came by LFS, by hash
        self.asked: list[tuple[str, str | None]] = []  # call, and the token that came with it
        self.refused: dict[str, tuple[int, str]] = {}  # by call: status and words
        self.held: dict[str, Gate] = {}  # by call: no answer before it is opened

    def content(self, name: str, path: str, like: Path) -> bytes:
        """What a file of a repository holds; `like` is the file that it should be, by whose Xet
        hash the client finds its chunks."""
        found = self.repositories[name].files[path]
        if isinstance(found, bytes):
            return found
        whole = self.large.get(found.oid) or self._from_chunks(like)
        assert (hashlib.sha256(whole).hexdigest(), len(whole)) == (found.oid, found.size)
        return whole

    def _from_chunks(self, like: Path) -> bytes:
        import hf_xet

        (known,) = hf_xet.hash_files([str(like)])
        got = like.with_name(f"{like.name}.fetched")
        expires = int(time.time()) + 3600
        with hf_xet.XetSession().new_file_download_group(
            endpoint=self.chunks, token="t", token_expiry_unix_secs=expires
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(known.hash, known.file_size), str(got))
        content = got.read_bytes()
        got.unlink()
        return content


@contextmanager
def served(chunks: Path) -> Iterator[Hub]:
    """A hub that listens while this lasts."""
    hub = Hub(chunks)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for gate in hub.held.values():
            gate.open()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        call, name = _call(path)
        self.hub.asked.append((call, self.headers.get("Authorization")))
        if call in self.hub.held:
            self.hub.held[call].pass_through()
        if call in self.hub.refused:
            self._refuse(*self.hub.refused[call])
        elif call != "lfs" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "Invalid credentials in Authorization header")
        elif call == "create":
            self._create(json.loads(body))
        elif call in ("validate", "lfs"):
            if call == "lfs":
                self.hub.large[path.rpartition("/")[2]] = body
            self._answer({"errors": [], "warnings": []})
        elif name not in self.hub.repositories:
            self._refuse(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        else:
            answer = getattr(self, f"_{call}")(name, body)
            self._answer(answer, self._xet_headers() if call == "token" else {})

    def _create(self, given: dict[str, Any]) -> None:
        name = f"{given['organization'] or 'me'}/{given['name']}"
        there = name in self.hub.repositories
        if not there:
            self.hub.repositories[name] = Repository(given["visibility"] == "private")
        self._answer({"url": f"{self.hub.address}/{name}"}, status=409 if there else 200)

    def _info(self, name: str, body: bytes) -> Any:
        repository = self.hub.repositories[name]
        files = [{"rfilename": path} for path in repository.files]
        said = {"id": name, "modelId": name, "private": repository.private, "siblings": files}
        return said | {"_id": "1", "sha": "0" * 40, "tags": [], "downloads": 0, "likes": 0}

    def _tree(self, name: str, body: bytes) -> Any:
        files = self.hub.repositories[name].files
        return [{"type": "file", "path": path, "oid": "0" * 40, "size": 1} for path in files]

    def _preupload(self, name: str, body: bytes) -> Any:
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, name: str, body: bytes) -> Any:
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{each['oid']}"}}
        return {"objects": objects}

    def _token(self, name: str, body: bytes) -> Any:
        expires = int(time.time()) + 3600
        return {"casUrl": self.hub.chunks, "exp": expires, "accessToken": "short"}

    def _xet_headers(self) -> dict[str, str]:
        said = self._token("", b"")
        return {
            "X-Xet-Cas-Url": said["casUrl"],
            "X-Xet-Token-Expiration": str(said["exp"]),
            "X-Xet-Access-Token": said["accessToken"],
        }

    def _commit(self, name: str, body: bytes) -> Any:
        repository = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = Large(value["oid"], value["size"])
                case "deletedFile":
                    del repository.files[value["path"]]
        repository.commits += 1
        return {"commitUrl": f"{self.hub.address}/{name}/commit/a", "commitOid": "a"}

    def _refuse(self, status: int, words: str, headers: dict[str, str] | None = None) -> None:
        self._answer({"error": words}, {"X-Error-Message": words, **(headers or {})}, status)

    def _answer(
        self, content: Any, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


def _call(path: str) -> tuple[str, str]:
    """The call that a path is, and the repository that it is of."""
    parts = path.strip("/").split("/")
    match parts:
        case ["api", "repos", "create"]:
            return "create", ""
        case ["api", "validate-yaml"]:
            return "validate", ""
        case ["lfs", _]:
            return "lfs", ""
        case [owner, name, "info", "lfs", "objects", "batch"]:
            return "batch", f"{owner}/{name.removesuffix('.git')}"
        case ["api", "models", owner, name]:
            return "info", f"{owner}/{name}"
        case ["api", "models", owner, name, call, *_]:
            return call.removeprefix("xet-write-"), f"{owner}/{name}"
    raise AssertionError(f"no test speaks {path}")
