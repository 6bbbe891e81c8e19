"""`docs`: the documentation that is installed on this machine, as training text.

Manual pages, info pages, /usr/share/doc, and what `pydocs` has. Links are not followed, and nothing is run.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from hotlap.common.files import cache_folder
from hotlap.common.log import log, log_once
from hotlap.train.data.english import is_english
from hotlap.train.data.kept_lines import bare, distinct_shuffled, keep_lines, kept_lines
from hotlap.train.data.markup import html_text, info_text, plain_text
from hotlap.train.data.pydocs import python_documentation
from hotlap.train.data.roff import manual_text

RULES = 1  # counts changes of what is taken and how, so that an older version's texts are not read
SHARED = Path("/usr/share")
MANUAL = re.compile(r"man/man[1-9]\w*/[^/]+")
INFO = re.compile(r"info/[^/]+\.info(?:-\d+)?(?:\.gz)?")
TEXT = re.compile(r"doc/(?:.*/)?(?:README|[^/]+\.(?:txt|rst|md|html?))(?:\.gz)?")
NO_PROSE = re.compile(
    r"changelog|copyright|copying|licen[cs]e|authors|thanks|/news|genindex|/_sources/", re.IGNORECASE
)
LARGEST_FILE = 1 << 23  # bytes of a file, unpacked
SHORTEST = 200  # characters of a document
REPEATED = 25  # characters from which on a paragraph is taken once; headings may come again
LEAST = 1_000_000  # characters, apart from Python's
ASCII = 0.97  # of the characters of English


def machine_documentation() -> Iterator[str]:
    """A document per file, shuffled, each paragraph once. What is read of these files is kept.

    FileNotFoundError says what to install where there is almost nothing.
    """
    files = documentation_files()
    path = text_path(files)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = chain(enough(files), python_documentation())
        keep_lines(path, distinct_shuffled(texts, path.parent))
        for older in set(path.parent.glob("docs-*.jsonl.gz")) - {path}:
            older.unlink(missing_ok=True)  # of other versions of these packages
    digest, size = hashlib.sha256(), 0
    for text in kept_lines(path):
        data = text.encode()
        digest.update(data)
        size += len(data)
        yield text
    log_once(f"docs: {size / 1e6:.1f} MB, sha256 {digest.hexdigest()[:12]}")


def documentation_files() -> list[Path]:
    """The files that are read, sorted, without links and what is behind them."""
    found = []
    for part in ("man", "doc", "info"):
        for folder, _, names in os.walk(SHARED / part):
            for name in names:
                path = Path(folder, name)
                place = path.relative_to(SHARED).as_posix()
                known = any(kind.fullmatch(place) for kind in (MANUAL, INFO, TEXT))
                if known and not NO_PROSE.search(place) and path.is_file() and not path.is_symlink():
                    found.append(path)
    return sorted(found)


def text_path(files: list[Path]) -> Path:
    """Where the text of these files is kept: by their names, sizes and times, and Python's version."""
    key = hashlib.sha256(f"{RULES} {sys.version}".encode())
    for path in files:
        status = path.stat()
        key.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return cache_folder() / f"docs-{key.hexdigest()[:16]}.jsonl.gz"


def enough(files: list[Path]) -> Iterator[str]:
    """The documents of these files, if they have LEAST characters. What is left out is counted and logged."""
    left_out: Counter[str] = Counter()
    total = count = 0
    for text in read_files(files, left_out):
        total, count = total + len(text), count + 1
        yield text
    reasons = ", ".join(f"{number:,} {why}" for why, number in sorted(left_out.items())) or "none"
    if total < LEAST:
        raise FileNotFoundError(
            f"{SHARED} has {total:,} characters of documentation, and docs needs {LEAST:,}; install some "
            "(`apt-get install manpages-dev linux-doc python3-doc perl-doc git-doc`), or take pydocs"
        )
    log.info("docs: %.1f MB from %s files, and Python's; left out: %s", total / 1e6, f"{count:,}", reasons)


def read_files(files: list[Path], left_out: Counter[str]) -> Iterator[str]:
    """The text of each file, without paragraphs that were in one before."""
    from tqdm import tqdm

    seen: set[bytes] = set()
    for path in tqdm(files, "reading documentation", unit=" files", disable=None, leave=False):
        try:
            source = unpacked(path)
        except (OSError, EOFError, zlib.error):
            left_out["that cannot be read"] += 1
            continue
        if source is None:
            left_out[f"of more than {LARGEST_FILE >> 20} MiB"] += 1
        elif b"\0" in source:
            left_out["that are no text"] += 1
        else:
            text = new_paragraphs(text_of(path, source.decode("utf-8", "replace")), seen)
            if len(text) < SHORTEST:
                left_out["with little or no new text"] += 1
            elif len(text.encode("ascii", "ignore")) < ASCII * len(text) or not is_english(text):
                left_out["that are not English prose"] += 1
            else:
                yield text


def unpacked(path: Path) -> bytes | None:
    """A file's content, or None if it has more than LARGEST_FILE bytes: a small .gz may hold any amount."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    return content if len(content) <= LARGEST_FILE else None


def text_of(path: Path, source: str) -> str:
    """The text of a page, by what its path says it is."""
    place = path.relative_to(SHARED).as_posix().removesuffix(".gz")
    if MANUAL.fullmatch(place):
        return manual_text(source)
    if INFO.fullmatch(place):
        return info_text(source)
    return html_text(source) if place.endswith((".html", ".htm")) else plain_text(source)


def new_paragraphs(text: str, seen: set[bytes]) -> str:
    """The text without paragraphs that were seen, which from now on its own are."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        if len(paragraph) >= REPEATED:
            key = hashlib.blake2b(bare(paragraph), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        if paragraph.strip():
            kept.append(paragraph.rstrip())
    return "\n\n".join(kept).strip("\n") + "\n"
