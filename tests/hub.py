"""A hub on this machine: the few addresses that `huggingface_hub` and `datasets` ask for when they read a data set."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = {"main": "a" * 40, "v1": "b" * 40}
"""Each revision is a commit of its own; the files of `v1` are those of `VERSION_1`."""


class Hub(ThreadingHTTPServer):
    """`sets`: name -> commit -> path -> content. `gated`: names whose files are refused. Counts what was asked."""

    def __init__(self, sets: dict[str, dict[str, dict[str, bytes]]], gated: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.sets, self.gated = sets, gated

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(sets: dict[str, dict[str, dict[str, bytes]]], gated: set[str]) -> Iterator[Hub]:
    """The hub, while the block runs."""
    hub = Hub(sets, gated)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[is_api + 1 : is_api + 3])
        if name not in self.server.sets:
            return self._refuse(401, "RepoNotFound")
        commits = self.server.sets[name]
        what, revision, *path = [*parts[is_api + 3 :], "revision", "main"][:2] + parts[is_api + 5 :]
        commit = COMMIT.get(revision, revision)
        if commit not in commits:
            return self._refuse(404, "RevisionNotFound")
        if what == "resolve":
            return self._file(name, commit, "/".join(path))
        files = commits[commit]
        if what == "tree":
            return self._json(_entries(files, "/".join(path)))
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _file(self, name: str, commit: str, path: str) -> None:
        content = self.server.sets[name][commit].get(path)
        if name in self.server.gated:
            return self._refuse(403, "GatedRepo")
        if content is None:
            return self._refuse(404, "EntryNotFound")
        return self._send(200, content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": commit})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _entries(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What stands in a folder itself."""
    start = f"{folder}/" if folder else ""
    inside = {path.removeprefix(start): content for path, content in files.items() if path.startswith(start)}
    folders = {path.split("/")[0] for path in inside if "/" in path}
    entries: list[dict[str, Any]] = [
        {"type": "file", "path": start + path, "size": len(content), "oid": _digest(content)}
        for path, content in inside.items()
        if "/" not in path
    ]
    return entries + [{"type": "directory", "path": start + path, "oid": _digest(path.encode())} for path in folders]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
