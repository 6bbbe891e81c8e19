"""Supervised fine-tuning: from a base model to one that answers."""

from __future__ import annotations

import hashlib
import math
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from hotlap.common import options
from hotlap.common.log import log
from hotlap.model.gpt import GPT
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER, load_weights, open_model
from hotlap.train.data.conversations import (
    conversation_digests,
    conversation_rows,
    conversations_of,
    download_smoltalk,
)
from hotlap.train.data.rows import PackedRows, prefetch, step_batches
from hotlap.train.data.sources import SPLITS
from hotlap.train.distributed.memory import check_memory, largest_that_fits, micro_batch_rows
from hotlap.train.distributed.sharding import (
    Recompute,
    compiles,
    compute_dtype,
    materialize,
    parallelize,
    use_fp8,
)
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation.bits_per_byte import validation
from hotlap.train.loop import LoopConfig, fit
from hotlap.train.losses import next_token_loss
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig
from hotlap.train.optim.schedule import ScheduleConfig, rows_in_all, rows_share, stage_rows
from hotlap.train.run.folder import open_run, resume_from, run_lock
from hotlap.train.run.report import write_report


@dataclass(frozen=True)
class SFTConfig:
    """Teach a base model to converse."""

    out: Path = Path("runs/sft")
    """Directory of the run."""
    base: Path = Path("runs/pretrain")
    """Run or model directory to start from."""
    data: str = "tasks"
    """tasks (facts, sums, spelling, greetings), smoltalk (which is downloaded) with the tasks, or a .jsonl or
    .parquet file of {"messages": [...]} lines or rows."""
    batch_rows: int = 16
    """Rows of the model's context in a step."""
    epochs: float = 0.0
    """Passes over the conversations, at least: more steps than loop.steps where those are fewer passes."""
    micro_batch: str = "all"
    """Rows that go through the model at once on each rank: a number, all, or auto (as many as fit)."""
    recompute: Recompute = "none"
    """Activations that are computed again for the backward pass, to save memory."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            warmup_steps=0, warmdown=0.5, final_lr=0.0, momentum_warmup_steps=300
        )
    )
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(500))
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "fp8"] = "auto"
    """What the model computes in. auto: bfloat16 where the device is fast at it. fp8: its large products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on a GPU always, on a CPU for runs long enough to earn it back."""
    resume: str = "no"
    """Go on with a run: auto (from its newest checkpoint that is whole), or the path of a checkpoint."""

    def validate(self) -> SFTConfig:
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows={self.batch_rows} must be at least 1")
        if not 0 <= self.epochs < float("inf"):
            raise ValueError(f"epochs={self.epochs} must be 0 (loop.steps alone count) or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        self.optim.validate()
        self.loop.validate()
        self.schedule.validate(self.loop.minutes)
        return self


def fine_tune(config: SFTConfig, profile: bool = False) -> dict[str, float]:
    """Run the fine-tuning that config describes, on all ranks, and return its last metrics."""
    config = config.validate()
    with joined() as world, ExitStack() as stack:
        common_rows = math.gcd(*stage_rows(config.schedule, config.batch_rows))
        micro_rows = micro_batch_rows(config.micro_batch, common_rows, world)
        dtype = compute_dtype(config.dtype, world.device)
        base, shape, tokenizer = open_model(config.base)
        if config.data == "smoltalk":
            with world.leader_first("smoltalk"):
                if world.leads:
                    download_smoltalk()
        rows, held_out_rows = (split_rows(split, config, tokenizer, shape.context, world) for split in SPLITS)
        train, held_out = conversation_digests(rows), conversation_digests(held_out_rows)
        if same := len(set(train) & set(held_out)):
            log.info("%d conversations are in training and in validation", same)
        rows.batch(0, 1)  # so that what is wrong with the data shows before anything is made
        loop = replace(config.loop, steps=max(config.loop.steps, epoch_steps(config, rows)))
        with world.leader_first(f"open {config.out}"):
            if world.leads:
                stack.enter_context(run_lock(config.out))
                open_run(config.out, config, config.resume != "no")
            check_tokenizer(config.out / TOKENIZER, tokenizer)
        with torch.device("meta"):
            model = GPT(shape, dtype)
        use_fp8(model, config.dtype)
        parallelize(model, world, config.recompute, compiles(config.compile, world.device, loop.steps))
        check_memory(model, world, micro_rows)
        materialize(model, world.device, config.seed)
        load_weights(model, base)
        optimizer = MuonAdamW(model, config.optim)
        start, state = resume_from(config.out, config.resume, model, optimizer, world)
        data_id = hashlib.sha256(b"".join(train)).hexdigest()
        if state and state.get("data") != data_id:
            raise ValueError(f"{config.out} was started on other conversations than {config.data} holds now")
        if config.micro_batch == "auto":
            micro_rows = largest_that_fits(model, common_rows, world)
        epochs = rows_in_all(config.schedule, config.batch_rows, loop.steps) / rows.epoch_rows()
        log.info(
            "%s: %d conversations in %d rows, %.1f epochs", config.out, len(train), rows.epoch_rows(), epochs
        )
        evaluate = partial(validation, model, held_out_rows, tokenizer, micro_rows, world)
        last = fit(
            loop, config.schedule, model, optimizer, tokenizer,
            prefetch(step_batches(rows, batch_rows=config.batch_rows, micro_rows=micro_rows, start=start,
                                  rank=world.rank, world=world.size,
                                  share=rows_share(config.schedule, loop.steps))),
            next_token_loss, world=world, run=config.out, start=start,
            state=state | {"stage": "sft", "data": data_id}, evaluate=evaluate, profile=profile,
        )  # fmt: skip
        if world.leads:
            write_report(config.out)
        return last


def split_rows(split: str, config: SFTConfig, tokenizer: Tokenizer, T: int, world: World) -> PackedRows:
    """The rows of a split of the conversations; those that are trained on are shuffled."""
    from tqdm import tqdm

    conversations = tqdm(
        conversations_of(split, config.data, config.seed), split, unit=" conversations", unit_scale=True,
        disable=None if world.leads else True, leave=False,
    )  # fmt: skip
    return conversation_rows(conversations, tokenizer, T, config.seed, shuffle=split == "train")


def epoch_steps(config: SFTConfig, rows: PackedRows) -> int:
    """Steps in which each row is seen config.epochs times; stages count as long as they are."""
    rows_a_step = statistics.fmean(stage_rows(config.schedule, config.batch_rows))
    return math.ceil(config.epochs * rows.epoch_rows() / rows_a_step)


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """The run's tokenizer is the base model's, and stays so when the run goes on."""
    if not path.exists():
        tokenizer.save(path)
    elif (saved := Tokenizer.load(path)).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{path} has sha256 {saved.sha256[:12]}..., the base tokenizer {tokenizer.sha256[:12]}...; "
            "a run goes on with the base that it started from"
        )


def main(arguments: list[str]) -> None:
    """`hotlap sft`."""
    config = options.parse(SFTConfig, arguments, command="sft")
    fine_tune(config)
    print(f"talk to it: python chat.py {config.out}")
