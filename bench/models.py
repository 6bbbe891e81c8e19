"""The models that benchmarks use, by name, and the distribution of document lengths."""

from __future__ import annotations

from hotlap.common.errors import known
from hotlap.model.config import GPTConfig

MODELS = {
    "tiny": GPTConfig(
        vocab_size=4096, context=256, layers=4, width=192, heads=3, kv_heads=3, value_embeddings=False
    ),
    "124m": GPTConfig(
        vocab_size=50304, context=1024, layers=12, width=768, heads=6, kv_heads=6, window_pattern="L",
        value_embeddings=False, residual_scalars=False, smear=False, backout=False,
    ),
    "d12": GPTConfig.from_depth(12),
    "d20": GPTConfig.from_depth(20),
    "d24": GPTConfig.from_depth(24),
}  # fmt: skip
ROWS = {"tiny": 16, "124m": 64, "d12": 32, "d20": 32, "d24": 16}  # per step, on a GPU with 80 GB
MEDIAN_DOCUMENT, SPREAD = 400, 1.04  # lognormal lengths in tokens, with the median and mean of FineWeb
# nanochat's MFU at these depths on eight H100s, in bf16: 41 % in dev/LOG.md of 2026-01-12; run 1 of
# dev/LEADERBOARD.md took 10949 s for 4.331e19 FLOPs.
NANOCHAT_MFU = {"d12": 0.41, "d24": 0.50}


def model_config(name: str) -> GPTConfig:
    return MODELS[known(name, MODELS, "model")]
