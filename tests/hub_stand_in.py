"""A hub in a thread: what huggingface_hub asks for when it makes, fills, lists and reads a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

Repos = dict[str, dict[str, bytes]]  # "owner/name" -> path -> content


def _sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextmanager
def hub(repos: Repos, closed: frozenset[str] = frozenset()) -> Iterator[tuple[str, list[str]]]:
    """Serves `repos`, which pushes change. Yields the address and a growing log of "METHOD /path" lines.

    Args:
        repos: what is there.
        closed: names of repositories behind terms that nobody has accepted.
    """
    log: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass  # not on the test's stderr

        def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), Content_Type="application/json")

        def _missing(self, what: str) -> None:
            self._send(404 if what != "GatedRepo" else 403, b"{}", X_Error_Code=what)

        def _repo(self, name: str) -> dict[str, bytes] | None:
            if name in closed:
                self._missing("GatedRepo")
            elif name not in repos:
                self._missing("RepoNotFound")
            return None if name in closed else repos.get(name)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            log.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                files = self._repo("/".join(parts[2:4]))
                if files is None:
                    return
                if parts[4:5] in (["revision"], ["tree"]) and parts[5] not in ("main", _sha(files)):
                    self._missing("RevisionNotFound")
                elif parts[4:5] == ["tree"]:
                    self._json(
                        [{"type": "file", "oid": _sha({n: c}), "size": len(c), "path": n} for n, c in files.items()]
                    )
                else:
                    siblings = [{"rfilename": name} for name in files]
                    self._json({"id": "/".join(parts[2:4]), "sha": _sha(files), "siblings": siblings, "private": False})
            elif parts[2:3] == ["resolve"]:
                files = self._repo("/".join(parts[:2]))
                if files is None:
                    return
                content = files.get("/".join(parts[4:]))
                if content is None:
                    self._missing("EntryNotFound")
                else:
                    self._send(200, content, ETag=f'"{_sha({"": content})}"', X_Repo_Commit=_sha(files))
            else:
                self._send(404)

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            log.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                # Newer clients say "visibility", older ones "private".
                log.append("private" if asked.get("private") or asked.get("visibility") == "private" else "public")
                repos.setdefault(name, {})
                self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
            elif path == "/api/validate-yaml":
                self._json({"warnings": [], "errors": []})
            elif parts[4:5] == ["preupload"]:
                asked = json.loads(body)["files"]
                self._json(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
                )
            elif parts[4:5] == ["commit"]:
                name = "/".join(parts[2:4])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                oid = _sha(repos[name])
                self._json(
                    {
                        "success": True,
                        "commitOid": oid,
                        "commitUrl": f"http://{self.headers['Host']}/{name}/commit/{oid}",
                    }
                )
            else:
                self._send(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
