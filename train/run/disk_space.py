"""Disk space for checkpoints: checked before training and each save, and explained when it runs out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


def checkpoint_bytes(*tensors: dict[str, Tensor]) -> int:
    """Upper bound on the size of a checkpoint of these tensors, over all ranks."""
    return int(1.1 * sum(t.numel() * t.element_size() for part in tensors for t in part.values())) + (1 << 20)


def require_space(folder: Path, needed: int) -> None:
    """Raise OSError if fewer bytes than `needed` are free on the disk of an existing folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"a checkpoint in {folder} needs {needed:,} bytes, and {free:,} are free; free up space, or "
            "choose another --out"
        )


@contextmanager
def explain_full_disk(folder: Path, needed: int) -> Iterator[None]:
    """Make the error of a full disk say where, how much is needed, and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder.parent).free  # another rank may have deleted the folder already
        raise OSError(
            f"the disk is full: {folder} needs {needed:,} bytes, and {free:,} are free; free up space, and "
            "resume from the previous checkpoint"
        ) from error
