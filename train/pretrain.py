"""Pretraining: from text to a base model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from hotlap.kernels.dispatch import default_device
from hotlap.model import tokenizer as tokenizers
from hotlap.model.config import GPTConfig
from hotlap.model.errors import DataError
from hotlap.model.flops import causal_flops, nanochat_flops, parameter_counts, training_bytes
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER
from hotlap.train.data import (
    PackedRows,
    check_rows,
    fingerprint,
    prefetch,
    shard_documents,
    shard_paths,
    step_batches,
    write_shards,
)  # fmt: skip
from hotlap.train.dist import joined
from hotlap.train.evaluate import validation
from hotlap.train.log import log
from hotlap.train.loop import LoopConfig, fit
from hotlap.train.losses import next_token_loss
from hotlap.train.optim import MuonAdamW, OptimConfig
from hotlap.train.report import write_report
from hotlap.train.runs import compute_dtype, open_run, prepare_model, resume_from, run_lock
from hotlap.train.schedule import ScheduleConfig
from hotlap.train.sources import split_documents

CHARACTERS_PER_PIECE = 10_000  # of a document that the tokenizer learns from at a time


@dataclass(frozen=True)
class PretrainConfig:
    """Train a base model on text."""

    run: Path = Path("runs/pretrain")
    """Directory of the run: configuration, metrics, checkpoints and report."""
    data: str = "pydocs"
    """pydocs (Python's own documentation), shakespeare, text or .jsonl files, or a folder of shards."""
    tokenizer: str = "bpe"
    """bpe or characters (learnt from the data), gpt2, or a tokenizer.json."""
    vocab_size: int = 4096
    """Size of a tokenizer that is learnt."""
    batch_rows: int = 16
    """Rows of `model.context` tokens in a step."""
    micro_rows: int = 0
    """Rows that go through the model at once; 0 is all of the step's. Fewer take less memory."""
    model: GPTConfig = field(default_factory=GPTConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(1000))
    validation_rows: int = 0
    """Rows that a validation reads; 0 is all."""
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """What the model computes in. auto: bfloat16 where the device is fast at it. fp8: its large products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU always, on a CPU for runs long enough to earn it back."""
    resume: bool = False
    """Go on with the run where it stopped."""

    def validate(self) -> PretrainConfig:
        if self.batch_rows < 1 or self.micro_rows < 0 or self.validation_rows < 0:
            raise ValueError("batch_rows must be at least 1, micro_rows and validation_rows 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        check_rows(self.batch_rows, self.micro_rows or self.batch_rows)
        self.model.validate()
        self.optim.validate()
        self.loop.validate()
        self.schedule.validate(self.loop.steps)
        return self


def pretrain(config: PretrainConfig) -> dict[str, float]:
    """Run the pretraining that config describes, and return its last metrics."""
    config = config.validate()
    device = default_device()
    with joined() as world, run_lock(config.run):
        open_run(config.run, config, config.resume)
        tokenizer, folder = prepare(config)
        vocab_size = -(-tokenizer.vocab_size // 64) * 64  # sizes that products like
        shape = dataclasses.replace(config.model, vocab_size=vocab_size)
        train, held_out = (packed_rows(folder, split, tokenizer, shape.context, config.seed)
                           for split in ("train", "validation"))  # fmt: skip
        if len(train.shards) == 1 and train.epoch_rows() == 1:
            raise DataError(
                f"{folder} has no more to train on than one row of model.context={shape.context} tokens; "
                "bring more text, or lower --model.context"
            )
        step_rows = {
            "batch_rows": config.batch_rows,
            "micro_rows": config.micro_rows or config.batch_rows,
        }
        next(
            step_batches(train, **step_rows)
        )  # so that what is wrong with the data shows before the model is built
        with torch.device("meta"):
            model = GPT(shape, compute_dtype(config.dtype, device))
        model.to_empty(device=device).init_weights(config.seed)
        optimizer = MuonAdamW(model, config.optim)
        start, state = resume_from(
            config.run, "auto" if config.resume else "no", model, optimizer, world
        )  # fmt: skip
        data_id = fingerprint([*shard_paths(folder, "train"), *shard_paths(folder, "validation")])
        if state and state.get("data") != data_id:
            raise ValueError(f"{config.run} was started on other data than {folder} holds now")
        describe(model, config, train)
        prepare_model(model, config.dtype, config.compile, config.loop.steps - start)
        kept = state | {"stage": "pretrain", "data": data_id}
        evaluate = partial(
            validation, model, held_out, tokenizer, step_rows["micro_rows"], config.validation_rows
        )
        last = fit(
            config.loop, config.schedule, model, optimizer, tokenizer,
            prefetch(step_batches(train, start=start, **step_rows)), next_token_loss,
            run=config.run, start=start, state=kept, evaluate=evaluate,
        )  # fmt: skip
        write_report(config.run)
        return last


def prepare(config: PretrainConfig) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the folder with the shards: the one that was named, or one made in the run."""
    path = config.run / TOKENIZER
    if Path(config.data).is_dir() and list(Path(config.data).glob("*.bin")):
        folder = Path(config.data)
        if not path.exists():
            beside = folder / TOKENIZER
            named = config.tokenizer not in ("bpe", "characters")
            if not named and not beside.exists():
                raise FileNotFoundError(f"no {beside}; name the tokenizer of these shards by --tokenizer")
            (named_tokenizer(config.tokenizer) if named else Tokenizer.load(beside)).save(path)
        return Tokenizer.load(path), folder
    folder = config.run / "data"
    if not (folder / TOKENIZER).exists():  # written last
        train, held_out = split_documents(config.data)
        tokenizer = make_tokenizer(config.tokenizer, config.vocab_size, train, train + held_out)
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


def packed_rows(folder: Path, split: str, tokenizer: Tokenizer, T: int, seed: int) -> PackedRows:
    """The rows of a split; training rows are shuffled."""
    shards = [
        partial(shard_documents, path, tokenizer.vocab_size, tokenizer.bos)
        for path in shard_paths(folder, split)
    ]
    return PackedRows(shards, T, seed, shuffle=split == "train")


def describe(model: GPT, config: PretrainConfig, rows: PackedRows) -> None:
    """Log what is about to run: parameters, FLOPs, tokens and memory."""
    counts, T = parameter_counts(model), model.config.context
    tokens = config.loop.steps * config.batch_rows * T
    epochs = config.loop.steps * config.batch_rows / rows.epoch_rows() if len(rows.shards) == 1 else None
    memory = sum(training_bytes(model, config.micro_rows or config.batch_rows, T).values())
    log.info(
        "%s: %.2fM parameters (%.2fM in products), %.1f MFLOP a token (%.1f causal), %.2fM tokens%s, "
        "about %.2f GB, %s on %s",
        config.run, counts["total"] / 1e6, (counts["matrices"] + counts["head"]) / 1e6,
        nanochat_flops(model, T) / 1e6, causal_flops(model, T) / 1e6, tokens / 1e6,
        f" ({epochs:.1f} epochs)" if epochs else "", memory / 1e9,
        str(model.compute_dtype).removeprefix("torch."), model.embedding.weight.device,
    )  # fmt: skip
