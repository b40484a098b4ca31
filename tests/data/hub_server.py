"""A server of data sets and models that speaks as much of the hub's protocol as its own clients ask for, and fails when
told to.

It is named to them as `HF_ENDPOINT`. Every repository is a dictionary of file names and contents; models can be
uploaded to, and keep the content of each commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "a" * 40


@dataclass
class Fault:
    """What happens instead to the next `times` requests whose method and path hold `match`, after `after` others."""

    match: str
    status: int | None = None  # answered, with `headers`
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # the connection is closed after so many bytes of the body
    stall: float | None = None  # seconds of silence in the middle of the body
    empty: bool = False  # success, and nothing in it
    times: int = 1
    after: int = 0


class HubServer:
    """Use as a context manager; `url` is where it listens, `requests` what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}  # of (model, branch or commit): what it holds
        self.shas: dict[tuple[str, str], str] = {}  # of (model, branch)
        self.private: dict[str, bool] = {}
        self.tokens = {"hf_right"}  # that may upload
        self.large: dict[str, bytes] = {}  # uploaded beside commits, by sha256
        self.moved: dict[str, str] = {}
        self.gated: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.sent = 0  # bytes of bodies
        server = self

        class Handler(_Handler):
            hub = server

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        """The branch of a model holds these files from now on; returns the commit."""
        sha = _hash(repr(sorted(files.items())).encode())[:40]
        self.commits[name, branch] = self.commits[name, sha] = dict(files)
        self.shas[name, branch] = self.shas[name, sha] = sha
        return sha

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.match in request and fault.times:
                if fault.after:
                    fault.after -= 1
                    continue
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *message: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault_for(request)
        if fault and fault.status:
            self._send(b"out of order", fault.status, fault.headers)
        elif self.command == "PUT" or (self.command == "POST" and not path.startswith("/api/datasets/")):
            self._upload(path, body)
        elif path.startswith("/api/models/"):
            self._model_api(path.removeprefix("/api/models/").strip("/").split("/"))
        elif path.startswith("/api/datasets/"):
            self._api(path.removeprefix("/api/datasets/").strip("/").split("/"), body)
        elif path.startswith("/datasets/") and "/resolve/" in path:
            name, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
            files = self._repository(name)
            if files is not None:
                self._file(files, REVISION, rest.partition("/")[2], fault)
        elif "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            if (name, revision) in self.hub.commits:
                self._file(self.hub.commits[name, revision], self.hub.shas[name, revision], file, fault)
            else:
                self._missing("RevisionNotFound")
        else:
            self._missing("EntryNotFound")

    def _repository(self, name: str) -> dict[str, bytes] | None:
        """Answers itself where there is none to look into."""
        if name in self.hub.moved:
            self._send(b"", 307, {"Location": self.path.replace(name, self.hub.moved[name])})
        elif name in self.hub.gated:
            self._send(b"", 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif name not in self.hub.repositories:
            self._send(b"", 401, {"X-Error-Code": "RepoNotFound"})  # as the hub does, lest it tell what is private
        else:
            return self.hub.repositories[name]
        return None

    def _api(self, parts: list[str], body: bytes) -> None:
        name, (what, *rest) = "/".join(parts[:2]), parts[2:] or ["info"]
        files = self._repository(name)
        if files is None:
            return
        if what == "tree":
            folder = "".join(f"{part}/" for part in rest[1:])
            recursive = "true" in parse_qs(urlsplit(self.path).query.lower()).get("recursive", [])
            self._json(_tree(files, folder, recursive))
        elif what == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            paths = [asked["paths"]] if isinstance(asked["paths"], str) else asked["paths"]
            everything = {entry["path"]: entry for entry in _tree(files, "", True)}
            self._json([everything[path] for path in paths if path in everything])
        else:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": REVISION, "private": False, "gated": False, "siblings": siblings})

    def _model_api(self, parts: list[str]) -> None:
        name, (what, *rest) = "/".join(parts[:2]), parts[2:] or ["revision"]
        branch = rest[0] if rest else "main"
        if name in self.hub.gated:
            self._send(b"", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif not any(known == name for known, _ in self.hub.commits):
            self._send(b"", 401, {"X-Error-Code": "RepoNotFound"})
        elif (name, branch) not in self.hub.commits:
            self._missing("RevisionNotFound")
        elif what == "tree":
            self._json(_tree(self.hub.commits[name, branch], "", True))
        else:
            siblings = [{"rfilename": path} for path in self.hub.commits[name, branch]]
            self._json({"id": name, "sha": self.hub.shas[name, branch], "private": False, "siblings": siblings})

    def _upload(self, path: str, body: bytes) -> None:
        """Repositories made, branches, files sent ahead, commits; as `huggingface_hub.HfApi.create_commit` asks."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):
            self.hub.large[path.removeprefix("/lfs/")] = body
            self._json({})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif token not in self.hub.tokens:
            self._send(b"", 401, {"X-Error-Message": "Invalid credentials"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            exists = name in self.hub.private
            self.hub.private.setdefault(name, asked.get("visibility") == "private")
            if not exists:
                self.hub.commit(name, "main", {})
            self._json({"url": f"{self.hub.url}/{name}"}, 409 if exists else 200)
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        else:
            owner, model, what, branch = path.removeprefix("/api/models/").split("/", 3)
            self._change(f"{owner}/{model}", what, branch, body)

    def _change(self, name: str, what: str, branch: str, body: bytes) -> None:
        if what == "branch":
            self.hub.commit(name, branch, self.hub.commits[name, "main"])
            self._json({})
        elif what == "preupload":
            modes = {True: "lfs", False: "regular"}
            files = json.loads(body)["files"]
            answers = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
            self._json({"files": answers})
        else:
            held = dict(self.hub.commits[name, branch])
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    held[value["path"]] = self.hub.large[value["oid"]]
            sha = self.hub.commit(name, branch, held)
            self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _file(self, files: dict[str, bytes], sha: str, path: str, fault: Fault | None) -> None:
        if path not in files:
            self._missing("EntryNotFound")
            return
        content, status = files[path], 200
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_hash(content)}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {first}-{last or len(content) - 1}/{len(content)}"
            content, status = content[int(first) : int(last) + 1 if last else None], 206
        self._send(b"" if fault and fault.empty else content, status, headers, fault)

    def _missing(self, code: str) -> None:
        self._send(b"", 404, {"X-Error-Code": code})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.cut is not None:
            self.wfile.write(content[: fault.cut])
            self.close_connection = True
            return
        if fault and fault.stall is not None:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            time.sleep(fault.stall)
            self.close_connection = True
            return
        self.wfile.write(content)
        self.hub.sent += len(content)


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    inside = [path for path in sorted(files) if path.startswith(folder)]
    entries = [
        {"type": "file", "path": path, "size": len(files[path]), "oid": _hash(files[path])[:40]}
        for path in inside
        if recursive or "/" not in path[len(folder) :]
    ]
    folders = {
        path[: place + 1 + len(folder)].rstrip("/")
        for path in inside
        for place, letter in enumerate(path[len(folder) :])
        if letter == "/" and (recursive or place == path[len(folder) :].index("/"))
    }
    return entries + [{"type": "directory", "path": path, "oid": _hash(path.encode())[:40]} for path in sorted(folders)]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
