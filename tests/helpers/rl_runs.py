"""Small reinforcement-learning runs and what they need, also on several ranks."""

import json
from pathlib import Path

import torch
from helpers.run_functions import GENTLE, metrics
from helpers.small_runs import write_whole

from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.rl import reinforce
from hotlap.train.rl_config import RLConfig


def write_prompts(path: Path, count: int = 40) -> Path:
    """Questions in characters that `write_text` has."""
    return write_whole(path, "".join(json.dumps({"prompt": f"square of {i}"}) + "\n" for i in range(count)))


def config_of(folder: Path, name: str, base: Path, reward: str = "vowels", **fields) -> RLConfig:
    """Two groups of four answers a step."""
    fields = {
        "data": (str(write_prompts(folder / "prompts.jsonl")),), "reward": f"helpers.rl_rewards:{reward}",
        "batch_rows": 8, "samples": 4, "max_tokens": 8, "dtype": "float32", "compile": "off", "optim": GENTLE,
        "schedule": ScheduleConfig(warmup_steps=2), "loop": LoopConfig(4, 4, 2), "validation_questions": 3,
    } | fields  # fmt: skip
    return RLConfig(out=folder / name, base=base, **fields)


def reinforcing(folder: str, name: str, base: str, **fields) -> list[dict]:
    """Train on all ranks; the lines of metrics.jsonl."""
    torch.set_num_threads(1)
    with joined(30):
        reinforce(config_of(Path(folder), name, Path(base), **fields))
    return metrics(Path(folder) / name)


def reinforcing_in_parts(folder: str, name: str, base: str, micro_batch: str) -> list[dict]:
    return reinforcing(folder, name, base, micro_batch=micro_batch)
