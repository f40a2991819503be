"""A stand-in for the Hugging Face hub on this machine, and the folders that its programs keep, without a network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
OTHER_COMMIT = "e7da7f221d5bf496a48136c0cd264e630fe9fcc8"


def write_hub_cache(
    cache: Path, name: str, files: Mapping[str, bytes], commit: str = COMMIT, reference: str = "main"
) -> Path:
    """Write ``files`` as the hub's library keeps them, links from the commit to blobs included; return their folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / reference).write_text(commit)
    for file, content in files.items():
        blob = repository / "blobs" / hashlib.sha1(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Hub:
    """What the stand-in holds, and what it was asked for.

    Attributes:
        url: its address, for ``HF_ENDPOINT``.
        files: (name of a repository, commit) -> its files.
        branches: (name of a repository, branch or tag) -> commit.
        asked: path of each request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.asked: list[str] = []

    def add(self, name: str, files: Mapping[str, bytes], commit: str = COMMIT, branch: str = "main") -> None:
        self.files[name, commit] = dict(files)
        self.branches[name, branch] = commit

    def commit(self, name: str, revision: str) -> str | None:
        return self.branches.get((name, revision), revision if (name, revision) in self.files else None)


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a hub over HTTP on this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *values: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(send_body=False)

        def do_GET(self) -> None:
            self.answer(send_body=True)

        def answer(self, *, send_body: bool) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            hub.asked.append(path)
            headers, body, status = self.find(path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if send_body:
                self.wfile.write(body)

        def find(self, path: str) -> tuple[dict[str, str], bytes, int]:
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                return self.describe("/".join(parts[2:4]), parts[4:])
            name, commit = "/".join(parts[:2]), parts[3] if len(parts) > 3 else ""
            content = hub.files.get((name, hub.commit(name, commit) or ""), {}).get("/".join(parts[4:]))
            if content is None:
                return {"X-Error-Code": "EntryNotFound"}, b"", 404
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            return headers, content, 200

        def describe(self, name: str, rest: list[str]) -> tuple[dict[str, str], bytes, int]:
            if not any(known == name for known, _ in hub.branches):
                return {"X-Error-Code": "RepoNotFound"}, b"{}", 404
            commit = hub.commit(name, rest[1] if len(rest) > 1 else "main")
            if commit is None:
                return {"X-Error-Code": "RevisionNotFound"}, b"{}", 404
            found = hub.files[name, commit]
            if rest[:1] == ["tree"]:
                listed: object = [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in found.items()
                ]
            else:
                listed = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in found]}
            return {"Content-Type": "application/json"}, json.dumps(listed).encode(), 200

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
