"""What the rows of bad input are made of: commands to spoil, and builders of the files that are wrong.

A builder makes its files in a folder that has text.txt, talks.jsonl, tokenizer.json, shards/, base/ and sft/
(runs) and model/ (an export). Those are links: a builder copies what it changes.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from helpers.commands import SMALL

Builder = Callable[[Path], object]
Row = tuple[str, Builder | None, int, str]
"""The arguments, the builder of what they need, the exit code, and a pattern of the line."""

# GPT-2's, as Transformers saves them
HF_CONFIG = (
    '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12}'
)
HF_TOKENIZER = json.dumps({
    "version": "1.0", "added_tokens": [{"id": 3, "special": True, "content": "<|endoftext|>"}],
    "pre_tokenizer": {"type": "ByteLevel"}, "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
})  # fmt: skip
STEPS = 4
DATA = "data --source text.txt --tokenizer tokenizer.json --out new"
PRETRAIN = "pretrain --data text.txt --tokenizer characters --out new " + " ".join(SMALL)
SFT = "sft --base base --data talks.jsonl --out new --loop.steps 2 --batch-rows 4"
DPO = "dpo --base sft --data a.jsonl --out new --loop.steps 2 --batch-rows 4"
RL = (
    "rl --base sft --data a.jsonl --reward operator:eq --out new --loop.steps 2 --batch-rows 4 --samples 2 "
    "--max-tokens 4"
)
CHAT = "chat bad -p square --max-tokens 2"
MANY = 10**12
FAR = 10**30
DEEP = "[" * 200_000
GZIP, PDF, ZIP, PICKLE = b"\x1f\x8b\x08\0", b"%PDF-1.4 x", b"PK\3\4aaa", b"\x80\x02}q\0."


def text(name: str, content: str | bytes = "a") -> Builder:
    """A file with this content."""

    def build(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return build


def lines(name: str, *records: object) -> Builder:
    """A file of JSON, a record on a line; a string is a line as it is."""
    return text(name, "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))


def talk(*messages: object, **others: object) -> Builder:
    """The file a.jsonl with one conversation. messages: its messages, or pairs of a role and a content."""
    told = [{"role": m[0], "content": m[1]} if isinstance(m, tuple) else m for m in messages]
    return lines("a.jsonl", {"messages": told, **others})


def folder(name: str) -> Builder:
    return lambda place: (place / name).mkdir()


def link(name: str, target: str) -> Builder:
    return lambda place: (place / name).symlink_to(target)


def pipe(name: str) -> Builder:
    return lambda place: os.mkfifo(place / name)


def copy(name: str, *builders: Builder) -> Builder:
    """The folder `bad`, a copy of another one in which the builders make files."""

    def build(place: Path) -> None:
        shutil.copytree(place / name, place / "bad")
        for change in builders:
            change(place / "bad")

    return build


def without(name: str) -> Builder:
    return lambda place: (place / name).unlink()


def changed(pattern: str, change: Callable[[bytes], bytes]) -> Builder:
    """The last file that fits the pattern, with its bytes changed."""

    def build(place: Path) -> None:
        path = sorted(place.glob(pattern))[-1]
        path.write_bytes(change(path.read_bytes()))

    return build


def model(name: str, content: str | bytes) -> Builder:
    """The folder `bad`, the exported model with one file replaced."""
    return copy("model", text(name, content))


def config(**fields: object) -> Builder:
    """The folder `bad`, the exported model whose config.json claims something else."""
    return copy("model", changed("config.json", lambda raw: json.dumps(json.loads(raw) | fields).encode()))


def tokenizer(change: Callable[[dict], object]) -> Builder:
    """The folder `bad`, the exported model whose tokenizer.json is changed."""

    def changed_json(raw: bytes) -> bytes:
        saved = json.loads(raw)
        change(saved)
        return json.dumps(saved).encode()

    return copy("model", changed("tokenizer.json", changed_json))


def shard(change: Callable[[bytes], bytes]) -> Builder:
    """The folder `bad`, whose training shard is changed."""
    return copy("shards", changed("train_000000.bin", change))


def checkpoint(name: str, change: Callable[[bytes], bytes]) -> Builder:
    """The run `bad`, base with a file of its last checkpoint changed."""
    return copy("base", changed(f"checkpoints/*/{name}", change))
