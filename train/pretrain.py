"""Pretraining: train a base model on text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.model.config import GPT2Config
from hotlap.model.tokenizer import TOKENIZER, Tokenizer, check_bpe_size
from hotlap.model.weights import lineage, open_model
from hotlap.train.config import GPT2PretrainConfig, LoopConfig, PretrainConfig
from hotlap.train.data.prepare import prepare
from hotlap.train.data.rows import PackedRows, packed_rows
from hotlap.train.data.shards import fingerprint, shard_paths
from hotlap.train.data.sources import shard_folder
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation.bits_per_byte import validation
from hotlap.train.losses import next_token_loss
from hotlap.train.stage import Stage, check_machine, closing, evaluated_aside, opened, row_batches, train


def pretrain(config: PretrainConfig, warm_up: bool = False) -> dict[str, float]:
    """Pretrain on all ranks, and return the last metrics.

    warm_up: compile before the clock starts, on steps that are undone.
    """
    config = config.validate()
    with joined() as world, evaluated_aside(config, world) as config:
        base = None
        if config.base:
            config, base = on_base(config)
        check_sizes(config, world)

        def data():
            return prepare(config.out, config.data, config.tokenizer, config.model.vocab_size)

        with opened(config, world, data) as (tokenizer, folder):
            vocab_size = -(-tokenizer.vocab_size // 64) * 64  # padded: matmuls are faster
            shape = config.model if base else dataclasses.replace(config.model, vocab_size=vocab_size)
            rows, held_out = (
                packed_rows(folder, split, tokenizer, shape.context, config.seed, limit)
                for split, limit in (("train", 0), ("validation", config.validation_tokens))
            )
            if len(rows.shards) == 1 and rows.epoch_rows() == 1:
                raise DataError(
                    f"the training split in {folder} fills only one row of model.context={shape.context} "
                    "tokens; add more text, or lower --model.context"
                )
            rows.batch(0, 1)  # find errors in the data before building the model
            loop = limit_epochs(config, rows)
            stage = Stage(
                "pretrain", shape, tokenizer, next_token_loss,
                batches=row_batches(rows, config, loop.steps, world),
                evaluate=lambda model, at_once: validation(model, held_out, tokenizer, at_once, world),
                data=fingerprint([*shard_paths(folder, "train"), *shard_paths(folder, "validation")]),
                source=str(folder), about=describe_length(config, loop, rows), loop=loop,
                base=base,
            )  # fmt: skip
            return train(config, stage, world, warm_up)


def on_base(config: PretrainConfig) -> tuple[PretrainConfig, Path]:
    """The config with the shape and tokenizer of its base, and the base's folder. ValueError if it asks for
    others.
    """
    folder, shape, tokenizer = open_model(config.base)
    path = lineage(folder)[-1] / TOKENIZER
    ids = shape.vocab_size  # which the tokenizer decides
    asked, default = (dataclasses.replace(s, vocab_size=ids) for s in (config.model, type(config.model)()))
    if asked not in (default, shape):
        raise ValueError(f"base={config.base} has its own shape; leave out flags and presets with another")
    if config.tokenizer not in ("bpe", str(path)):
        raise ValueError(f"tokenizer={config.tokenizer}: the base has its own; leave it out")
    shards = shard_folder(config.data)
    beside = shards / TOKENIZER if shards else path
    if beside.exists() and Tokenizer.load(beside).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{shards} has shards of another tokenizer than the base; make them with --tokenizer {path}"
        )
    kind = GPT2PretrainConfig if isinstance(shape, GPT2Config) else PretrainConfig
    return kind(**vars(config) | {"model": shape, "tokenizer": str(path)}), folder


def check_sizes(config: PretrainConfig, world: World) -> None:
    """Raise ValueError if this machine cannot run the config, before any data is read."""
    # the number of ids is not known yet: the tokenizer decides it
    check_machine(config, world, dataclasses.replace(config.model, vocab_size=1))
    if config.tokenizer == "bpe" and not shard_folder(config.data):
        check_bpe_size(config.model.vocab_size)


def limit_epochs(config: PretrainConfig, rows: PackedRows) -> LoopConfig:
    """config.loop; in a timed run on one shard, limited to config.most_epochs."""
    if not config.loop.minutes or len(rows.shards) > 1:
        return config.loop
    steps = math.ceil(config.most_epochs * rows.epoch_rows() / config.batch_rows)
    return dataclasses.replace(config.loop, steps=min(config.loop.steps, steps))


def describe_length(config: PretrainConfig, loop: LoopConfig, rows: PackedRows) -> str:
    """Length of the run, for the log."""
    if loop.minutes:
        return f"{loop.minutes:g} minutes or {loop.steps:,} steps"
    epochs = config.tokens / config.model.context / rows.epoch_rows() if len(rows.shards) == 1 else None
    return f"{config.tokens / 1e6:.2f}M tokens" + (f" ({epochs:.1f} epochs)" if epochs else "")


def main(config: PretrainConfig) -> None:
    """`hotlap pretrain`."""
    last = pretrain(config)
    print(closing(config, last, f"{config.out}/report.md"))
