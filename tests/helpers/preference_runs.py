"""Small DPO runs and what they need, also on several ranks."""

import json
from pathlib import Path

import torch
from helpers.run_functions import GENTLE, metrics
from helpers.small_runs import small_run, write_conversations, write_whole

from hotlap.train.config import DPOConfig, SFTConfig
from hotlap.train.distributed.world import joined
from hotlap.train.dpo import optimize_preferences
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.pretrain import pretrain
from hotlap.train.sft import fine_tune


def write_pairs(path: Path, count: int = 40) -> Path:
    """Pairs in characters that `write_text` has."""
    records = [
        {"prompt": f"square of {i}", "chosen": f"is {i * i}.", "rejected": f"so {i}, on."}
        for i in range(count)
    ]
    return write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def make_base(folder: Path) -> Path:
    """A tiny chat model."""
    pretrain(small_run(folder, out=folder / "pretrain", loop=LoopConfig(6, 6, 6)))
    data = str(write_conversations(folder / "talks.jsonl"))
    fine_tune(
        SFTConfig(
            out=folder / "base", base=folder / "pretrain", data=data, batch_rows=4, dtype="float32",
            compile="off", loop=LoopConfig(6, 6, 6),
        )
    )  # fmt: skip
    return folder / "base"


def config_of(folder: Path, name: str, base: Path, **fields) -> DPOConfig:
    """Four rows of pairs a step. The rates are gentle, as in run_functions."""
    fields = {
        "data": (str(write_pairs(folder / "pairs.jsonl")),), "batch_rows": 4, "dtype": "float32",
        "compile": "off", "optim": GENTLE, "schedule": ScheduleConfig(warmup_steps=2),
        "loop": LoopConfig(4, 4, 2), "epochs": 0.0, "sft_weight": 0.0,
    } | fields  # fmt: skip
    return DPOConfig(out=folder / name, base=base, **fields)


def preferring(
    folder: str, name: str, base: str, micro_batch: str, dtype: str = "float32", lora_rank: int = 0
) -> list[dict]:
    """Train on all ranks; the lines of metrics.jsonl."""
    torch.set_num_threads(1)
    fields = {"micro_batch": micro_batch, "dtype": dtype, "lora_rank": lora_rank}
    config = config_of(Path(folder), name, Path(base), **fields)
    with joined(30):
        optimize_preferences(config)
    return metrics(Path(folder) / name)
