"""The statistics of a record, and what identifies its text and the device's speed."""

import time

import pytest
import torch
from helpers.tools import train_tiny_tokenizer

from hotlap.kernels.peaks import measure_ceilings
from hotlap.train.data.shards import write_shards
from hotlap.train.speedruns.corpora import loses_text, shard_text, text_sha256
from hotlap.train.speedruns.record_claims import steady_device
from hotlap.train.speedruns.record_file import T_95, statistics_of


def test_the_interval_is_student_s():
    stats = pytest.importorskip("scipy.stats", reason="the table of t is compared with scipy's")
    assert pytest.approx([stats.t.ppf(0.975, n) for n in range(1, len(T_95) + 1)], abs=5e-4) == T_95
    found = statistics_of([1.40, 1.41, 1.45])
    low, high = stats.t.interval(0.95, 2, loc=1.42, scale=found["sigma"] / 3**0.5)
    assert found["mean"] == pytest.approx(1.42) and found["interval"] == pytest.approx([low, high], rel=1e-4)
    assert statistics_of([1.4]) == {"mean": 1.4, "sigma": None, "interval": None}


def test_the_hash_of_a_text_is_that_of_its_documents_however_they_are_tokenized(tmp_path):
    tokenizer, texts = train_tiny_tokenizer(), ["One text.\n", "Un café, 私, \0 <|bos|>", "a" * 500]
    write_shards(tmp_path, "validation", texts, tokenizer)
    documents = [text.encode() for text in texts]
    whole = text_sha256(documents)
    assert list(shard_text(tmp_path, "validation", tokenizer)) == documents
    assert not loses_text(tokenizer, documents, whole)
    assert len({whole, text_sha256(documents[::-1]), text_sha256([b"".join(documents)])}) == 3
    first = list(shard_text(tmp_path, "validation", tokenizer, limit=3))
    assert documents[0].startswith(first[0]) and len(first) == 1


def test_ceilings_by_processor_time_do_not_count_the_time_of_others(monkeypatch):
    """A sleep in each matmul stands for another program that has the processor."""
    real = torch.mm

    def interrupted(*arguments, **named):
        time.sleep(0.05)
        return real(*arguments, **named)

    device = torch.device("cpu")
    monkeypatch.setattr(torch, "randn", lambda *shape, **kinds: torch.ones(64, 64))
    monkeypatch.setattr(torch, "mm", interrupted)
    by_clock = measure_ceilings(device).matmul
    assert measure_ceilings(device, time.process_time).matmul > 5 * by_clock


def test_a_device_that_slows_down_by_more_than_a_quarter_is_not_steady():
    runs = [{"before": {"matmul": 1e12}, "after": {"matmul": 0.8e12}}]
    assert "kept its speed" in steady_device({"runs": runs})
    runs.append({"before": {"matmul": 0.7e12}, "after": {"matmul": 0.8e12}})
    with pytest.raises(ValueError, match=r"fell to 70% .* throttled"):
        steady_device({"runs": runs})
