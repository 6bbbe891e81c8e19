"""A speedrun's step is set beside the records by the same measure."""

import dataclasses
import json

import pytest
import torch
from helpers.small_runs import write_text

from hotlap.bench import pace
from hotlap.bench.pace import SpeedrunConfig, bench_speedrun, measure_that_fits, our_row, record_row
from hotlap.cli import main
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.train.distributed.world import joined
from hotlap.train.presets import from_depth, tiny
from hotlap.train.speedruns.records import FULL, GPT2_GRADE, RECORDS, SIX_N

FOUND = {
    "data_wait_ms": 1.0, "passes_ms": 299.0, "optimizer_ms": 50.0,
    "tokens_per_second": 4 * 256 / 0.350, "mfu_nanochat": 0.2, "mfu_causal": 0.1, "tflops": 1.0,
    "memory_gb": None, "first_step_s": 1.0,
}  # fmt: skip


def test_a_step_of_micro_batches_pays_for_the_optimizer_once():
    with joined() as world:
        row = our_row("tiny", tiny(), 4, FOUND, world)
    assert row["case"] == "tiny 4x4x256" and row["ms"] == pytest.approx(4 * 300 + 50)
    assert row["tokens_per_second"] == pytest.approx(16 * 256 / 1.25)
    faster = row["tokens_per_second"] / FOUND["tokens_per_second"]
    assert row["mfu"] == pytest.approx(0.2 * faster) and row["tflops_each"] == pytest.approx(faster)
    assert row["seconds"] == pytest.approx(row["tokens"] / row["tokens_per_second"])
    assert row["tokens"] == tiny().loop.steps * 16 * 256


def test_a_machine_like_the_records_is_their_equal_by_every_formula():
    """Ours at exactly a record's tokens/s and shape has a ratio of 1."""
    shape = from_depth(24).model
    last = next(t for t in RECORDS if t.name.startswith("run 6 "))
    each = last.tokens_per_second / last.gpus
    ours = {"case": "gpt2-grade 1x1x1", "tokens_per_second_each": each, "tokens_per_second": 2 * each}
    row = record_row(last, ours, shape)
    assert row["our_tokens_per_gpu"] == row["our_flops_per_gpu"] == pytest.approx(1)
    assert row["our_seconds_for_its_tokens"] == pytest.approx(last.tokens / 2 / each)
    blind = dataclasses.replace(last, attention=0, formula=SIX_N)
    assert record_row(blind, ours, shape)["our_flops_per_gpu"] == pytest.approx(1)
    causal = next(t for t in RECORDS if "causal" in t.formula)
    full = dataclasses.replace(causal, attention=2 * causal.attention, formula=FULL)
    a, b = (record_row(t, ours, shape)["our_flops_per_gpu"] for t in (causal, full))
    assert a == pytest.approx(b) and nanochat_flops(meta_model(shape)) == last.flops_per_token
    assert record_row(causal, ours, shape)["our_tokens_per_gpu"] is None, "of another recipe"


def test_rows_are_halved_until_the_memory_suffices(monkeypatch):
    tried = []

    def measure(shape, rows, *more):
        tried.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError
        return {}

    monkeypatch.setattr(pace, "measure_training", measure)
    with joined() as world:
        assert measure_that_fits(tiny(), SpeedrunConfig(), False, None, world)[0] == 4
        assert tried == [16, 8, 4]
        with pytest.raises(MemoryError, match="fewer with --rows"):
            measure_that_fits(tiny(), SpeedrunConfig(rows=16), False, None, world)


@pytest.fixture
def small(monkeypatch):
    shape = dataclasses.replace(tiny().model, layers=1, width=32, heads=1, kv_heads=1, context=32)
    recipe = dataclasses.replace(tiny(), model=shape, batch_rows=4, micro_batch="2")
    monkeypatch.setitem(pace.RECIPES, "tiny", lambda: recipe)


@pytest.mark.parametrize("data", [False, True])
def test_the_benchmark_writes_its_table_with_sources_and_assumptions(work, capsys, small, data):
    flags = ["bench", "speedrun", "--steps", "1", "--out", "found"]
    if data:
        write_text(work / "text.txt", 600)
        assert main(["tokenizer", "--source", "text.txt", "--vocab-size", "280"]) == 0
        assert main(["data", "--source", "text.txt", "--out", "shards"]) == 0
        flags += ["--data", "shards"]
    assert main(flags) == 0
    content = json.loads((work / "found" / "speedrun.json").read_text())
    ours, *others = content["rows"]
    assert ours["case"] == "tiny 2x2x32" and ours["provider"] == "hotlap" and len(others) == len(RECORDS)
    assert all(row["source"] and row["our_flops_per_gpu"] > 0 for row in others)
    assert "only a run shows" in content["assumes"] and content["expected"] is None
    assert (work / "found" / "speedrun.png").read_bytes().startswith(b"\x89PNG")
    assert "Assumes: every step" in capsys.readouterr().out


def test_an_unknown_recipe_is_refused(work, capsys):
    assert main(["bench", "speedrun", "--recipe", "tinny"]) == 2
    assert "did you mean 'tiny'?" in capsys.readouterr().err
    assert GPT2_GRADE in pace.RECIPES and not (work / "bench").exists()
    with pytest.raises(ValueError, match="steps=0"):
        bench_speedrun(SpeedrunConfig(steps=0))
