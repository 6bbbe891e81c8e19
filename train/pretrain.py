"""Pretraining: from text to a base model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from hotlap.common.errors import DataError
from hotlap.model.config import GPTConfig
from hotlap.train.data.prepare import prepare
from hotlap.train.data.rows import PackedRows, packed_rows
from hotlap.train.data.shards import fingerprint, shard_paths
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation.bits_per_byte import validation
from hotlap.train.loop import LoopConfig
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.schedule import rows_in_all
from hotlap.train.stage import Stage, StageConfig, check_machine, opened, row_batches, train

# Passes over little data after which a timed run ends: each is worth less (Muennighoff et al., 2023).
MOST_EPOCHS = 4


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Train a base model on text."""

    out: Path = Path("runs/pretrain")
    data: str = "pydocs"
    """pydocs (Python's own documentation), shakespeare, text or .jsonl files, or a folder of shards."""
    tokenizer: str = "bpe"
    """bpe (of `model.vocab_size`) or characters, trained on the data; gpt2; or a tokenizer.json."""
    model: GPTConfig = field(default_factory=GPTConfig)
    validation_tokens: int = 0
    """Tokens that a validation reads, from the start of the split; 0 is all."""

    @property
    def tokens(self) -> int:
        """Tokens of the run, if it ends by its steps."""
        return rows_in_all(self.schedule, self.batch_rows, self.loop.steps) * self.model.context

    def validate(self) -> PretrainConfig:
        super().validate()
        if self.validation_tokens < 0:
            raise ValueError(f"validation_tokens={self.validation_tokens} must be 0 (all) or more")
        self.model.validate()
        return self


def pretrain(config: PretrainConfig, warm_up: bool = False) -> dict[str, float]:
    """Run the pretraining that config describes, on all ranks, and return its last metrics.

    warm_up: compile before the clock starts, on steps that are undone.
    """
    config = config.validate()
    with joined() as world:
        check_machine(config, world)

        def data():
            return prepare(config.out, config.data, config.tokenizer, config.model.vocab_size)

        with opened(config, world, data) as (tokenizer, folder):
            vocab_size = -(-tokenizer.vocab_size // 64) * 64  # sizes that matmuls like
            shape = dataclasses.replace(config.model, vocab_size=vocab_size)
            rows, held_out = (
                packed_rows(folder, split, tokenizer, shape.context, config.seed, limit)
                for split, limit in (("train", 0), ("validation", config.validation_tokens))
            )
            if len(rows.shards) == 1 and rows.epoch_rows() == 1:
                raise DataError(
                    f"{folder} has no more to train on than one row of model.context={shape.context} tokens; "
                    "bring more text, or lower --model.context"
                )
            rows.batch(0, 1)  # so that what is wrong with the data shows before the model is built
            loop = ended_by_data(config, rows)
            stage = Stage(
                "pretrain", shape, tokenizer, next_token_loss,
                batches=row_batches(rows, config, loop.steps, world),
                evaluate=lambda model, at_once: validation(model, held_out, tokenizer, at_once, world),
                data=fingerprint([*shard_paths(folder, "train"), *shard_paths(folder, "validation")]),
                source=str(folder), about=length(config, loop, rows), loop=loop,
            )  # fmt: skip
            return train(config, stage, world, warm_up)


def ended_by_data(config: PretrainConfig, rows: PackedRows) -> LoopConfig:
    """The loop, which in a timed run ends after MOST_EPOCHS of a corpus of one shard, if not before."""
    if not config.loop.minutes or len(rows.shards) > 1:
        return config.loop
    steps = math.ceil(MOST_EPOCHS * rows.epoch_rows() / config.batch_rows)
    return dataclasses.replace(config.loop, steps=min(config.loop.steps, steps))


def length(config: PretrainConfig, loop: LoopConfig, rows: PackedRows) -> str:
    """How long the run is, for people."""
    if loop.minutes:
        return f"{loop.minutes:g} minutes or {loop.steps:,} steps"
    epochs = config.tokens / config.model.context / rows.epoch_rows() if len(rows.shards) == 1 else None
    return f"{config.tokens / 1e6:.2f}M tokens" + (f" ({epochs:.1f} epochs)" if epochs else "")
