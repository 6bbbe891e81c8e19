"""Make a tokenizer and token shards: `hotlap tokenizer`, `hotlap data`, and the data of a training run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from hotlap.common.checks import at_least
from hotlap.common.log import log
from hotlap.model import tokenizer as tokenizers
from hotlap.model.gpt2_tokenizer import gpt2
from hotlap.model.tokenizer import TOKENIZER, Tokenizer
from hotlap.train.data import public
from hotlap.train.data.datasets import CLIMBMIX
from hotlap.train.data.file_documents import table_documents
from hotlap.train.data.public import climbmix_text, with_progress
from hotlap.train.data.shards import write_shards
from hotlap.train.data.sources import (
    DATASETS,
    TEXTS,
    documents_of,
    is_named,
    shard_folder,
)
from hotlap.train.data.splits import SPLITS

CHARACTERS_PER_PIECE = 10_000  # documents are cut into pieces for tokenizer training
CLIMBMIX_TOKENS = 50_000_000  # at least, in a shard of 250M characters
TOKENIZER_SHARDS = 8  # of ClimbMix, to train a tokenizer on
SAMPLE = 100_000  # characters on which a tokenizer's compression is measured


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a tokenizer on text."""

    source: str = "pydocs"
    """pydocs, docs, shakespeare, bigbench, climbmix, or text, .jsonl or .parquet files (path, folder,
    pattern)."""
    shards: int = 8
    """Number of climbmix training shards to read."""
    out: Path = Path("tokenizer.json")
    """File to write."""
    kind: Literal["bpe", "characters"] = "bpe"
    """Byte-level BPE, or one token per character."""
    vocab_size: int = 4096
    """Vocabulary size of a bpe tokenizer, special tokens included."""
    max_chars: int = 2_000_000_000
    """Train on at most this many characters; the default is nanochat's."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    force: bool = False
    """Overwrite an existing file."""

    def validate(self) -> TokenizerConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 1, "shards", "vocab_size", "max_chars")
        if self.kind == "bpe":
            tokenizers.check_bpe_size(self.vocab_size)
        return self


@dataclass(frozen=True)
class DataConfig:
    """Turn text into token shards, split into training and validation by document."""

    source: str = "pydocs"
    """pydocs, docs, shakespeare, bigbench, fineweb, climbmix, or text, .jsonl or .parquet files (path,
    folder, pattern)."""
    shards: int = 8
    """Training shards; each has 100M tokens (0.2 GB) of fineweb, or 250M characters (0.1 GB) of climbmix."""
    out: Path | None = None
    """Folder to write; data/SOURCE by default."""
    tokenizer: str = "tokenizer.json"
    """A tokenizer.json, or gpt2. fineweb always uses gpt2."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""

    def validate(self) -> DataConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 1, "shards")
        return self


def make_tokenizer_file(config: TokenizerConfig) -> Tokenizer:
    config.validate()
    if config.out.exists() and not config.force:
        raise FileExistsError(f"{config.out} exists; --force overwrites it")
    if not config.out.parent.is_dir():
        raise FileNotFoundError(f"no folder {config.out.parent} for {config.out.name}; make it first")
    tokenizer = learn_tokenizer(config)
    tokenizer.save(config.out)
    return tokenizer


def learn_tokenizer(config: TokenizerConfig) -> Tokenizer:
    if is_named(config.source, ("climbmix",)):
        validation, *train = climbmix_text(CLIMBMIX.names(config.shards))
        paths = {"train": train, "validation": [validation]}

        def texts(split: str) -> Iterator[str]:
            return (text for path in paths[split] for text in table_documents(path))
    else:

        def texts(split: str) -> Iterator[str]:
            return documents_of(split, config.source, config.errors)

    train_text = first(config.max_chars, texts("train"))
    tokenizer = make_tokenizer(config.kind, config.vocab_size, train_text, chain(*map(texts, SPLITS)))
    sample = "".join(first(SAMPLE, texts("validation")))
    ratio = len(sample.encode()) / max(1, len(tokenizer.encode(sample)))
    log.info("%s: %d ids, %.2f bytes per token on held-out text", config.out, tokenizer.vocab_size, ratio)
    return tokenizer


