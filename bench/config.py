"""What configures the benchmarks. Imports no torch, so that flags are read at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from hotlap.common.checks import TOO_LARGE, at_least, positive
from hotlap.common.memory import require_memory
from hotlap.common.options import Flags

CONTEXT = 2048  # tokens of a row
MOST_STREAMS = 1024  # connections to a server at once
NARROWEST = 768  # width of the smallest model that is measured


@dataclass(frozen=True)
class KernelsConfig:
    """Measure each operation: ours against torch, torch.compile, and other installed libraries."""

    operations: tuple[str, ...] = ()
    """Any of attention, windowed_attention, document_attention, long_attention, linear_relu2,
    linear_cross_entropy, orthogonalize, muon, linear_fp8, rms_norm, rms_norm_residual, attention_inputs,
    decode_attention, decode_linear, cross_entropy, embedding, relu2 and linear_cross_entropy_uncapped; by
    default, all that the device supports. attention_lengths (rows of 1k to 16k tokens) must be named."""
    sizes: tuple[str, ...] = ()
    """The models whose widths are measured: d12, d24; both by default."""
    rows: int = 0
    """Number of tokens, up to 2048 or a multiple of it; 0: 16384 on a GPU, 1024 on a CPU."""
    seconds: float = 0.2
    """Measuring time of each provider in each direction."""
    compile: bool = True
    """Include torch.compile, which takes a while to compile."""
    minutes: float = 0
    """Stop starting new cases after this many minutes, and list those skipped; 0: no limit."""
    resume: bool = False
    """Continue an earlier run in the same folder, skipping providers that failed or hung."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""

    def validate(self) -> KernelsConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        positive(self, "seconds")
        at_least(self, 0, "rows", zero="a usual number")
        at_least(self, 0, "minutes", zero="no limit")
        if self.rows > CONTEXT and self.rows % CONTEXT:
            raise ValueError(f"rows={self.rows} must be at most {CONTEXT} or a multiple of it")
        require_memory(f"rows={self.rows}", self.rows * 2 * NARROWEST, "lower --rows")
        return self


