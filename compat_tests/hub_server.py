"""A stand-in for the hub: the four endpoints that creating a repository and uploading a folder call."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Keeps what was sent.

    Attributes:
        created: Bodies of the create calls.
        commits: (repository, message, {path: bytes}) in order of arrival.
        tokens: Authorization headers seen.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[dict] = []
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.strip("/").split("/")
        if parts[:3] == ["api", "repos", "create"]:
            request = json.loads(body)
            self.server.created.append(request)
            owner = request.get("organization") or "me"
            self._answer({"url": f"{self.server.url}/{owner}/{request['name']}"})
        elif "preupload" in parts:
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif "commit" in parts:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            repository = "/".join(parts[2:4])
            self.server.commits.append((repository, lines[0]["value"]["summary"], files))
            oid = f"{len(self.server.commits):040d}"
            self._answer({"commitUrl": f"{self.server.url}/{repository}/commit/{oid}", "commitOid": oid})
        else:
            self._answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.send_error(404)

    def _answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None: ...


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