def first(characters: int, texts: Iterable[str]) -> Iterator[str]:
    """The first documents, up to this many characters in total."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def make_tokenizer(kind: str, vocab_size: int, train: Iterable[str], everything: Iterable[str]) -> Tokenizer:
    """Train a `bpe` tokenizer on the training text or collect the `characters` of all text; any other kind is
    the name of an existing tokenizer.
    """
    if kind == "characters":
        return tokenizers.train_characters("".join(sorted(set(chain.from_iterable(map(set, everything))))))
    if kind != "bpe":
        return named_tokenizer(kind)
    pieces = (t[i : i + CHARACTERS_PER_PIECE] for t in train for i in range(0, len(t), CHARACTERS_PER_PIECE))
    tokenizer = tokenizers.train_bpe(pieces, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log.info("the text has merges for %d tokens only, not %d", tokenizer.vocab_size, vocab_size)
    return tokenizer


def named_tokenizer(name: str) -> Tokenizer:
    """`gpt2`, or the tokenizer in a file."""
    return gpt2() if name == "gpt2" else Tokenizer.load(name)


def make_data(config: DataConfig) -> None:
    """Write token shards. FineWeb and ClimbMix resume: only missing shards are downloaded and made."""
    config.validate()
    if config.out is None and config.source not in (*TEXTS, *DATASETS):
        raise ValueError(f"no name for the data of {config.source}; give a folder with --out")
    out = config.out or Path("data") / config.source
    if is_named(config.source, DATASETS) and config.source == "fineweb":
        public.fineweb(out, config.shards)
    elif config.source == "climbmix":
        public.climbmix(out, config.shards, named_tokenizer(config.tokenizer))
    else:
        write_documents(config, out)


def write_documents(config: DataConfig, out: Path) -> None:
    """Encode and write the documents as they are read: the text may be larger than memory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; name another folder with --out")
    tokenizer = named_tokenizer(config.tokenizer)
    next(documents_of("train", config.source, config.errors), None)  # raises before a folder is made
    texts = (with_progress(documents_of(split, config.source, config.errors), split) for split in SPLITS)
    write_data(out, texts, tokenizer)


def prepare(out: Path, data: str, kind: str, vocab_size: int) -> tuple[Tokenizer, Path]:
    """The tokenizer and the folder of shards for the run in `out`. A folder of shards is used as it is; text
    is tokenized into `out/data`, once.

    kind: `bpe` or `characters`, trained on the text (for shards, the one beside them), `gpt2`, or a file.
    """
    path = out / TOKENIZER
    if folder := shard_folder(data):
        if not path.exists():
            beside = folder / TOKENIZER
            named = kind not in ("bpe", "characters")
            if not named and not beside.exists():
                raise FileNotFoundError(f"no {beside}; name the tokenizer of these shards with --tokenizer")
            (named_tokenizer(kind) if named else Tokenizer.load(beside)).save(path)
        return Tokenizer.load(path), folder
    folder = out / "data"
    if not (folder / TOKENIZER).exists():  # written last
        train, held_out = (documents_of(split, data) for split in SPLITS)
        tokenizer = make_tokenizer(kind, vocab_size, train, chain(train, held_out))
        write_data(folder, (documents_of(split, data) for split in SPLITS), tokenizer)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    tokenizer.save(path)
    return tokenizer, folder


def write_data(folder: Path, texts: Iterable[Iterable[str]], tokenizer: Tokenizer) -> None:
    """Write the shards of each split, training first, then the tokenizer that encoded them. After an error
    nothing of them is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        counts = [
            write_shards(folder, split, documents, tokenizer)
            for split, documents in zip(SPLITS, texts, strict=True)
        ]
        tokenizer.save(folder / TOKENIZER)
    except BaseException:
        for made in folder.glob("*.bin"):
            made.unlink()
        with contextlib.suppress(OSError):  # it held something else before
            folder.rmdir()
        raise
    log.info("%s: %s training tokens, %s validation tokens", folder, *(f"{n:,}" for n in counts))


def climbmix_with_tokenizer(folder: Path, shards: int, vocab_size: int) -> None:
    """Make ClimbMix's token shards in a folder, with the folder's tokenizer or, if it has none, a new one."""
    path = folder / TOKENIZER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        learn = TokenizerConfig(source="climbmix", out=path, vocab_size=vocab_size, shards=TOKENIZER_SHARDS)
        make_tokenizer_file(learn)
    public.climbmix(folder, shards, Tokenizer.load(path))


def data_command(config: DataConfig) -> None:
    """`hotlap data`."""
    make_data(config)


def tokenizer_command(config: TokenizerConfig) -> None:
    """`hotlap tokenizer`."""
    make_tokenizer_file(config)
