"""FineWeb and ClimbMix, downloaded and turned into token shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hotlap.common.errors import DataError
from hotlap.common.files import cache_folder
from hotlap.common.log import log
from hotlap.model import tokenizer as tokenizers
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train.data import hub
from hotlap.train.data.datasets import CLIMBMIX, FINEWEB
from hotlap.train.data.download import check_space
from hotlap.train.data.shards import encoded, read_shard, write_shard
from hotlap.train.data.sources import parquet_documents

GPT2_BOS = 50256


TOKEN_BYTES = (1.3, 2.6)  # at most, for each byte of ClimbMix's parquet, of 2 and of 4 bytes a token


def counted(texts: Iterable[str], what: str, total: int | None = None) -> Iterator[str]:
    """The same documents, with a bar that counts them."""
    from tqdm import tqdm

    return iter(tqdm(texts, what, total, unit=" documents", unit_scale=True, disable=None, leave=False))


def fineweb(folder: Path, shards: int) -> None:
    """Have FineWeb's validation shard, the first training shards (100M tokens of GPT-2's each) and GPT-2's
    tokenizer in a folder, checked. What is there and sound stays as it is.
    """
    names = FINEWEB.names(shards)
    path = folder / TOKENIZER
    if not path.exists():
        tokenizer = tokenizers.gpt2()  # first: it may be what cannot be downloaded
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    elif Tokenizer.load(path).bos != GPT2_BOS:
        raise DataError(f"{path} is not GPT-2's tokenizer, which FineWeb's shards need; name another folder")
    hub.download(FINEWEB, folder, names)
    log.info("%s: FineWeb, %d shards to train on and one to validate", folder, shards)


def climbmix(folder: Path, shards: int, tokenizer: Tokenizer) -> None:
    """Have ClimbMix's last shard as validation_006542.bin, the first ones as train_000000.bin, ... and their
    tokenizer in a folder. What is there and sound stays as it is.

    The text is downloaded to the cache, of which XDG_CACHE_HOME names the disk, and can go when this is done.
    """
    names = CLIMBMIX.names(shards)
    path = folder / TOKENIZER
    if path.exists() and Tokenizer.load(path).sha256 != tokenizer.sha256:
        raise DataError(f"{folder} has shards of another tokenizer; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if next(folder.glob("*.bin"), None):
            raise FileExistsError(f"{folder} has shards and no {TOKENIZER}; name another folder")
        tokenizer.save(path)
    missing = {name: folder / token_shard(name) for name in names}
    missing = {name: tokens for name, tokens in missing.items() if not is_sound(tokens, tokenizer)}
    if missing:
        check_room(hub.plan(CLIMBMIX, text_folder(), missing), folder, tokenizer)
    for text, tokens in zip(climbmix_text(list(missing)), missing.values(), strict=True):
        documents = list(encoded(counted(parquet_documents(text), tokens.name), tokenizer))
        write_shard(tokens, np.concatenate(documents), tokenizer.vocab_size)
        log.info("%s: %s tokens", tokens, f"{sum(map(len, documents)):,}")
    log.info("%s: ClimbMix, %d shards to train on and one to validate", folder, shards)


def download_plan(source: str, folder: Path, shards: int) -> hub.Plan:
    """What `fineweb` or `climbmix` will download for a folder. It asks the hub for sizes."""
    if source == "fineweb":
        return hub.plan(FINEWEB, folder, FINEWEB.names(shards))
    names = CLIMBMIX.names(shards)
    return hub.plan(CLIMBMIX, text_folder(), [n for n in names if not (folder / token_shard(n)).exists()])


def text_folder() -> Path:
    return cache_folder() / "climbmix"


def climbmix_text(names: list[str]) -> list[Path]:
    """The parquet files, downloaded to the cache."""
    hub.download(CLIMBMIX, text_folder(), names)
    return [text_folder() / name for name in names]


def token_shard(name: str) -> str:
    """The file for the tokens of shard_00007.parquet: train_000007.bin."""
    split = "validation" if name == CLIMBMIX.validation else "train"
    return f"{split}_{int(Path(name).stem.removeprefix('shard_')):06d}.bin"


def is_sound(shard: Path, tokenizer: Tokenizer) -> bool:
    """Whether the shard is there and whole. One that is damaged is named, and will be written again."""
    try:
        return shard.exists() and len(read_shard(shard, tokenizer.vocab_size)) > 0
    except DataError as error:
        log.warning("%s; it is made again", error)
        return False


def check_room(plan: hub.Plan, folder: Path, tokenizer: Tokenizer) -> None:
    """OSError where the tokens, and the text on the same disk, do not fit."""
    tokens = (plan.bytes_there + plan.bytes_missing) * TOKEN_BYTES[tokenizer.vocab_size > 1 << 16]
    text_folder().mkdir(parents=True, exist_ok=True)
    same = folder.stat().st_dev == text_folder().stat().st_dev
    check_space(folder, int(tokens) + same * plan.bytes_missing)
