"""Records that took long to make, kept in the cache folder as compressed lines of JSON."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from hotlap.common.download import require_free_space
from hotlap.common.errors import DataError
from hotlap.common.files import replacing

LARGEST = 1 << 27  # bytes of the lines of one file, compressed
LETTERS = re.compile(r"\w+")


def kept_lines(path: Path) -> Iterator[object]:
    """The records of a file, streamed. DataError if it is damaged."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and retry") from error


def keep_lines(path: Path, records: Iterable[object]) -> int:
    """Write the records, all of them or nothing, and return how many they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    require_free_space(path.parent, LARGEST)
    count = 0
    with replacing(path) as part, gzip.open(part, "wt", encoding="utf-8", compresslevel=5) as lines:
        for record in records:
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def distinct_shuffled(texts: Iterable[str], folder: Path) -> Iterator[str]:
    """Each text once, whatever its case, spaces and punctuation, in the order of their hashes.

    That order is the same every time, and mixes the sources: a model that reads them one after another
    forgets the first ones. Texts wait in a file in `folder`, memory holds a hash and a place of each.
    """
    places: dict[int, int] = {}
    with tempfile.TemporaryFile(dir=folder) as waiting:
        for text in texts:
            # another hash than that of the split, which would put all that validates first
            key = int.from_bytes(hashlib.blake2b(bare(text), digest_size=8).digest(), "big")
            if key not in places:
                places[key] = waiting.tell()
                data = text.encode("utf-8", "replace")
                waiting.write(len(data).to_bytes(4, "big") + data)
        for key in sorted(places):
            waiting.seek(places[key])
            yield waiting.read(int.from_bytes(waiting.read(4), "big")).decode()


def bare(text: str) -> bytes:
    """The letters and digits of a text alone."""
    return "".join(LETTERS.findall(text.casefold())).encode("utf-8", "replace")
