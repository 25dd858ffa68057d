"""Servers that sources are read from in tests: a web server with faults to order, and a hub that speaks the hub's API."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" * 6 + "c0de"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Asked:
    """One request that came."""

    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Web:
    """Serves `files` by path, with ETags and ranges.

    Attributes:
        token: what a request must bear for paths that begin with `private`.
        cut: how many bytes of the next bodies are sent before the connection is broken.
        busy: how many of the next requests are answered with 503.
        redirects: path -> where it leads.
        hang: seconds to wait in the middle of a body.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    token: str = ""
    private: str = "/private"
    cut: list[int] = field(default_factory=list)
    busy: int = 0
    redirects: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    ranges: bool = True
    tags: bool = True
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def put(self, folder: Path, at: str) -> None:
        for path in folder.iterdir():
            self.files[f"{at}/{path.name}"] = path.read_bytes()

    def bodies(self, end: str = "") -> list[Asked]:
        """The GET requests for paths that end so."""
        return [each for each in self.asked if each.method == "GET" and each.path.endswith(end)]

    def tag(self, content: bytes) -> str:
        return f'"{hashlib.md5(content).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        web, path = self.web, self.path.partition("?")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        web.asked.append(Asked(self.command, self.path, headers))
        if web.busy:
            web.busy -= 1
            return self._say(503, {"retry-after": "0"})
        if path in web.redirects:
            return self._say(302, {"location": web.redirects[path]})
        if path.startswith(web.private) and headers.get("authorization") != f"Bearer {web.token}":
            return self._say(401 if "authorization" not in headers else 403)
        if path not in web.files:
            return self._say(404)
        self._send(web.files[path], headers)

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        web, tag, start = self.web, self.web.tag(content), 0
        if headers.get("if-match", tag) != tag:
            return self._say(412)
        said = {"etag": tag} if web.tags else {}
        if web.ranges and "range" in headers and headers.get("if-range", tag) == tag:
            start = int(headers["range"].removeprefix("bytes=").partition("-")[0])
            said["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        end = web.cut.pop(0) if web.cut and self.command == "GET" and len(body) > web.cut[0] else len(body)
        self._say(206 if "content-range" in said else 200, {**said, "content-length": str(len(body))}, body[:end])
        if end < len(body):
            self.close_connection = True

    def _say(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"content-length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2])
            if self.web.hang and len(body) > 1000:
                self.wfile.flush()
                time.sleep(self.web.hang)
            self.wfile.write(body[len(body) // 2 :])


@contextmanager
def serving(web: Web, host: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[Web]:
    handler = type("Handler", (_Handler,), {"web": web})
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    web.url = f"{'https' if certificate else 'http'}://{host}:{server.server_port}"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield web
    server.shutdown()
    server.server_close()


@dataclass
class Hub(Web):
    """Serves repositories as the hub does: what is in them, and files by commit; gated ones are seen and not read."""

    gated: set[str] = field(default_factory=set)

    def put_repo(self, repo: str, folder: Path, commit: str = COMMIT, revision: str = "main") -> None:
        siblings = []
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            sha = hashlib.sha256(content).hexdigest()
            large = {"lfs": {"sha256": sha, "oid": sha, "size": len(content), "pointerSize": 134}}
            each = {"rfilename": path.name, "size": len(content), "blobId": sha[:40]}
            siblings.append({**each, **(large if path.suffix == ".safetensors" else {})})
            # Large files lie elsewhere, as with the real hub.
            at = f"/{repo}/resolve/{commit}/{path.name}"
            if path.suffix == ".safetensors" and repo not in self.gated:
                self.files[f"/cdn/{sha}"] = content
                self.redirects[at] = f"/cdn/{sha}"
            elif repo in self.gated:
                self.files[f"{self.private}{at}"] = content
            else:
                self.files[at] = content
        info = {"id": repo, "modelId": repo, "sha": commit, "private": False, "tags": [], "siblings": siblings}
        api = json.dumps(info).encode()
        self.files[f"/api/models/{repo}"] = api
        for name in (revision, commit):
            self.files[f"/api/models/{repo}/revision/{name}"] = api


@contextmanager
def hub_serving(hub: Hub) -> Iterator[Hub]:
    with serving(hub):
        yield hub
