"""Supervised fine-tuning: from a base model to one that answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from hotlap.kernels.dispatch import default_device
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER, load_model, model_folder
from hotlap.train.conversations import (
    built_in,
    conversation_rows,
    read_conversations,
    split_conversations,
)  # fmt: skip
from hotlap.train.data import check_rows, prefetch, step_batches
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


@dataclass(frozen=True)
class SFTConfig:
    """Teach a base model to converse."""

    run: Path = Path("runs/sft")
    """Directory of the run."""
    base: Path = Path("runs/pretrain")
    """Run or model directory to start from."""
    data: str = "tasks"
    """tasks (facts, sums, spelling, greetings), or a .jsonl file of {"messages": [...]} lines."""
    batch_rows: int = 16
    """Rows of the model's context in a step."""
    micro_rows: int = 0
    """Rows that go through the model at once; 0 is all of the step's."""
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
    resume: bool = False
    """Go on with the run where it stopped."""

    def validate(self) -> SFTConfig:
        if self.batch_rows < 1 or self.micro_rows < 0:
            raise ValueError("batch_rows must be at least 1, micro_rows 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        check_rows(self.batch_rows, self.micro_rows or self.batch_rows)
        self.optim.validate()
        self.loop.validate()
        self.schedule.validate(self.loop.steps)
        return self


def fine_tune(config: SFTConfig) -> dict[str, float]:
    """Run the fine-tuning that config describes, and return its last metrics."""
    config = config.validate()
    device = default_device()
    base = model_folder(config.base)
    model, tokenizer = load_model(base, device, compute_dtype(config.dtype, device))
    train, held_out = split_conversations(conversations(config))
    if same := len(
        {json.dumps(c, sort_keys=True) for c in train} & {json.dumps(c, sort_keys=True) for c in held_out}
    ):
        log.info("%d conversations are in training and in validation", same)
    T = model.config.context
    rows = conversation_rows(train, tokenizer, T, config.seed, shuffle=True)
    held_out_rows = conversation_rows(held_out, tokenizer, T, config.seed, shuffle=False)
    step_rows = {
        "batch_rows": config.batch_rows,
        "micro_rows": config.micro_rows or config.batch_rows,
    }
    next(step_batches(rows, **step_rows))
    with joined() as world, run_lock(config.run):
        open_run(config.run, config, config.resume)
        check_tokenizer(config.run / TOKENIZER, tokenizer)
        model.train()
        optimizer = MuonAdamW(model, config.optim)
        start, state = resume_from(
            config.run, "auto" if config.resume else "no", model, optimizer, world
        )  # fmt: skip
        data_id = hashlib.sha256(json.dumps(train).encode()).hexdigest()
        if state and state.get("data") != data_id:
            raise ValueError(f"{config.run} was started on other conversations than {config.data} holds now")
        epochs = config.loop.steps * config.batch_rows / rows.epoch_rows()
        log.info(
            "%s: %d conversations in %d rows, %.1f epochs",
            config.run,
            len(train),
            rows.epoch_rows(),
            epochs,
        )
        prepare_model(model, config.dtype, config.compile, config.loop.steps - start)
        kept = state | {"stage": "sft", "data": data_id}
        evaluate = partial(validation, model, held_out_rows, tokenizer, step_rows["micro_rows"])
        last = fit(
            config.loop, config.schedule, model, optimizer, tokenizer,
            prefetch(step_batches(rows, start=start, **step_rows)), next_token_loss,
            run=config.run, start=start, state=kept, evaluate=evaluate,
        )  # fmt: skip
        write_report(config.run)
        return last


def conversations(config: SFTConfig) -> list[list[dict]]:
    if config.data == "tasks":
        return built_in(split_documents("pydocs")[0], config.seed)
    return read_conversations(Path(config.data))


def check_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """The run's tokenizer is the base model's, and stays so when the run goes on."""
    if not path.exists():
        tokenizer.save(path)
    elif (saved := Tokenizer.load(path)).sha256 != tokenizer.sha256:
        raise ValueError(
            f"{path} has sha256 {saved.sha256[:12]}..., the base tokenizer {tokenizer.sha256[:12]}...; "
            "a run goes on with the base that it started from"
        )
