"""What configures the training stages. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

from hotlap.common.checks import at_least, positive
from hotlap.model.config import GPT2Config, GPTConfig
from hotlap.train.data.mixtures import parts_of
from hotlap.train.optim.schedule import ScheduleConfig, rows_in_all

T = TypeVar("T")


Recompute = Literal["none", "block", "selective"]
Dtype = Literal["auto", "float32", "bfloat16", "fp8"]
Policy = Literal["stop", "skip"]
Tracker = Literal["none", "wandb", "trackio", "tensorboard"]
PreferenceLoss = Literal["sigmoid", "sigmoid_norm", "ipo", "apo_zero", "robust"]

# Passes over a text, each of which is worth less than the one before (Muennighoff et al., 2023).
MOST_EPOCHS = 4


@dataclass(frozen=True)
class OptimConfig:
    """Peak learning rates and weight decay; the schedule scales them over the run."""

    matrix_lr: float = 0.02
    """Muon's learning rate for the block matrices."""
    embedding_lr: float = 0.3
    """AdamW's learning rate for the token embedding; bigrams and value embeddings use half of it."""
    head_lr: float = 0.008
    """AdamW's learning rate for the output head."""
    scalar_lr: float = 0.5
    """AdamW's learning rate for the x0 scalars; residual scalars use a hundredth of it."""
    adapter_lr: float = 0.003
    """AdamW's learning rate for adapters (lora-rank) at width 768, ten times 3e-4, which AdamW would take for
    all weights; it falls with the root of the width."""
    adamw_lr: float = 6e-4
    """AdamW's learning rate for all weights of a GPT-2, for which the four above have no meaning."""
    weight_decay: float = 0.28
    """Cautious weight decay of the block matrices, or AdamW's of all matrices of a GPT-2, multiplied by the
    learning rate at each step."""
    adamw_decay: float = 1.0
    """Multiplies AdamW's weight decays: 0.001 of the embedding, 0.05 of bigrams, 0.01 of value embeddings and
    head."""

    def validate(self) -> OptimConfig:
        positive(self, "matrix_lr", "embedding_lr", "head_lr", "scalar_lr", "adapter_lr", "adamw_lr")
        at_least(self, 0, "weight_decay", "adamw_decay")
        return self


@dataclass(frozen=True)
class LoopConfig:
    """Length of the run, validation, checkpoints, and what to do about bad steps."""

    steps: int
    """Optimiser steps in the run."""
    evaluate_every: int = 250
    """Steps between validations; the last step always validates."""
    save_every: int = 250
    """Steps between checkpoints; the last step always saves."""
    clip: float = 0.0
    """Clip gradients to this norm; 0 disables clipping."""
    bad_steps: Policy = "stop"
    """stop: stop the run on a NaN or infinite loss or gradient, and only log spikes.
    skip: skip the step in both cases."""
    minutes: float = 0.0
    """Stop after this many minutes of training (compilation, validation, saving excluded); 0: no limit.
    Schedules then follow elapsed time, not steps."""

    def validate(self) -> LoopConfig:
        at_least(self, 1, "steps", "evaluate_every", "save_every")
        at_least(self, 0, "clip", "minutes", zero="off")
        return self


@dataclass(frozen=True)
class StageConfig:
    """The fields that all stages share."""

    sequences: ClassVar[int] = 1
    """Sequences of the model's context that a row consists of."""
    out: Path
    """Run directory, for configuration, metrics, checkpoints and report."""
    batch_rows: int = 16
    """Rows per step over all ranks; a row is as long as the model's context."""
    micro_batch: str = "all"
    """Rows per forward pass on each rank: a number, all, or auto (as many as fit in memory)."""
    recompute: Recompute = "none"
    """Activation checkpointing: none, whole blocks (block), or all but matmuls and attention (selective)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(1000))
    seed: int = 0
    """Random seed for initial weights and data order."""
    dtype: Dtype = "auto"
    """Compute dtype. auto: bfloat16 or float32, whichever is faster here. fp8: for large matmuls, else
    bfloat16."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile. auto: on a GPU only."""
    profile: bool = False
    """Write a profiler trace of a few steps, and on a GPU a memory snapshot."""
    tracker: Tracker = "none"
    """Send the metrics to wandb, trackio or tensorboard, too (pip install 'hotlap[trackers]')."""
    resume: str = "no"
    """no, auto (resume from the newest intact checkpoint), or the path of a checkpoint to resume from."""
    eval_only: bool = False
    """Print the validation of the run's newest checkpoint, or of --resume CHECKPOINT, or of the weights that
    a new run begins with, and end. Writes nothing."""

    def validate(self: T) -> T:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 1, "batch_rows")
        at_least(self, 0, "seed")
        self.optim.validate()
        self.loop.validate()
        self.schedule.validate(self.loop.minutes)
        return self


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Train a base model on text."""

    out: Path = Path("runs/pretrain")
    data: str = "pydocs"
    """pydocs (Python's documentation), docs (this machine's), shakespeare, bigbench, text or .jsonl files,
    or a folder of token shards."""
    tokenizer: str = "bpe"
    """bpe (with model.vocab-size tokens) or characters, trained on the data; gpt2; or a tokenizer.json."""
    model: GPTConfig = field(default_factory=GPTConfig)
    base: Path | None = None
    """Start from this run or model, in its shape and with its tokenizer; None starts from random weights."""
    most_epochs: int = MOST_EPOCHS
    """A run that ends by the clock (loop.minutes) also ends after so many passes over a single shard."""
    validation_tokens: int = 0
    """Tokens to validate on, from the start of the validation split; 0 means all."""

    @classmethod
    def start(cls, table: dict) -> PretrainConfig:
        """The defaults for what a configuration file holds: those of a GPT-2, if it is of a run of one."""
        model = table.get("model")
        return GPT2PretrainConfig() if isinstance(model, dict) and "architecture" in model else cls()

    @property
    def tokens(self) -> int:
        """Training tokens of the run, unless it ends by the clock."""
        return rows_in_all(self.schedule, self.batch_rows, self.loop.steps) * self.model.context

    def validate(self) -> PretrainConfig:
        super().validate()
        at_least(self, 1, "most_epochs")
        at_least(self, 0, "validation_tokens", zero="all")
        self.model.validate()
        return self


@dataclass(frozen=True)
class GPT2PretrainConfig(PretrainConfig):
    """Train a GPT-2 on text: its shape has other flags than that of our own models."""

    model: GPT2Config = field(default_factory=GPT2Config)


# Of stages that come after fine-tuning and change the model a little: a twentieth of fine-tuning's rates.
LATER_OPTIM = OptimConfig(
    matrix_lr=0.001, embedding_lr=0.015, head_lr=0.0004, scalar_lr=0.025, adapter_lr=0.001, adamw_lr=3e-6,
    weight_decay=0.0,
)  # fmt: skip
LATER_SCHEDULE = ScheduleConfig(warmup_steps=10, warmdown=0.5, final_lr=0.0, momentum_warmup_steps=100)


@dataclass(frozen=True)
class TuneConfig(StageConfig):
    """The fields that all stages share which start from a model."""

    base: Path = Path("runs/pretrain")
    """Model to start from: a run or model directory."""
    lora_rank: int = 0
    """Train adapters of this rank (LoRA) and keep the model as it is; 0 trains all weights."""
    lora_alpha: float = 32.0
    """The adapters' output is multiplied by this, divided by the rank."""

    def validate(self: T) -> T:
        super().validate()
        at_least(self, 0, "lora_rank", zero="all weights")
        positive(self, "lora_alpha")
        return self


