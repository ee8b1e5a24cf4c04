"""A stand-in for the Hub on a loopback port: the addresses that huggingface_hub asks for, over folders of a test.

    with HubStandIn({"owner/name": {"main": folder}}) as hub:
        take_for_the_hub(hub, tmp_path / "cache", monkeypatch)  # or, for other processes, HF_ENDPOINT=hub.url

A repository's commits are hashes of its revisions' names, where `commits` does not say otherwise. Names in `gated`
and `broken` answer with 403 and 500.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants as hub_constants
import pytest

Repositories = Mapping[str, Mapping[str, Path]]


def commit_of(repo: str, revision: str) -> str:
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


class HubStandIn:
    """Serves until the context ends."""

    def __init__(self, repositories: Repositories) -> None:
        self.repositories = {repo: dict(revisions) for repo, revisions in repositories.items()}
        self.commits: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    @property
    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in alphabetical order."""
        return sorted(
            line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line
        )

    def find(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """The commit that a branch or a commit names, and its folder."""
        for name, folder in self.repositories[repo].items():
            commit = self.commits.get((repo, name), commit_of(repo, name))
            if revision in (name, commit):
                return commit, folder
        return None


def take_for_the_hub(hub: HubStandIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub, which has read the environment long ago, asks the stand-in and keeps its files in `cache`."""
    monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization", ""))
            api = path.startswith("/api/models/")
            words = path.removeprefix("/api/models/").strip("/")
            verbs = ("revision", "tree") if api else ("resolve",)
            repo, verb, rest = next(
                (
                    (before, verb, after)
                    for verb in verbs
                    for before, mark, after in [words.partition(f"/{verb}/")]
                    if mark
                ),
                (words, "revision", "main"),
            )
            if repo not in hub.repositories:
                return self._refuse(404, "RepoNotFound")
            if repo in hub.broken:
                return self._refuse(500, "")
            if repo in hub.gated:
                return self._refuse(403, "GatedRepo")
            revision, _, file = rest.partition("/") if verb == "resolve" else (rest, "", "")
            found = hub.find(repo, revision)
            if found is None:
                return self._refuse(404, "RevisionNotFound")
            commit, folder = found
            if verb == "revision":
                return self._json(_description(repo, commit, folder))
            if verb == "tree":
                return self._json(_tree(folder))
            return self._file(commit, folder / file)

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code} if code else {})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _file(self, commit: str, path: Path) -> None:
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            content = path.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _description(repo: str, commit: str, folder: Path) -> dict[str, object]:
    siblings = [{"rfilename": name} for name in _files(folder)]
    return {"id": repo, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}


def _tree(folder: Path) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for name in _files(folder):
        content = (folder / name).read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        entries.append({"type": "file", "path": name, "size": len(content), "oid": oid})
    return entries
