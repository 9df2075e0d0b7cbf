"""A stand-in for the hub: the endpoints that uploading a folder, and downloading one, call."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"


class Hub(ThreadingHTTPServer):
    """Keeps what was sent, and gives out folders.

    Args:
        models: Repository name to the folder it stands for.

    Attributes:
        created: Bodies of the create calls.
        commits: (repository, message, {path: bytes}) in order of arrival.
        tokens: Authorization headers seen.
        asked: Paths of the GET and HEAD requests, in order of arrival.
    """

    def __init__(self, models: Mapping[str, Path] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = dict(models or {})
        self.asked: list[str] = []
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
        path = self.path.split("?")[0].strip("/")
        self.server.asked.append(path)
        kind, _, rest = path.partition("/models/")
        name, folder, rest = self._find(rest if kind == "api" else path)
        if folder is None:
            self.send_error(404)
        elif rest.startswith("tree/"):
            files = sorted(folder.iterdir())
            self._answer([{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files])
        elif rest.startswith("resolve/"):
            self._send(folder / rest.split("/")[-1])
        else:
            self._answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in folder.iterdir()]})

    do_HEAD = do_GET

    def _find(self, path: str) -> tuple[str, Path | None, str]:
        """Repository name, its folder and what follows in a path."""
        name = "/".join(path.split("/")[:2])
        return name, self.server.models.get(name), path[len(name) + 1 :]

    def _send(self, file: Path) -> None:
        if not file.is_file():
            self.send_error(404)
            return
        body = file.read_bytes()
        self._answer_bytes(body, {"ETag": f'"{sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _answer(self, content: object) -> None:
        self._answer_bytes(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer_bytes(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None: ...


@contextmanager
def serve(models: Mapping[str, Path] | None = None) -> Iterator[Hub]:
    """A running hub that gives out ``models``."""
    hub = Hub(models)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
