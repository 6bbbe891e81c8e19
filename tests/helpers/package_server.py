"""A package index on this machine that has one archive."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator

from hotlap.common import package_archive
from hotlap.common.download import Content
from hotlap.common.package_archive import PackageArchive


def tar_archive(members: dict[str, str]) -> bytes:
    """A .tar.gz of text files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def zip_archive(members: dict[str, bytes]) -> bytes:
    """A .zip, or wheel, of files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@contextlib.contextmanager
def serving(module, sent: bytes, patch, cache) -> Iterator[http.server.ThreadingHTTPServer]:
    """Let module.ARCHIVE be these bytes, served by a loopback index; `server.sent` may be changed afterwards.

    cache: the folder for downloads.
    """
    archive: PackageArchive = module.ARCHIVE

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = f'<a href="../../files/{archive.name}#sha256=0">x</a>'.encode()
            body = page if self.path == f"/simple/{archive.package}/" else server.sent
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) if body is page else server.announced))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.sent, server.announced = sent, len(sent)
    content = Content(len(sent), hashlib.sha256(sent).hexdigest())
    patch.setattr(module, "ARCHIVE", archive._replace(content=content))
    patch.setattr(package_archive, "package_index", lambda: f"http://127.0.0.1:{server.server_port}/simple")
    patch.setenv("XDG_CACHE_HOME", str(cache))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        patch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
