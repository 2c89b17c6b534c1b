"""The hub's API as far as a download needs it, on loopback; and its cache's layout, by hand."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """A model on the hub: its files, and what one must have to see them."""

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main", COMMIT)
    token: str | None = None
    gated: bool = False


@dataclass
class Hub:
    """A server with some repositories; `asked` are the requests that it has had."""

    repositories: dict[str, Repository]
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Names of the files whose contents were asked for."""
        return sorted(a.rpartition(f"{COMMIT}/")[2] for a in self.asked if a.startswith("GET /org"))


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve the repositories while the block runs."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def refuse(self, status: int, code: str) -> None:
            self.reply(b"{}", status, {"X-Error-Code": code})

        def reply(self, body: bytes, status: int = 200, headers: dict | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **(headers or {})}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.removeprefix("/api/models").strip("/").split("/")
            name, action, rest = "/".join(parts[:2]), parts[2:3], parts[3:]
            repository = hub.repositories.get(name)
            given = self.headers.get("Authorization")
            if repository is None or (repository.token and given != f"Bearer {repository.token}"):
                self.refuse(401, "RepoNotFound")
                return
            revision = rest[0] if rest else "main"
            if revision not in repository.revisions:
                self.refuse(404, "RevisionNotFound")
            elif action == ["tree"]:
                tree = [
                    {"type": "file", "path": file, "size": len(data), "oid": _id(data)}
                    for file, data in repository.files.items()
                ]
                self.reply(json.dumps(tree).encode(), headers={"Content-Type": "application/json"})
            elif action != ["resolve"]:
                about = {"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": []}
                self.reply(json.dumps(about).encode(), headers={"Content-Type": "application/json"})
            elif repository.gated:
                self.refuse(403, "GatedRepo")
            elif (file := "/".join(rest[1:])) in repository.files:
                data = repository.files[file]
                self.reply(data, headers={"ETag": f'"{_id(data)}"', "X-Repo-Commit": COMMIT})
            else:
                self.refuse(404, "EntryNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _id(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def write_cache(cache: Path, name: str, model: Path, commit: str = COMMIT) -> Path:
    """Put a model directory into a cache as the hub's client lays it out; return the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for file in model.iterdir():
        blob = repository / "blobs" / _id(file.read_bytes())
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot
