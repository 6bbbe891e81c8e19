"""Which code this is: the commit of a checkout, and a hash that a checkout and an installation share."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

TRAINS = ("common", "kernels", "model", "train")  # the folders of code that a run's result can depend on
SOURCES = (".py", ".c", ".h")


@functools.cache
def commit(checkout: Path = Path(__file__).parent) -> str:
    """The commit of a checkout, ours by default, with + if files differ from it; empty outside a checkout.

    Nothing is written: `git describe --dirty` would update the checkout's index.
    """

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("describe", "--always", "--abbrev=10") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def code_sha256(root: Path = Path(__file__).parents[1]) -> str:
    """A hash of the source files that train a model, with their names, whatever the ends of their lines."""
    digest = hashlib.sha256()
    paths = (path for folder in TRAINS for path in (root / folder).rglob("*") if path.suffix in SOURCES)
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        text = path.read_text(encoding="utf-8").encode()  # \r\n is read as \n
        digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()
