"""What is refused before a run takes memory is a lower bound: it never exceeds the estimate of the run."""

import os

import pytest
import torch
from helpers.tools import tiny_config

from hotlap.common import memory as machine
from hotlap.model.config import GPTConfig, rotary_bytes
from hotlap.model.flops import meta_model, training_bytes
from hotlap.model.lora import LoRA, add_adapters
from hotlap.train.distributed.memory import check_memory, row_bytes
from hotlap.train.distributed.world import World

WORLD = World(0, 1, torch.device("cpu"), None)
CHOICES = {"step_rows": 4, "micro_rows": 4, "recompute": "none", "dtype": "float32"}


@pytest.mark.parametrize(
    "shape",
    [
        tiny_config(),
        tiny_config(kv_heads=1, window_pattern="L", value_embeddings=False),
        GPTConfig.from_depth(4),
        GPTConfig.from_depth(24),
    ],
)
def test_a_run_with_as_much_memory_as_is_estimated_is_not_refused(shape, monkeypatch):
    estimated = sum(training_bytes(meta_model(shape), 4, shape.context, 1, 4).values()) + rotary_bytes(shape)
    monkeypatch.setattr(machine, "machine_bytes", lambda: max(estimated, 4 * 24 * shape.context))
    check_memory(shape, WORLD, **CHOICES)
    monkeypatch.setattr(machine, "machine_bytes", lambda: estimated // 4)
    with pytest.raises(ValueError, match="needs at least"):
        check_memory(shape, WORLD, **CHOICES)


def test_adapters_need_less_and_as_much_as_is_estimated(monkeypatch):
    shape, rank = GPTConfig.from_depth(4), 8
    model = meta_model(shape)
    whole = sum(training_bytes(model, 4, shape.context, 1, 4).values())
    add_adapters(model, LoRA(rank, 1.0, (), None))
    estimated = sum(training_bytes(model, 4, shape.context, 1, 4).values()) + rotary_bytes(shape)
    assert estimated < whole
    monkeypatch.setattr(machine, "machine_bytes", lambda: estimated)
    check_memory(shape, WORLD, **CHOICES, lora_rank=rank)
    monkeypatch.setattr(machine, "machine_bytes", lambda: estimated // 4)
    with pytest.raises(ValueError, match="needs at least"):
        check_memory(shape, WORLD, **CHOICES, lora_rank=rank)


def test_recomputation_and_small_dtypes_need_less():
    shape = tiny_config()
    sizes = [row_bytes(shape, *c) for c in (("none", "float32"), ("none", "auto"), ("block", "auto"))]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


@pytest.mark.parametrize(
    ("fields", "choices", "says"),
    [
        ({"layers": 10**9}, {}, r"training .* parameters.*--model\.layers"),
        ({"context": 10**12}, {}, r"a context of 1000000000000 tokens.*--model\.context"),
        ({}, {"micro_rows": 10**9}, r"a micro-batch of 1000000000 rows of 64 tokens.*--micro-batch"),
        ({}, {"step_rows": 10**12, "micro_rows": 1}, r"a step of 1000000000000 rows.*--batch-rows"),
    ],
)
def test_what_is_too_large_is_named_with_its_flag(fields, choices, says):
    with pytest.raises(ValueError, match=says):
        check_memory(tiny_config(**fields), WORLD, **CHOICES | choices)


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(machine, "machine_bytes", lambda: 8_000_000)
    check_memory(tiny_config(), WORLD, **CHOICES)
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="each process has"):
        check_memory(tiny_config(), WORLD, **CHOICES)
