"""The commands that make a tokenizer and token shards: `hotlap tokenizer` and `hotlap data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hotlap.model.tokenizer import SMALLEST_BPE, Tokenizer
from hotlap.train.log import log
from hotlap.train.pretrain import make_tokenizer, named_tokenizer, write_data
from hotlap.train.sources import split_documents


@dataclass(frozen=True)
class TokenizerConfig:
    """Learn a tokenizer from text."""

    source: str = "pydocs"
    """pydocs, shakespeare, or text or .jsonl files: a path, a folder or a pattern."""
    out: Path = Path("tokenizer.json")
    """File to write."""
    kind: Literal["bpe", "characters"] = "bpe"
    vocab_size: int = 4096
    """Ids of a bpe tokenizer, special tokens included."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8."""
    force: bool = False
    """Overwrite the file."""


@dataclass(frozen=True)
class DataConfig:
    """Turn text into token shards, split into training and validation by document."""

    source: str = "pydocs"
    """pydocs, shakespeare, or text or .jsonl files: a path, a folder or a pattern."""
    out: Path = Path("data/pydocs")
    """Folder to make."""
    tokenizer: str = "tokenizer.json"
    """A tokenizer.json, or gpt2."""
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
    train, held_out = split_documents(config.source, config.errors)
    tokenizer = make_tokenizer(config.kind, config.vocab_size, train, train + held_out)
    tokenizer.save(config.out)
    sample = "".join(held_out)[:100_000]
    ratio = len(sample.encode()) / len(tokenizer.encode(sample))
    log.info("%s: %d ids, %.2f bytes a token on held-out text", config.out, tokenizer.vocab_size, ratio)
    return tokenizer


def make_data(config: DataConfig) -> None:
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise FileExistsError(f"{config.out} exists and is not empty; name another folder by --out")
    tokenizer = named_tokenizer(config.tokenizer)
    write_data(config.out, *split_documents(config.source, config.errors), tokenizer)
