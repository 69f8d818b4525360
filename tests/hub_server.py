"""A stand-in for the Hugging Face Hub's API on loopback: the requests that creating and filling a repository makes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a-token-that-no-message-may-have"


@dataclass
class Hub:
    """The state of the server. `repositories`: name → files by path; `failing`: path prefix → status to answer."""

    url: str = ""
    role: str = "write"
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    tags: dict[str, list[str]] = field(default_factory=dict)
    failing: dict[str, int] = field(default_factory=dict)
    large: tuple[str, ...] = ()
    """Endings of names that are uploaded as large files, beside the commit."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Answers requests from the state in `hub`."""

    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def answer(self, data: Any = None, status: int = 200, **headers: str) -> None:
        """Send JSON."""
        content = json.dumps(data or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def begun(self) -> tuple[str, bytes] | None:
        """The path and the body of a request; None if it has been answered with a failure."""
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        status = next((status for start, status in self.hub.failing.items() if path.startswith(start)), None)
        if status is None and self.headers.get("Authorization") != f"Bearer {TOKEN}" and self.command != "PUT":
            status = 401
        if status is not None:
            words = "Invalid credentials in Authorization header" if status == 401 else "not today"
            self.answer({"error": words}, status, X_Error_Message=words)
            return None
        return path, body

    def do_GET(self) -> None:
        """Who has the token; what is in a repository."""
        begun = self.begun()
        if begun is None:
            return
        path, name = begun[0], begun[0].removeprefix("/api/models/")
        if path == "/api/whoami-v2":
            self.answer({"name": "owner", "auth": {"accessToken": {"role": self.hub.role}}})
        elif name in self.hub.repositories:
            files = [{"rfilename": file} for file in self.hub.repositories[name]]
            known = {"id": name, "private": self.hub.private[name], "tags": self.hub.tags.get(name, [])}
            self.answer({**known, "siblings": files, "sha": "0" * 40, "downloads": 0, "likes": 0})
        else:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_PUT(self) -> None:
        """The content of a large file."""
        begun = self.begun()
        if begun is not None:
            self.hub.stored[hashlib.sha256(begun[1]).hexdigest()] = begun[1]
            self.answer()

    def do_POST(self) -> None:
        """Make a repository, check a card, say how files are uploaded, commit."""
        begun = self.begun()
        if begun is None:
            return
        path, body = begun
        if path == "/api/repos/create":
            self.created(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": self.mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.committed(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self.answer({"error": f"no such request: {path}"}, 501)

    def mode(self, name: str) -> str:
        """How a file is uploaded."""
        return "lfs" if name.endswith(self.hub.large) and self.hub.large else "regular"

    def created(self, wanted: dict[str, Any]) -> None:
        """Make a repository."""
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.answer({"error": "You already created this model repo"}, 409)
        self.hub.repositories[name] = {".gitattributes": b""}
        self.hub.private[name] = wanted.get("private", wanted.get("visibility") == "private")
        return self.answer({"url": f"{self.hub.url}/{name}"})

    def committed(self, name: str, body: bytes) -> None:
        """Add files to a repository."""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.hub.repositories[name][value["path"]] = self.hub.stored[value["oid"]]
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None})


@contextmanager
def serving() -> Iterator[Hub]:
    """A running server's state."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
