"""A stand-in for the Hugging Face Hub on this machine: its listing of a repository, and its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "fedcba9876543210fedcba9876543210fedcba98"


class LocalHub:
    """Serves folders as repositories of one commit.

    Attributes:
        repositories: Folders by "org/name".
        branches: Commits by branch.
        gated: Repositories whose files only `token` may read.
        token: What must be sent for those.
        asked: What was asked for, in order.
        address: Where it is, once it runs.
    """

    def __init__(self, **repositories: Path) -> None:
        self.repositories = {f"org/{name}": folder for name, folder in repositories.items()}
        self.branches = {"main": COMMIT, "v1": COMMIT}
        self.gated: set[str] = set()
        self.token = "hf_right"
        self.asked: list[str] = []
        self.address = ""

    def answer(self, path: str, authorised: bool) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        words = [unquote(word) for word in urlsplit(path).path.strip("/").split("/")]
        is_listing = words[:2] == ["api", "models"]
        words = words[2:] if is_listing else words
        name, kind, revision = "/".join(words[:2]), words[2:3], "/".join(words[3:4])
        if name not in self.repositories:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        folder, commit = self.repositories[name], self.branches.get(revision, revision)
        if commit not in self.branches.values():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if is_listing and kind == ["revision"]:
            return 200, {}, json.dumps({"id": name, "sha": commit}).encode()
        if is_listing:
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _digest(file)[:40]}
                for file in sorted(folder.iterdir())
            ]
            return 200, {}, json.dumps(entries).encode()
        if name in self.gated and not authorised:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        file = folder / words[-1]
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{_digest(file)}"'}, file.read_bytes()

    @contextlib.contextmanager
    def running(self) -> Iterator[LocalHub]:
        """Serves as long as the context lasts."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, headers, body = hub.answer(self.path, token == hub.token)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def point_at(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path, offline: bool = False) -> None:
    """Has the library, which is imported already, use another Hub and another cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
