"""A hub in a thread: what huggingface_hub asks for when it makes, fills, lists and reads a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

Repos = dict[str, dict[str, bytes]]  # "owner/name" -> path -> content
LARGE = re.compile(r".*\.(safetensors|npz|pt)")  # kept apart, under their sha256, behind a redirect


def _sha(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def _as_large(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, object]:
    report: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": _sha({"": content})}
    if LARGE.fullmatch(name):
        report["lfs"] = {"sha256": _as_large(content), "size": len(content), "pointerSize": 130}
    return report


@contextmanager
def hub(
    repos: Repos,
    closed: Collection[str] = (),
    secret: Collection[str] = (),
    faults: dict[str, list[object]] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Serves `repos`, which pushes change. Yields the address and a growing log of "METHOD /path" lines.

    Args:
        repos: what is there.
        closed: names of repositories behind terms that nobody has accepted.
        secret: names of those that answer 401.
        faults: what goes wrong, by the end of a path, one after the other and then nothing more. A number: that many
            bytes come, then the connection drops. "wrong": as many other bytes. "busy": 429, for one second. "broken":
            500. "short": a complete answer with half of the content. (bytes, seconds): all, so many bytes at a time.
    """
    log: list[str] = []
    faults = {} if faults is None else faults
    put: dict[str, bytes] = {}  # what was uploaded apart, by its sha256

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass  # not on the test's stderr

        def _head(self, status: int, length: int, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()

        def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
            self._head(status, len(body), **headers)
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), Content_Type="application/json")

        def _missing(self, what: str) -> None:
            self._send(404 if what != "GatedRepo" else 403, b"{}", X_Error_Code=what)

        def _repo(self, name: str) -> dict[str, bytes] | None:
            if name in secret:
                self._send(401, b"{}")
            elif name in closed:
                self._missing("GatedRepo")
            elif name not in repos:
                self._missing("RepoNotFound")
            return None if name in closed or name in secret else repos.get(name)

        def _fault(self, path: str) -> object:
            if self.command == "HEAD":
                return None
            return next((kinds.pop(0) for end, kinds in faults.items() if path.endswith(end) and kinds), None)

        def _content(self, content: bytes, path: str, **headers: str) -> None:
            """A file, or the rest of it, or what `faults` makes of it."""
            fault, whole = self._fault(path), len(content)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            first, status = (int(asked[1]), 206) if asked else (0, 200)
            content = content[first : int(asked[2]) + 1 if asked and asked[2] else None]
            if asked:
                log.append(f"from {first}")
                headers["Content_Range"] = f"bytes {first}-{first + len(content) - 1}/{whole}"
            if fault == "busy":
                self._send(429, b"{}", Retry_After="1")
            elif fault == "broken":
                self._send(500, b"{}")
            elif fault == "wrong":
                self._send(status, bytes(byte ^ 1 for byte in content), **headers)
            elif fault == "short":
                self._send(status, content[: len(content) // 2], **headers)
            elif isinstance(fault, tuple):
                self._slowly(status, content, *fault, **headers)
            elif isinstance(fault, int):
                self._head(status, len(content), **headers)
                self.wfile.write(content[:fault])
                self.close_connection = True
            else:
                self._send(status, content, **headers)

        def _slowly(self, status: int, content: bytes, step: int, seconds: float, **headers: str) -> None:
            self._head(status, len(content), **headers)
            log.append("slowly")
            try:
                for first in range(0, len(content), step):
                    self.wfile.write(content[first : first + step])
                    time.sleep(seconds)
            except OSError:  # who asked went away
                log.append("hung up")
                self.close_connection = True

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
                elif self._fault(path) == "busy":
                    self._send(429, b"{}", Retry_After="1")
                else:
                    siblings = [_sibling(name, content) for name, content in files.items()]
                    self._json({"id": "/".join(parts[2:4]), "sha": _sha(files), "siblings": siblings, "private": False})
            elif parts[2:3] == ["resolve"]:
                files = self._repo("/".join(parts[:2]))
                if files is None:
                    return
                content = files.get("/".join(parts[4:]))
                if content is None:
                    self._missing("EntryNotFound")
                elif LARGE.fullmatch(path):
                    # Another host than the hub's, as it is: its client follows no redirect on the same one.
                    apart = f"http://localhost:{server.server_port}/apart{path}"
                    report = {"X_Linked_Etag": f'"{_as_large(content)}"', "X_Linked_Size": str(len(content))}
                    self._send(302, b"", Location=apart, X_Repo_Commit=_sha(files), **report)
                else:
                    self._content(content, path, ETag=f'"{_sha({"": content})}"', X_Repo_Commit=_sha(files))
            elif parts[:1] == ["apart"]:
                content = repos["/".join(parts[1:3])]["/".join(parts[5:])]
                self._content(content, path, ETag=f'"{_as_large(content)}"', Accept_Ranges="bytes")
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
                mode = {True: "lfs", False: "regular"}
                report = [
                    {"path": f["path"], "uploadMode": mode[bool(LARGE.fullmatch(f["path"]))], "shouldIgnore": False}
                    for f in asked
                ]
                self._json({"files": report})
            elif parts[-3:] == ["lfs", "objects", "batch"]:
                upload = f"http://{self.headers['Host']}/put/"
                self._json(
                    {
                        "transfer": "basic",
                        "objects": [
                            {
                                "oid": one["oid"],
                                "size": one["size"],
                                "actions": {"upload": {"href": upload + one["oid"]}},
                            }
                            for one in json.loads(body)["objects"]
                        ],
                    }
                )
            elif parts[4:5] == ["commit"]:
                name = "/".join(parts[2:4])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        repos[name][line["value"]["path"]] = put[line["value"]["oid"]]
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

        def do_PUT(self) -> None:
            log.append(f"PUT {self.path}")
            content = self.rfile.read(int(self.headers["Content-Length"]))
            put[_as_large(content)] = content
            self._send(200)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