@dataclass(frozen=True)
class SFTConfig(TuneConfig):
    """Fine-tune a base model on conversations."""

    out: Path = Path("runs/sft")
    model_field: ClassVar[str] = "base"
    base: Path = Path("runs/pretrain")
    """Base model to fine-tune: a run or model directory."""
    data: tuple[str, ...] = ("tasks",)
    """A mixture, of NAME or NAME:WEIGHT each. WEIGHT: passes over it in an epoch (0.5: over a random half).
    NAME: tasks, or one of facts, arithmetic, spelling, greetings, refusals; smoltalk, gsm8k, mmlu, bigbench
    (which are downloaded); or a .jsonl or .parquet file with records {"messages": [...]}."""
    epochs: float = 0.0
    """Train for at least this many passes over the conversations, even beyond loop.steps."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(adamw_lr=6e-5, weight_decay=0.0))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(
            warmup_steps=0, warmdown=0.5, final_lr=0.0, momentum_warmup_steps=300
        )
    )
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(500))

    def validate(self) -> SFTConfig:
        super().validate()
        at_least(self, 0, "epochs", zero="only loop.steps count")
        parts_of(self.data)
        return replace(self, data=(self.data,)) if isinstance(self.data, str) else self


@dataclass(frozen=True)
class DPOConfig(TuneConfig):
    """Train a chat model on pairs of a preferred and another answer (a row is two sides of such pairs)."""

    sequences: ClassVar[int] = 2
    out: Path = Path("runs/dpo")
    batch_rows: int = 16
    """Rows per step over all ranks; a row is as many pairs as fit in two sides of the model's context."""
    model_field: ClassVar[str] = "base"
    base: Path = Path("runs/sft")
    """Chat model to start from, and to stay close to: a run or model directory."""
    data: tuple[str, ...] = ("tasks",)
    """tasks (the base's own answers about Python, asked for here), ultrafeedback (a download), and files.
    Files are .jsonl or .parquet, with records {"prompt", "chosen", "rejected"}."""
    loss: PreferenceLoss = "sigmoid"
    """sigmoid is DPO; docs/preferences.md says what the others are for."""
    beta: float = 0.5
    """How much of a change of the answers' likelihood counts as a preference. Higher stays closer to the
    base; for sigmoid_norm about 10 times as high."""
    label_smoothing: float = 0.0
    """For robust: the share of pairs that are the wrong way round, less than 0.5."""
    sft_weight: float = 5.0
    """Weight of a second term, the chosen answers' negative log-likelihood a token. 0: DPO alone, for models
    that do give the chosen answers."""
    epochs: float = 1.0
    """Train for at least this many passes over the pairs, even beyond loop.steps."""
    optim: OptimConfig = LATER_OPTIM
    schedule: ScheduleConfig = LATER_SCHEDULE
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(1))

    def validate(self) -> DPOConfig:
        super().validate()
        positive(self, "beta")
        at_least(self, 0, "sft_weight", zero="none")
        at_least(self, 0, "epochs", zero="only loop.steps count")
        if not self.data:
            raise ValueError("no --data; name tasks, ultrafeedback or files")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be from 0 to less than 0.5")
        if (self.loss == "robust") != (self.label_smoothing > 0):
            raise ValueError(
                f"loss={self.loss} with label_smoothing={self.label_smoothing:g}: robust needs it above 0, "
                "the other losses do not use it"
            )
        return self


@dataclass(frozen=True)
class ReportConfig:
    """Rewrite a run's report.md, curves.png and model_card.md."""

    model_field: ClassVar[str] = "run"
    run: Path = Path("runs/pretrain")
    """Run directory."""
