"""A server of data sets that speaks as much of the hub's protocol as its own clients ask for, and fails when told to.

It is named to them as `HF_ENDPOINT`. Every repository is a dictionary of file names and contents.
"""

from __future__ import annotations

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

    do_HEAD = do_POST = do_GET  # noqa: N815

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
        elif path.startswith("/api/datasets/"):
            self._api(path.removeprefix("/api/datasets/").strip("/").split("/"), body)
        elif path.startswith("/datasets/") and "/resolve/" in path:
            name, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
            self._file(name, rest.partition("/")[2], fault)
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

    def _file(self, name: str, path: str, fault: Fault | None) -> None:
        files = self._repository(name)
        if files is None:
            return
        if path not in files:
            self._missing("EntryNotFound")
            return
        content, status = files[path], 200
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{_hash(content)}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {first}-{last or len(content) - 1}/{len(content)}"
            content, status = content[int(first) : int(last) + 1 if last else None], 206
        self._send(b"" if fault and fault.empty else content, status, headers, fault)

    def _missing(self, code: str) -> None:
        self._send(b"", 404, {"X-Error-Code": code})

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

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
