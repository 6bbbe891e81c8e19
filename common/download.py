"""What downloads share: checking contents and disk space, retrying, resuming, and unpacking untrusted
archives.
"""

from __future__ import annotations

import errno
import importlib
import re
import shutil
import stat
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple, TypeVar

from hotlap.common.errors import DataError
from hotlap.common.files import file_sha256
from hotlap.common.log import log

T = TypeVar("T")
WAITS = (1, 4, 15)  # seconds before each retry
SPARE = 1 << 28  # bytes that stay free on the disk
TIMEOUT = 30  # seconds without a byte
LOCK = ".download.lock"


class Content(NamedTuple):
    """Size and sha256 of a file; None if unknown."""

    bytes: int
    sha256: str | None

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes" + (f" and sha256 {self.sha256[:12]}..." if self.sha256 else "")


def check_content(path: Path, content: Content) -> str:
    """The sha256 of a file. DataError if it or the size differs from content."""
    found = Content(path.stat().st_size, None)
    if found.bytes == content.bytes:
        found = Content(found.bytes, file_sha256(path))
        if content.sha256 in (None, found.sha256):
            return found.sha256
    raise DataError(f"{path} has {found}, not {content}")


def data_package(name: str) -> ModuleType:
    """Import a package of the extra `data`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"public data needs the package {name}: pip install 'hotlap[data]'") from error


def locked(folder: Path) -> AbstractContextManager:
    """A lock that keeps other processes from downloading into a folder. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return data_package("filelock").FileLock(folder / LOCK)


def require_free_space(folder: Path, needed: int) -> None:
    """OSError with the numbers if the disk of a folder has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise OSError(
            f"{folder} needs {needed:,} bytes and {SPARE:,} to spare, but only {free:,} are free; make room, "
            "or name a folder on another disk"
        )


def persistent(action: Callable[[], T], what: str, server: str, stop: threading.Event | None = None) -> T:
    """Run action, and retry it after errors that may be transient: of the network or server once per pause in
    WAITS, damaged data once. Setting `stop` ends the retries. Raises the last error, an OSError in one line.
    """
    damaged = False
    for pause in (*WAITS, None):
        try:
            return action()
        except DataError as error:
            if damaged or pause is None:
                raise
            damaged, reason = True, str(error)
        except (OSError, HTTPException) as error:
            if pause is None or not may_pass(error) or (stop and stop.is_set()):
                raise explained(error, what, server) from error
            reason = first_line(error)
        log.warning("%s: %s; retrying in %d s", what, reason, pause)
        (stop or threading.Event()).wait(pause)
    raise AssertionError("the last attempt returns or raises")


def may_pass(error: Exception) -> bool:
    """Whether this is an error of the network or server that may be transient."""
    if status := status_of(error):
        return status in (408, 429) or status >= 500
    return not is_local(error)


def is_local(error: Exception) -> bool:
    """Whether this is an error of a local file: those have an errno and are not about a connection."""
    return bool(getattr(error, "errno", None)) and not isinstance(error, (ConnectionError, TimeoutError))


def status_of(error: Exception) -> int | None:
    """The HTTP status in an error of urllib or huggingface_hub, or in its cause."""
    for each in (error, error.__cause__):
        status = getattr(getattr(each, "response", None), "status_code", None) or getattr(each, "code", None)
        if isinstance(status, int):
            return status
    return None


def first_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) and str(error.__cause__) else error
    return next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__


def explained(error: Exception, what: str, server: str) -> Exception:
    """The error, with what to do about it."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return OSError(f"the disk is full, at {what}; make room and rerun: complete files are kept")
    if is_local(error):
        return error
    hints = {
        401: "set HF_TOKEN to a token that may read it",
        403: "set HF_TOKEN to a token that may read it",
        404: "it is not there; check the address",
    }
    hint = hints.get(
        status_of(error),
        "check the network and rerun: complete files are kept; HF_ENDPOINT may name a mirror",
    )
    return OSError(f"could not download {what} from {server} ({first_line(error)}); {hint}")


def fetch_url(url: str, path: Path, limit: int) -> None:
    """Download a URL to a file, and resume if the file has a part of it. DataError if more than `limit` bytes
    arrive.
    """
    from tqdm import tqdm

    have = path.stat().st_size if path.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the file is complete
            return
        raise
    with answer:
        have = have if answer.status == 206 else 0
        length = int(answer.headers["Content-Length"] or limit)
        bar = tqdm(total=have + length, initial=have, unit="B", unit_scale=True, desc=path.name, disable=None)
        with open(path, "ab" if have else "wb") as file, bar:
            while block := answer.read(1 << 20):
                file.write(block)
                bar.update(len(block))
                if file.tell() > limit:
                    raise DataError(f"{url} sends more than {limit:,} bytes; check the address")
    if answer.headers["Content-Length"] and path.stat().st_size < have + length:
        raise ConnectionError(
            f"the connection ended after {path.stat().st_size:,} of {have + length:,} bytes"
        )


def unpack(archive: Path, top: str, folder: Path, limit: int) -> None:
    """Unpack the folder `top` of a zip archive into a folder, completely or not at all. DataError if the
    archive is damaged, has more than `limit` bytes of files, or contains links or paths that lead elsewhere.
    """
    try:
        with zipfile.ZipFile(archive) as contents, tempfile.TemporaryDirectory(dir=folder) as part:
            members = [member for member in contents.infolist() if not member.is_dir()]
            for member in members:
                name = PurePosixPath(member.filename)
                link = stat.S_ISLNK(member.external_attr >> 16)
                if name.is_absolute() or ".." in name.parts or re.search(r"[\\:\0]", str(name)) or link:
                    raise DataError(f"{archive} wants to write {member.filename!r}, outside of its folder")
            members = [member for member in members if member.filename.startswith(f"{top}/")]
            if not members or (size := sum(member.file_size for member in members)) > limit:
                raise DataError(f"{archive} has no folder {top}, or more than {limit:,} bytes in it")
            require_free_space(folder, size)
            contents.extractall(part, members)  # reads no more of a member than its header says
            (Path(part) / top).rename(folder / top)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise DataError(f"{archive} is damaged, or not a zip archive ({error})") from error
