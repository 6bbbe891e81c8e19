"""Other projects' records as data, and the throughput and hourly price to expect of a machine.

Every figure comes from the project's own repository, cited in `source`. Tokens/s, ms per step and MFU are
computed from the figures. `stated_mfu` is the MFU that a record is known by, and `formula` what it counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hotlap.model.flops import PEAK_BF16, of_card

# FLOPs per token for MFU: 6 for each matmul weight, plus attention: none, causal on average (6 L D T), or
# full windows (12 L D T; hotlap.model.flops.nanochat_flops).
SIX_N, CAUSAL, FULL = "6N", "6N + causal attention", "6N + attention over full windows"

GPT2_124M, GPT2_350M, GPT2_GRADE, MINUTES = "gpt2-124m", "gpt2-350m", "gpt2-grade", "minutes"
GOALS = {
    GPT2_124M: "loss of 3.28 on FineWeb",
    GPT2_350M: "loss of 2.92 on FineWeb",
    GPT2_GRADE: "CORE of 0.256525",
    MINUTES: "bits per byte on ClimbMix after 300 s",
}

DEFAULT_MFU = 0.35  # for a GPU without a record here


@dataclass(frozen=True)
class Record:
    """A run of another project."""

    name: str
    project: str
    recipe: str
    """Our recipe with the same goal: one of GOALS, or "" if there is none."""
    date: str
    source: str
    """The repository, and the file in it."""
    device: str
    """A name in PEAK_BF16."""
    gpus: int
    weights: int
    """Matmul parameters."""
    attention: int
    """FLOPs per token for attention, by the formula."""
    formula: str
    """FLOPs that the MFU counts: SIX_N, CAUSAL or FULL."""
    batch: int | None
    """Tokens per step; None if it changes."""
    steps: int
    tokens: int
    seconds: float
    """Training time, without validation."""
    score: float
    metric: str
    """loss (nats per token on FineWeb's first 10,485,760 validation tokens), bpb or CORE."""
    untimed: int = 0
    """Steps not included in `seconds`."""
    stated_mfu: float | None = None
    fp8: bool = False
    """Matmuls in fp8, so the MFU (of the bf16 peak) can exceed 1."""
    bpb: float | None = None
    """Validation bits per byte on the record's own text."""

    @property
    def flops_per_token(self) -> int:
        return 6 * self.weights + self.attention

    @property
    def tokens_per_second(self) -> float:
        """On all GPUs."""
        return self.tokens * (1 - self.untimed / self.steps) / self.seconds

    @property
    def ms_per_step(self) -> float:
        return 1e3 * self.seconds / (self.steps - self.untimed)

    @property
    def mfu(self) -> float:
        """By the record's formula, as a share of the bf16 peak."""
        return self.flops_per_token * self.tokens_per_second / self.gpus / PEAKS[self.device]

    @property
    def nanochat_mfu(self) -> float | None:
        """By nanochat's formula; None if the record does not state its attention."""
        if self.formula == SIX_N:
            return None
        full = self.attention * (2 if self.formula == CAUSAL else 1)
        return self.mfu * (6 * self.weights + full) / self.flops_per_token


PEAKS = dict(PEAK_BF16)

MODDED, NANOCHAT = "KellerJordan/modded-nanogpt", "karpathy/nanochat"
TRACK_1, TRACK_3 = f"{MODDED} records/track_1_short", f"{MODDED} records/track_3_optimization/results"
LEADERBOARD = f"{NANOCHAT} dev/LEADERBOARD.md"
BATCH = 1 << 19

GPT2_WEIGHTS = 12 * 12 * 768**2 + 50304 * 768  # 12 layers of 768, a head of 50304
GPT2_ATTENTION = 6 * 12 * 768 * 1024  # causal, context of 1024
D24_WEIGHTS = 12 * 24 * 1536**2 + 32768 * 1536  # with value gates: 12 layers, 12 heads, 32 or 12 channels
D26_WEIGHTS = 12 * 26 * 1664**2 + 32768 * 1664 + 13 * 13 * 32
D24_HALF, D24_THIRD, D24_QUARTER = (12 * 1536 * (6 * 2048 + 18 * short) for short in (1024, 768, 512))
D26_HALF = 12 * 1664 * (7 * 2048 + 19 * 1024)


def modded(
    number: int, what: str, date: str, log: str, weights: int, attention: int | None, batch: int, steps: int,
    seconds: float, loss: float, mfu: float, untimed: int = 0, fp8: bool = False,
) -> Record:  # fmt: skip
    """A record of modded-nanogpt's main track on eight H100s, from its log."""
    return Record(
        f"#{number} {what}", "modded-nanogpt", GPT2_124M, date, f"{TRACK_1}/{log}", "H100", 8, weights,
        attention or 0, CAUSAL if attention else SIX_N, batch, steps, batch * steps, seconds, loss, "loss",
        untimed, mfu, fp8,
    )  # fmt: skip


def nanochat(
    run: int, what: str, date: str, depth: int, gates: int, attention: int, batch: int, steps: int,
    seconds: float, core: float, bpb: float, fp8: bool = True, mfu: float | None = None,
) -> Record:  # fmt: skip
    """A run of nanochat's leaderboard on eight H100s. It states no steps for runs 4 to 6: they are
    computed from the ratio, as scripts/base_train.py does at the run's commit.
    """
    weights = D24_WEIGHTS + gates if depth == 24 else D26_WEIGHTS
    return Record(
        f"run {run} d{depth} {what}", "nanochat", GPT2_GRADE, date, f"{LEADERBOARD}, run {run}", "H100", 8,
        weights, attention, FULL, batch, steps, batch * steps, seconds, core, "CORE", 10, mfu, fp8, bpb,
    )  # fmt: skip


RECORDS = (
    Record(
        "GPT-2 124M", "nanoGPT", "", "2022-12-29",
        "karpathy/nanoGPT README.md (about 4 days) and config/train_gpt2.py",
        "A100", 8, GPT2_WEIGHTS, 2 * GPT2_ATTENTION, FULL,
        491_520, 600_000, 491_520 * 600_000, 4 * 86400.0, 2.85, "loss on OpenWebText",
    ),
    Record(
        "#1 llm.c", "llm.c", GPT2_124M, "2024-05-28",
        f"{TRACK_1}/2024-10-13_llmc/README.md, of a run with llm.c of 2024-10-13: 140 ms a step",
        "H100", 8, GPT2_WEIGHTS, GPT2_ATTENTION, CAUSAL,
        BATCH, 19_560, BATCH * 19_560, 0.140 * 19_560, 3.2722, "loss", stated_mfu=0.378,
    ),
    modded(
        5, "ReLU^2, QK-norm, zero-init", "2024-10-14",
        "2024-10-14_ModernArch/dabaaddd-237c-4ec9-939d-6608a9ed5e27.txt",
        GPT2_WEIGHTS, GPT2_ATTENTION, BATCH, 5100, 910.546, 3.2741, 0.295, 10,
    ),
    modded(
        7, "torch 2.5", "2024-10-18", "2024-10-18_PyTorch25/d4bfb25f-688d-4da5-8743-33926fad4842.txt",
        GPT2_WEIGHTS, GPT2_ATTENTION, BATCH, 5100, 721.882, 3.2755, 0.373, 10,
    ),
    modded(
        8, "untied head", "2024-11-03", "2024-11-03_UntieEmbed/d6b50d71-f419-4d26-bb39-a60d55ae7a04.txt",
        GPT2_WEIGHTS, GPT2_ATTENTION, BATCH, 4578, 648.063, 3.2762, 0.373, 10,
    ),
    modded(
        10, "bf16 activations", "2024-11-08",
        "2024-11-08_CastBf16/a833bed8-2fa8-4cfe-af05-58c1cc48bc30.txt",
        GPT2_WEIGHTS, GPT2_ATTENTION, BATCH, 3242, 467.607, 3.2781, 0.365, 10,
    ),
    modded(
        12, "FlexAttention over 64K", "2024-11-19",
        "2024-11-19_FlexAttention/8384493d-dba9-4991-b16b-8696953f5e6d.txt",
        GPT2_WEIGHTS, None, BATCH, 1875, 301.825, 3.2783, 0.303, 10,
    ),
    modded(
        20, "under 3 minutes", "2025-01-16", "2025-01-16_Sub3Min/1d3bd93b-a69e-4118-aeb8-8184239d7566.txt",
        GPT2_WEIGHTS - 4 * 768**2, None, BATCH, 1393, 179.527, 3.2785, 0.371, 10, True,
    ),
    modded(
        21, "smaller batch, every step timed", "2025-02-01",
        "2025-02-01_RuleTweak/eff63a8c-2f7e-4fc5-97ce-7f600dae0bc7.txt",
        GPT2_WEIGHTS - 4 * 768**2, None, 393_216, 1770, 179.828, 3.2788, 0.356, fp8=True,
    ),
    modded(
        29, "FlashAttention 3", "2025-09-03", "2025-09-03_FA3/44fc1276-0510-4961-92c0-730c65e5feba.txt",
        GPT2_WEIGHTS - 4 * 768**2, None, 393_216, 1670, 163.621, 3.2755, 0.369, fp8=True,
    ),
    modded(
        40, "backout", "2025-10-04", "2025-10-04_Backout/514e7581-fbd4-4338-a3e4-e556f9c958ce.txt",
        GPT2_WEIGHTS - 16 * 768**2, None, 262_144, 2330, 140.693, 3.2781, 0.376, fp8=True,
    ),
    Record(
        "#89 fp8 down projection", "modded-nanogpt", GPT2_124M, "2026-07-17",
        f"{MODDED} README.md (1.23 minutes) and train_gpt.py at f411b3d3: tokens of its 1,285 steps",
        "H100", 8, GPT2_WEIGHTS - 16 * 768**2, 0, SIX_N, None, 1285, 338_800_000, 73.8, 3.28, "loss",
        stated_mfu=0.397, fp8=True,
    ),
    Record(
        "medium #18", "modded-nanogpt", GPT2_350M, "2025-12-31",
        f"{MODDED} records/track_2_medium/2025-12-31_BulkSmallTrackTransfer",
        "H100", 8, 252_800_000, 0, SIX_N, None, 4740, 2_180_000_000, 1041.071, 2.9165, "loss",
        stated_mfu=0.401, fp8=True,
    ),
    Record(
        "readable baseline", "modded-nanogpt", GPT2_124M, "2026-06-10",
        f"{TRACK_3}/51ece938-03c5-4343-8dcc-3f3336b07008.txt",
        "H100", 8, GPT2_WEIGHTS, GPT2_ATTENTION, CAUSAL, BATCH, 3375, BATCH * 3375, 494.108, 3.27784, "loss",
        stated_mfu=0.361,
    ),
    Record(
        "readable baseline, one H200", "modded-nanogpt", GPT2_124M, "2026-05-17",
        f"{TRACK_3}/20260517_ortho/d5098d67-7c1b-47b4-8833-80960d633d33.txt",
        "H200", 1, GPT2_WEIGHTS, GPT2_ATTENTION, CAUSAL, BATCH, 8500, BATCH * 8500, 9085.461, 3.27093, "loss",
    ),
    Record(
        "readable baseline, four A100s", "modded-nanogpt", GPT2_124M, "2026-05-09",
        f"{TRACK_3}/20260509_contra_muon_split_cooldown/0996e4d1-5fd1-4d9d-8d23-cccdb481f92c.txt",
        "A100", 4, GPT2_WEIGHTS, GPT2_ATTENTION, CAUSAL, BATCH, 3175, BATCH * 3175, 2064.935, 3.28075, "loss",
    ),
    nanochat(
        1, "bf16", "2026-01-29", 24, 4608, D24_HALF, BATCH, 16_704, 10949.46713, 0.25851, 0.74833, False, 0.50
    ),
    nanochat(2, "fp8", "2026-02-02", 26, 0, D26_HALF, BATCH, 14_889, 10493.0, 0.2578, 0.745036),
    nanochat(3, "fp8, 1M batch", "2026-02-05", 26, 0, D26_HALF, 2 * BATCH, 7226, 9922.0, 0.26024, 0.74645),
    nanochat(4, "ClimbMix", "2026-03-04", 24, 4608, D24_HALF, 2 * BATCH, 6612, 2.02 * 3600, 0.25714, 0.71854),
    nanochat(5, "ratio 8.7", "2026-03-09", 24, 1728, D24_THIRD, 2 * BATCH, 6055, 1.80 * 3600, 0.269, 0.71808),
    nanochat(
        6, "ratio 8", "2026-03-14", 24, 1752, D24_QUARTER, 2 * BATCH, 5568, 1.65 * 3600, 0.262634, 0.71800,
        mfu=0.59,
    ),
    Record(
        "baseline", "autoresearch", MINUTES, "2026-03-06",
        "karpathy/autoresearch program.md, the summary that a run prints, and train.py: depth 8, 512 wide",
        "H100", 1, 12 * 8 * 512**2 + 8192 * 512 + 4 * 4 * 32, 12 * 512 * (2 * 2048 + 6 * 1024), FULL,
        BATCH, 953, 953 * BATCH, 300.1, 0.9979, "bpb", 10, 0.398, bpb=0.9979,
    ),
)  # fmt: skip

# Our own steps on one GPU, in bf16: what is measured, the card, FLOPs per token and MFU by nanochat's formula
# (bench/results/nvidia-h100-80gb-hbm3/training.json).
OURS = (
    ("d12, 4 x 32 rows a step", "H100", 759_696_048, 0.4403),
    ("d24, 4 x 16 rows a step", "H100", 4_775_225_616, 0.5289),
)

# Dollars per hour of one GPU.
PRICES = {
    "H100": (3.0, f"{NANOCHAT} README.md of 2026: about $3, $24 for eight"),
    "A100": (1.75, "karpathy/llm.c scripts/run_gpt2_124M.sh of 2024: $14 for eight of 80 GB"),
}


@dataclass(frozen=True)
class Throughput:
    """Expected tokens/s of a machine, the MFU (nanochat's formula), and where that MFU comes from."""

    tokens_per_second: float
    mfu: float
    assumes: str


def of_recipe(recipe: str) -> list[Record]:
    """The records of a recipe, oldest first."""
    return sorted((t for t in RECORDS if t.recipe == recipe), key=lambda t: t.date)


def card(name: str) -> str | None:
    """The name in PEAK_BF16 of a GPU with the driver's name `name`, or None."""
    return of_card(tuple((words, words) for words in PEAKS), name)


def throughput(name: str, gpus: int, flops_per_token: float) -> Throughput | None:
    """Expected throughput in bf16 of `gpus` GPUs with the driver's name `name`; None if its peak is unknown.

    The MFU is what we measured on one such GPU, or else that of the bf16 record on it, at the most similar
    FLOPs per token (nanochat's formula). We have measured no group of GPUs.
    """
    words = card(name)
    if words is None:
        return None
    ours = [(what, flops, mfu) for what, device, flops, mfu in OURS if device == words]
    if gpus == 1 and ours:
        what, _, mfu = min(ours, key=lambda row: abs(math.log(row[1] / flops_per_token)))
        assumes = f"{mfu:.0%} MFU, as measured with hotlap on one {words} ({what})"
        return Throughput(mfu * PEAKS[words] / flops_per_token, mfu, assumes)
    records = [t for t in RECORDS if t.device == words and t.nanochat_mfu is not None and not t.fp8]
    if records:
        near = min(records, key=lambda t: abs(math.log(t.flops_per_token / flops_per_token)))
        mfu = near.nanochat_mfu
        assumes = f"{mfu:.0%} MFU, as {near.project}'s {near.name} on {near.gpus} {words}"
    else:
        mfu = DEFAULT_MFU
        assumes = f"{mfu:.0%} MFU, as there is no record on the {words}"
    return Throughput(mfu * PEAKS[words] * gpus / flops_per_token, mfu, assumes)


def dollars_per_hour(name: str, gpus: int = 1) -> tuple[float, str] | None:
    """The hourly price of `gpus` GPUs of that name, and its source; None if unknown."""
    price = PRICES.get(card(name) or "")
    return price and (price[0] * gpus, price[1])
