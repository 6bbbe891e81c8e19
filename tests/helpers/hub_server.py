"""A server on this machine that speaks the Hugging Face hub's protocol for files, and fails when told to."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate

RESOLVE = re.compile(r"/datasets/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class HubServer(http.server.ThreadingHTTPServer):
    """Serves `files`, by repository, revision and name, as the hub serves files in LFS: HEAD of a resolve URL
    states commit, size and sha256 and redirects to the storage, which is on another host, and from which GET
    sends the whole or a range.

    faults: for a name, what to do instead at the next requests for its bytes: a status, `drop` (half of it,
    then the connection ends), `short` (half of it, announced as all), `flip` (a wrong bit), `html` (200 and a
    page), `stall` (half of it, then silence), `long` (without an end).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.plain: dict[str, bytes] = {}  # by path, without the hub's protocol
        self.faults: dict[str, deque] = {}
        self.head_faults: dict[str, deque] = {}
        self.stated: dict[str, tuple[int, str]] = {}  # what HEAD says instead of the truth
        self.requests: list[tuple[str, str, str | None, str | None]] = []  # method, name, range, token
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, dataset, name: str, raw: bytes) -> None:
        self.files[dataset.repo, dataset.revision, name] = raw

    def fail(self, name: str, *faults) -> None:
        self.faults[name] = deque(faults)

    def fetched(self) -> Counter:
        """How often the bytes of each file were asked for."""
        return Counter(name for method, name, *_ in self.requests if method == "GET" and name[0] != "/")


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self):
        match = RESOLVE.fullmatch(self.path)
        repo, revision, name = match.groups() if match else ("", "", self.path)
        self.note(name)
        raw = self.server.files.get((repo, revision, name))
        if faults := self.server.head_faults.get(name):
            return self.send(faults.popleft(), b"")
        if raw is None:
            known = any(key[:2] == (repo, revision) for key in self.server.files)
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})
        size, sha256 = self.server.stated.get(name, (len(raw), hashlib.sha256(raw).hexdigest()))
        headers = {
            "X-Repo-Commit": revision,
            "X-Linked-Size": str(size),
            "X-Linked-Etag": f'"{sha256}"',
            "ETag": f'"{hashlib.sha1(raw).hexdigest()}"',
            "Location": f"http://localhost:{self.server.server_port}/storage/{repo}/{revision}/{name}",
        }
        return self.send(302, b"", headers)

    def do_GET(self):
        if self.path.startswith("/storage/"):
            owner, repo, revision, name = self.path.removeprefix("/storage/").split("/", 3)
            raw = self.server.files.get((f"{owner}/{repo}", revision, name))
        else:
            name = self.path
            raw = self.server.plain.get(name)
        self.note(name)
        if raw is None:
            return self.send(404, b"")
        faults = self.server.faults.get(name)
        fault = faults.popleft() if faults else None
        if isinstance(fault, int):
            return self.send(fault, b"not now", {"Retry-After": "0"})
        if fault == "html":
            return self.send(200, b"<html>please log in</html>")
        if fault == "flip":
            raw = raw[:-1] + bytes([raw[-1] ^ 1])
        return self.send_part(raw, fault)

    def send_part(self, raw: bytes, fault: str | None) -> None:
        """The body, or the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        if start >= len(raw):
            return self.send(416, b"")
        body = raw[start:]
        headers = {"Content-Range": f"bytes {start}-{len(raw) - 1}/{len(raw)}"} if asked else {}
        status = 206 if asked else 200
        if fault == "short":
            return self.send(status, body[: len(body) // 2], headers)
        if fault == "long":
            return self.send_endless(body)
        if fault in ("drop", "stall"):
            self.start(status, len(body), headers)
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.released.wait(30)
            self.close_connection = True
            return None
        return self.send(status, body, headers)

    def send_endless(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            while not self.server.released.is_set():
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
        except OSError:  # the client has had enough
            return

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.start(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def start(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        self.send_header("Date", formatdate(usegmt=True))
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def note(self, name: str) -> None:
        self.server.requests.append(
            (self.command, name, self.headers.get("Range"), self.headers.get("Authorization"))
        )

    def log_message(self, *arguments):
        pass


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
