"""A checkpoint's manifest.json: what it is, the size and hash of each file, and a hash of the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.common.files import file_sha256

MANIFEST = "manifest.json"
FORMAT = 2
TENSORS = "*.safetensors"


def manifest_text(fields: dict) -> str:
    """The text of manifest.json: the fields, and last the hash of their text."""
    digest = hashlib.sha256(json.dumps(fields, indent=1).encode()).hexdigest()
    return json.dumps(fields | {"sha256": digest}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict:
    """The manifest's fields. DataError if it is missing, of another format, or has changed."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text)
        version = fields["format"]
        fields.pop("sha256", None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"cannot read {path} ({error!r}); use another checkpoint") from error
    if version != FORMAT:
        raise DataError(f"{path} has checkpoint format {version}; this version reads format {FORMAT}")
    if text != manifest_text(fields):
        raise DataError(f"{path} has changed since it was saved; use another checkpoint")
    return fields


def verify(folder: Path, rank: int = 0, size: int = 1, weights_only: bool = False) -> dict:
    """Check a checkpoint's files against its manifest, and return it. DataError names a file that is wrong.

    rank, size: each of `size` processes hashes its share of the bytes. weights_only: skip subfolders, which a
    model directory does not need.
    """
    manifest = read_manifest(folder)
    entries = {n: e for n, e in manifest["files"].items() if not (weights_only and "/" in n)}
    for path in sorted(folder.glob(TENSORS) if weights_only else folder.rglob(TENSORS)):
        if path.relative_to(folder).as_posix() not in entries:
            raise DataError(f"{path} does not belong to the checkpoint; use another checkpoint")
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise DataError(f"{path} is missing or not {entry['bytes']} bytes; use another checkpoint")
    by_size = sorted(entries, key=lambda name: entries[name]["bytes"])
    for name in by_size[rank::size]:
        if file_sha256(folder / name) != entries[name]["sha256"]:
            raise DataError(f"{folder / name} has changed since it was saved; use another checkpoint")
    return manifest
