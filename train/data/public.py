"""Download FineWeb and ClimbMix, and make token shards of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hotlap.common.download import require_free_space
from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.model.config import GPT2_BOS
from hotlap.model.gpt2_tokenizer import gpt2
from hotlap.model.tokenizer import TOKENIZER, Tokenizer
from hotlap.train.data import hub
from hotlap.train.data.datasets import CLIMBMIX, FINEWEB
from hotlap.train.data.file_documents import table_documents
from hotlap.train.data.shards import encoded, read_shard, write_shard

TOKEN_BYTES = (1.3, 2.6)  # at most, per byte of ClimbMix's parquet files, for 2-byte and 4-byte tokens


def fineweb(folder: Path, shards: int) -> None:
    """Download FineWeb's validation shard, its first training shards (100M GPT-2 tokens each) and GPT-2's
    tokenizer into a folder. Intact files stay as they are.
    """
    names = FINEWEB.names(shards)
    path = folder / TOKENIZER
    if not path.exists():
        tokenizer = gpt2()  # first: its download may fail
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path)
    elif Tokenizer.load(path).bos != GPT2_BOS:
        raise DataError(f"{path} is not GPT-2's tokenizer, which FineWeb's shards need; name another folder")
    hub.download(FINEWEB, folder, names)
    log.info("%s: FineWeb, %d training shards and 1 validation shard", folder, shards)


def climbmix(folder: Path, shards: int, tokenizer: Tokenizer) -> None:
    """Download ClimbMix's text and encode it in a folder: its last shard as validation_006542.bin, the first
    ones as train_000000.bin and so on. Intact shards stay as they are.

    The text is downloaded to the cache (XDG_CACHE_HOME moves it) and may be deleted afterwards.
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
        check_room(hub.plan_download(CLIMBMIX, CLIMBMIX.folder, missing), folder, tokenizer)
    for text, tokens in zip(climbmix_text(list(missing)), missing.values(), strict=True):
        documents = list(encoded(with_progress(table_documents(text), tokens.name), tokenizer))
        write_shard(tokens, np.concatenate(documents), tokenizer.vocab_size)
        log.info("%s: %s tokens", tokens, f"{sum(map(len, documents)):,}")
    log.info("%s: ClimbMix, %d training shards and 1 validation shard", folder, shards)


def with_progress(texts: Iterable[str], name: str) -> Iterator[str]:
    """The same documents, with a progress bar."""
    from tqdm import tqdm

    return iter(tqdm(texts, name, unit=" documents", unit_scale=True, disable=None, leave=False))


def download_plan(source: str, folder: Path, shards: int) -> hub.DownloadPlan:
    """What `fineweb` or `climbmix` will download for a folder. Asks the hub for sizes."""
    if source == "fineweb":
        return hub.plan_download(FINEWEB, folder, FINEWEB.names(shards))
    missing = [name for name in CLIMBMIX.names(shards) if not (folder / token_shard(name)).exists()]
    return hub.plan_download(CLIMBMIX, CLIMBMIX.folder, missing)


def climbmix_text(names: list[str]) -> list[Path]:
    """The parquet files with these names, downloaded to the cache."""
    hub.download(CLIMBMIX, CLIMBMIX.folder, names)
    return [CLIMBMIX.folder / name for name in names]


def token_shard(name: str) -> str:
    """The file for the tokens of shard_00007.parquet: train_000007.bin."""
    split = "validation" if name in CLIMBMIX.files["validation"] else "train"
    return f"{split}_{int(Path(name).stem.removeprefix('shard_')):06d}.bin"


def is_sound(shard: Path, tokenizer: Tokenizer) -> bool:
    """Whether the shard exists and is intact. A damaged one is logged; it will be written again."""
    try:
        return shard.exists() and len(read_shard(shard, tokenizer.vocab_size)) > 0
    except DataError as error:
        log.warning("%s; making it again", error)
        return False


def check_room(plan: hub.DownloadPlan, folder: Path, tokenizer: Tokenizer) -> None:
    """OSError if the tokens do not fit on the disk, together with the text if that is on the same one."""
    tokens = (plan.bytes_there + plan.bytes_missing) * TOKEN_BYTES[tokenizer.vocab_size > 1 << 16]
    CLIMBMIX.folder.mkdir(parents=True, exist_ok=True)
    same_disk = folder.stat().st_dev == CLIMBMIX.folder.stat().st_dev
    require_free_space(folder, int(tokens) + same_disk * plan.bytes_missing)
