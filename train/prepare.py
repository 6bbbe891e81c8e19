"""The commands that make a tokenizer and token shards: `hotlap tokenizer` and `hotlap data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hotlap.model import tokenizer as tokenizers
from hotlap.model.errors import DataError
from hotlap.model.tokenizer import SMALLEST_BPE, Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train import hub
from hotlap.train.datasets import CLIMBMIX, FINEWEB
from hotlap.train.download import check_space
from hotlap.train.log import log
from hotlap.train.pretrain import make_tokenizer, named_tokenizer
from hotlap.train.shards import encoded, read_shard, write_shard, write_shards
from hotlap.train.sources import cache_folder, documents_of, parquet_documents, split_documents

SAMPLE = 100_000  # characters on which a tokenizer's compression is measured
GPT2_BOS = 50256
TOKEN_BYTES = (1.3, 2.6)  # at most, for each byte of ClimbMix's parquet, of 2 and of 4 bytes a token


@dataclass(frozen=True)
class TokenizerConfig:
    """Learn a tokenizer from text."""

    source: str = "pydocs"
    """pydocs, shakespeare, climbmix, or text, .jsonl or .parquet files: a path, a folder or a pattern."""
    shards: int = 8
    """Training shards of climbmix to read."""
    out: Path = Path("tokenizer.json")
    """File to write."""
    kind: Literal["bpe", "characters"] = "bpe"
    vocab_size: int = 4096
    """Ids of a bpe tokenizer, special tokens included."""
    max_chars: int = 2_000_000_000
    """Characters of the training text to learn from, as nanochat does."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    force: bool = False
    """Overwrite the file."""


@dataclass(frozen=True)
class DataConfig:
    """Turn text into token shards, split into training and validation by document."""

    source: str = "pydocs"
    """pydocs, shakespeare, fineweb, climbmix, or text, .jsonl or .parquet files: a path, a folder or a
    pattern."""
    shards: int = 8
    """Training shards of fineweb (100M tokens and 0.2 GB each) or climbmix (250M characters, 0.1 GB)."""
    out: Path | None = None
    """Folder to make; data/NAME where none is given."""
    tokenizer: str = "tokenizer.json"
    """A tokenizer.json, or gpt2, which is fineweb's."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""


def make_tokenizer_file(config: TokenizerConfig) -> Tokenizer:
    if config.out.exists() and not config.force:
        raise FileExistsError(f"{config.out} exists; --force overwrites it")
    if not config.out.parent.is_dir():
        raise FileNotFoundError(f"no folder {config.out.parent} for {config.out.name}; make it first")
    if config.kind == "bpe" and config.vocab_size < SMALLEST_BPE:
        raise ValueError(
            f"vocab_size={config.vocab_size} is less than {SMALLEST_BPE} (256 bytes + special tokens)"
        )
    tokenizer = learn_tokenizer(config)
    tokenizer.save(config.out)
    return tokenizer


def learn_tokenizer(config: TokenizerConfig) -> Tokenizer:
    if config.kind == "characters":
        train, held_out = split_documents(config.source, config.errors)
        tokenizer = make_tokenizer(config.kind, config.vocab_size, train, train + held_out)
    else:
        if config.source == "climbmix":
            validation, *paths = climbmix_text(CLIMBMIX.names(config.shards))
            train, held_out = (
                (text for p in paths for text in parquet_documents(p)),
                parquet_documents(validation),
            )
        else:
            held_out = documents_of("validation", config.source, config.errors)
            train = documents_of("train", config.source, config.errors)
        tokenizer = make_tokenizer(config.kind, config.vocab_size, first(config.max_chars, train), [])
    sample = "".join(first(SAMPLE, held_out))
    ratio = len(sample.encode("utf-8", "surrogatepass")) / max(1, len(tokenizer.encode(sample)))
    log.info("%s: %d ids, %.2f bytes a token on held-out text", config.out, tokenizer.vocab_size, ratio)
    return tokenizer


def first(characters: int, texts: Iterable[str]) -> Iterator[str]:
    """The first documents, of so many characters together."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def make_data(config: DataConfig) -> None:
    """Write what the configuration says. FineWeb and ClimbMix go on with what is missing."""
    named = config.source in ("pydocs", "shakespeare", "fineweb", "climbmix")
    if config.out is None and not named:
        raise ValueError(f"no name for the data of {config.source}; give a folder by --out")
    out = config.out or Path("data") / config.source
    if config.source == "fineweb":
        fineweb(out, config.shards)
    elif config.source == "climbmix":
        climbmix(out, config.shards, named_tokenizer(config.tokenizer))
    else:
        write_documents(config, out)


def write_documents(config: DataConfig, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; name another folder by --out")
    tokenizer = named_tokenizer(config.tokenizer)
    next(documents_of("train", config.source, config.errors), None)  # before a folder is made
    out.mkdir(parents=True, exist_ok=True)
    counts = []
    for split in ("train", "validation"):
        texts = counted(documents_of(split, config.source, config.errors), split)
        counts.append(write_shards(out, split, texts, tokenizer))
    tokenizer.save(out / TOKENIZER)
    log.info("%s: %s tokens to train on, %s to validate", out, *(f"{n:,}" for n in counts))


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