@dataclass(frozen=True)
class TrainingConfig:
    """Measure training steps on random tokens: tokens/s, MFU, memory, and the time of each part."""

    models: tuple[str, ...] = ()
    """Any of tiny, 124m, d12, d20 and d24; the default is tiny on a CPU, all others on a GPU."""
    rows: int = 0
    """Rows per forward pass; 0: a usual number, halved until it fits in memory."""
    micro_batches: int = 1
    """Forward and backward passes per step (gradient accumulation)."""
    steps: int = 10
    """Steps to measure, after two warm-up steps."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block; auto: on a GPU only."""
    fp8: bool = False
    """Run large matmuls in fp8."""
    without: bool = False
    """Measure again with each Triton kernel switched off, and with all of them off."""
    minutes: float = 0
    """Stop starting new cases after this many minutes, and list those skipped; 0: no limit."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""

    def validate(self) -> TrainingConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 1, "steps", "micro_batches")
        at_least(self, 0, "rows", zero="a usual number")
        at_least(self, 0, "minutes", zero="no limit")
        return self


@dataclass(frozen=True)
class SpeedrunConfig:
    """Measure a speedrun's training step beside the records: tokens/s, MFU, memory, and the time of a whole
    run.
    """

    recipe: str = ""
    """A preset of `hotlap pretrain`, or gpt2-grade; the default is gpt2-grade on a GPU and tiny on a CPU."""
    rows: int = 0
    """Rows per forward pass on each rank; 0: the recipe's, or fewer if they do not fit in memory."""
    steps: int = 10
    """Steps to measure, after two warm-up steps."""
    data: Path | None = None
    """Folder of token shards to read; random tokens by default."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile each block; auto: on a GPU only."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""

    def validate(self) -> SpeedrunConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 1, "steps")
        at_least(self, 0, "rows", zero="the recipe's")
        return self


@dataclass(frozen=True)
class InferenceConfig:
    """Measure generation: time to first token, then decoding at several batch sizes."""

    model: str = ""
    """One of tiny, 124m, d12, d20 and d24; the default is tiny on a CPU and d24 on a GPU."""
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    """Batch sizes: sequences decoded at once."""
    prompt: int = 0
    """Prompt length in tokens; 0: half the model's context."""
    nanochat: Path | None = None
    """Your checkout of nanochat, to measure its engine's steps beside ours."""
    minutes: float = 0
    """Stop starting new cases after this many minutes, and list those skipped; 0: no limit."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""

    def validate(self) -> InferenceConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 0, "prompt", zero="half the context")
        at_least(self, 0, "minutes", zero="no limit")
        if not self.batches or not all(1 <= batch < TOO_LARGE for batch in self.batches):
            raise ValueError(f"batches={self.batches} must be numbers of at least 1, and less than 2^63")
        return self


@dataclass(frozen=True)
class ServingConfig:
    """Measure a server from outside: tokens/s and waiting times, with one stream and with many at once."""

    model_field: ClassVar[str] = "model"
    model: Path | None = None
    """Run, checkpoint or model directory to serve; the newest under runs/ by default."""
    url: str = ""
    """Address of a server that is running, of any kind that has OpenAI's /v1/completions."""
    streams: tuple[int, ...] = (1, 4, 16)
    """Numbers of users, each of whom asks again as soon as an answer is there."""
    prompt: int = 64
    """Tokens of each prompt; they are random, so that nothing can be reused."""
    tokens: int = 64
    """Longest answer in tokens."""
    seconds: float = 20
    """Time for each number of users."""
    requests: int = 0
    """Then send this many short requests, and compare the server's memory before and after."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""

    def validate(self) -> ServingConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        if not self.streams or not all(1 <= count <= MOST_STREAMS for count in self.streams):
            raise ValueError(f"streams={self.streams} must be numbers from 1 to {MOST_STREAMS}")
        at_least(self, 1, "prompt", "tokens")
        positive(self, "seconds")
        at_least(self, 0, "requests", zero="none")
        if self.url and not self.url.startswith("http://"):
            raise ValueError(f"url={self.url} must begin with http://")
        return self


@dataclass(frozen=True)
class PeersConfig:
    """Time a whole training step (forward, backward, optimizer) of peers and of hotlap at the same shape and
    batch. Or, with --race, whole runs of nanoGPT's recipe for a CPU and of ours.

    As the peers' scripts mask no documents, neither do we here.
    """

    nanogpt: Path | None = None
    """Your checkout of nanoGPT."""
    nanochat: Path | None = None
    """Your checkout of nanochat; its requirements must be installed."""
    modded: Path | None = None
    """Your checkout of modded-nanogpt, with its data; it is compared with our 124m, at its scripts' batch."""
    race: str = ""
    """Train on this text with nanoGPT's recipe and ours, in turns: a file, or shakespeare (downloaded)."""
    models: tuple[str, ...] = ()
    """Any of tiny, 124m, d12, d20 and d24; the default is tiny on a CPU; 124m, d12 and d24 on a GPU."""
    rows: int = 0
    """Rows per forward pass; 0: a usual number for the model."""
    micro_batches: int = 1
    """Forward and backward passes per step (gradient accumulation)."""
    window_pattern: str = ""
    """Attention windows of both sides beside nanochat: S and L by layer; empty: those of the model.
    Without FlashAttention 3, nanochat recommends L, because windows need a slow mask."""
    fp8: bool = False
    """Beside nanochat, run large matmuls in fp8, each side in its own way. nanoGPT has no fp8."""
    seconds: float = 5.0
    """Measuring time of each step."""
    minutes: float = 0
    """Stop starting new pairs after this many minutes, and list those skipped; 0: no limit."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""

    def validate(self) -> PeersConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        positive(self, "seconds")
        at_least(self, 0, "rows", zero="a usual number")
        at_least(self, 1, "micro_batches")
        at_least(self, 0, "minutes", zero="no limit")
        return self


@dataclass(frozen=True)
class RecordsConfig:
    """Write the table of records from the files in a folder, after adding one whose claims all hold."""

    add: Path | None = None
    """A record.json with its runs beside it; it is verified, then copied."""
    out: Path = Path("bench/records")
    """Folder of the records, and of the page and the picture that are made from them."""

    def validate(self) -> RecordsConfig:
        """Return self: there is no number to check."""
        return self


@dataclass(frozen=True)
class StaticConfig:
    """Compile every kernel for six GPU architectures, and fail if one would run badly."""

    arch: tuple[str, ...] = ()
    """Architectures, of sm_80, sm_89, sm_90, sm_100, sm_120 and gfx942; all by default."""
    kernel: tuple[str, ...] = ()
    """Kernel files, such as rms_norm; all by default."""
    all: bool = False
    """Compile all tiles, and float16 too, not only the default tiles."""


@dataclass(frozen=True)
class TuneConfig:
    """Find the fastest tiles for every kernel on this GPU, and use them in later runs."""

    kernel: tuple[str, ...] = ()
    """Kernel files, such as rms_norm; attention tunes the choice of its backend. All by default."""
    seconds: float = 0.05
    """Measuring time of each tile."""

    def validate(self) -> TuneConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        positive(self, "seconds")
        return self


@dataclass(frozen=True)
class SuiteConfig:
    """Run the phases of a call, and pack the results into one file."""

    call: str
    """look, check or figures."""
    out: Path | None = None
    """Empty folder for the results, packed into OUT.tar.gz beside it; CALL-DATE by default."""
    cache: Path | None = None
    """Folder for the caches of Triton and Inductor, to copy to another machine; their own by default."""
    minutes: float = 0
    """Time limit for the call; 0: its default. Phases that do not fit are listed."""
    phases: tuple[str, ...] = ()
    """Phases to run; all by default."""

    def validate(self) -> SuiteConfig:
        """Return self, or raise ValueError naming the first invalid field."""
        at_least(self, 0, "minutes", zero="the call's default")
        return self


def suite_flags(call: str, *arguments: str) -> SuiteConfig:
    """The configuration of a suite. Reads flags with argparse, as tyro may be missing."""
    flags = Flags(prog=f"hotlap bench {call}", description=SuiteConfig.__doc__)
    flags.add_argument("--out", type=Path, help="empty folder for the results; CALL-DATE by default")
    flags.add_argument("--cache", type=Path, help="folder for the caches of Triton and Inductor")
    flags.add_argument("--minutes", type=float, default=0, help="time limit for the call")
    flags.add_argument("--phases", nargs="*", default=(), help="phases to run; all by default")
    flags.add_argument("--debug", action="store_true", help="show the traceback of an error")
    given = flags.parse_args(arguments)
    return SuiteConfig(call, given.out, given.cache, given.minutes, tuple(given.phases))
