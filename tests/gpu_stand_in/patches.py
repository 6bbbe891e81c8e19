"""How the stand-in replaces names of libraries, also private ones: where one is gone, a test says so."""

from __future__ import annotations

import pkgutil
from typing import Any

MISSING: list[str] = []  # names that are gone, of which there is a test


def find(path: str) -> Any:
    """What a name such as torch.cuda.Stream stands for; None, with a note, where it is gone."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        MISSING.append(path)
        return None


def put(path: str, value: Any) -> Any:
    """Let a name stand for value, and return what it stood for; nothing, with a note, where it is gone."""
    owner, _, name = path.rpartition(".")
    before = find(path)
    if path not in MISSING:
        setattr(pkgutil.resolve_name(owner), name, value)
    return before
