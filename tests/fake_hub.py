"""A Hugging Face hub of a few repositories on this machine, as its client sees it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Repositories = dict[str, dict[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def repositories(self) -> Repositories:
        return self.server.repositories

    def answer(self, content, *, code=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what):
        self.answer(
            {"error": f"{what} not found"}, code=404, headers={"X-Error-Code": what}
        )

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        path = urlsplit(self.path).path
        self.server.requests.append(("POST", path))
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(x for x in (asked.get("organization"), asked["name"]) if x)
            if name.startswith("forbidden/"):
                self.answer({"error": "not yours"}, code=403)
                return
            code = 409 if name in self.repositories else 200
            self.repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}", "name": name}, code=code)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": "regular",
                            "shouldIgnore": False,
                        }
                        for f in asked
                    ]
                }
            )
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    content = base64.b64decode(item["value"]["content"])
                    self.repositories[name][item["value"]["path"]] = content
            self.answer(
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}",
                    "hookOutput": "",
                }
            )
        else:
            self.missing("EntryNotFound")

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.requests.append((self.command, path))
        if path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.repositories:
                self.missing("RepoNotFound")
                return
            siblings = [{"rfilename": f} for f in self.repositories[name]]
            self.answer(
                {"id": name, "sha": "0" * 40, "private": False, "siblings": siblings}
            )
            return
        owner, name, resolve, _, *rest = path.lstrip("/").split("/")
        repository = self.repositories.get(f"{owner}/{name}")
        if repository is None or resolve != "resolve":
            self.missing("RepoNotFound")
            return
        content = repository.get("/".join(rest))
        if content is None:
            self.missing("EntryNotFound")
            return
        self.answer(
            content,
            headers={
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": "0" * 40,
                "Content-Length": str(len(content)),
            },
        )

    do_HEAD = do_GET


@contextlib.contextmanager
def running() -> Iterator[ThreadingHTTPServer]:
    """Serve empty repositories; yields the server, with its url and its contents."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repositories = {}
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
