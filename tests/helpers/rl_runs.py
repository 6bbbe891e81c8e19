"""Small reinforcement-learning runs, their rewards, and what they need, also on several ranks."""

import json
import math
import time
from pathlib import Path

import torch
from helpers.run_functions import GENTLE, metrics
from helpers.small_runs import write_whole

from hotlap.train.config import RLConfig
from hotlap.train.distributed.world import joined
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.rl import reinforce


def write_prompts(path: Path, count: int = 40) -> Path:
    """Questions in characters that `write_text` has."""
    return write_whole(path, "".join(json.dumps({"prompt": f"square of {i}"}) + "\n" for i in range(count)))


def vowels(answer: str, record: dict) -> float:
    """The share of an answer that is vowels."""
    return sum(answer.count(vowel) for vowel in "aeiou") / max(1, len(answer))


def same_for_all(answer: str, record: dict) -> float:
    return 0.25


def fails_on_odd_squares(answer: str, record: dict) -> float:
    """Raises, returns NaN or nothing for three questions in four."""
    number = int(record["prompt"].split()[-1])
    if number % 4 == 1:
        raise KeyError("odd")
    return (vowels(answer, record), 0.0, math.nan, None)[number % 4]


def always_fails(answer: str, record: dict) -> float:
    raise RuntimeError("no reward today")


def hangs_on_zero(answer: str, record: dict) -> float:
    if record["prompt"].endswith("0"):
        time.sleep(1000)
    return vowels(answer, record)


def config_of(folder: Path, name: str, base: Path, reward: str = "vowels", **fields) -> RLConfig:
    """Two groups of four answers a step."""
    fields = {
        "data": (str(write_prompts(folder / "prompts.jsonl")),), "reward": f"helpers.rl_runs:{reward}",
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
