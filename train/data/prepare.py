"""The commands that make a tokenizer and token shards: `hotlap tokenizer` and `hotlap data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hotlap.common import options
from hotlap.common.log import log
from hotlap.model import tokenizer as tokenizers
from hotlap.model.tokenizer import SMALLEST_BPE, Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train.data import public
from hotlap.train.data.datasets import CLIMBMIX
from hotlap.train.data.public import climbmix_text, counted, fineweb
from hotlap.train.data.shards import write_shards
from hotlap.train.data.sources import documents_of, parquet_documents, split_documents

CHARACTERS_PER_PIECE = 10_000  # of a document that the tokenizer learns from at a time
CLIMBMIX_TOKENS = 50_000_000  # at least, in a shard of 250M characters
TOKENIZER_SHARDS = 8  # of ClimbMix that a tokenizer learns from
SAMPLE = 100_000  # characters on which a tokenizer's compression is measured


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
        public.climbmix(out, config.shards, named_tokenizer(config.tokenizer))
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


def prepare(out: Path, data: str, kind: str, vocab_size: int) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the folder with the shards: the one that was named, or one made in the run."""
    path = out / TOKENIZER
    if Path(data).is_dir() and list(Path(data).glob("*.bin")):
        folder = Path(data)
        if not path.exists():
            beside = folder / TOKENIZER
            named = kind not in ("bpe", "characters")
            if not named and not beside.exists():
                raise FileNotFoundError(f"no {beside}; name the tokenizer of these shards by --tokenizer")
            (named_tokenizer(kind) if named else Tokenizer.load(beside)).save(path)
        return Tokenizer.load(path), folder
    folder = out / "data"
    if not (folder / TOKENIZER).exists():  # written last
        train, held_out = split_documents(data)
        tokenizer = make_tokenizer(kind, vocab_size, train, train + held_out)
        write_data(folder, train, held_out, tokenizer)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    tokenizer.save(path)
    return tokenizer, folder


def write_data(folder: Path, train: list[str], held_out: list[str], tokenizer: Tokenizer) -> None:
    """Shards of both splits, and at last the tokenizer that they were made with."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [
        write_shards(folder, split, texts, tokenizer)
        for split, texts in (("train", train), ("validation", held_out))
    ]
    tokenizer.save(folder / TOKENIZER)
    log.info("%s: %s tokens to train on, %s to validate", folder, *(f"{n:,}" for n in counts))


def make_tokenizer(kind: str, vocab_size: int, train: list[str], everything: list[str]) -> Tokenizer:
    """A tokenizer learnt from the training text, or a named one. Characters also come from the validation
    text.
    """
    if kind == "characters":
        return tokenizers.train_characters("".join(sorted(set().union(*everything))))
    if kind != "bpe":
        return named_tokenizer(kind)
    pieces = (t[i : i + CHARACTERS_PER_PIECE] for t in train for i in range(0, len(t), CHARACTERS_PER_PIECE))
    tokenizer = tokenizers.train_bpe(pieces, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log.info("the text has merges for %d tokens only, not %d", tokenizer.vocab_size, vocab_size)
    return tokenizer


def named_tokenizer(name: str) -> Tokenizer:
    return tokenizers.gpt2() if name == "gpt2" else Tokenizer.load(name)


def climbmix_with_tokenizer(folder: Path, shards: int, vocab_size: int) -> None:
    """ClimbMix in a folder, with the tokenizer that is there, or one that is learnt first."""
    path = folder / TOKENIZER
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        learn = TokenizerConfig(source="climbmix", out=path, vocab_size=vocab_size, shards=TOKENIZER_SHARDS)
        make_tokenizer_file(learn)
    public.climbmix(folder, shards, Tokenizer.load(path))


def data_command(arguments: list[str]) -> None:
    """`hotlap data`."""
    make_data(options.parse(DataConfig, arguments, command="data"))


def tokenizer_command(arguments: list[str]) -> None:
    """`hotlap tokenizer`."""
    make_tokenizer_file(options.parse(TokenizerConfig, arguments, command="tokenizer"))
