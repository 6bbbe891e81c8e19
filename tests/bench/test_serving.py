"""Measuring a server: its own, another one, and one that refuses or breaks."""

import json

import pytest

pytest.importorskip("fastapi")

from helpers.fake_engine import FakeEngine
from helpers.running_server import running_server, served
from helpers.tools import tiny_config

from hotlap.bench.config import ServingConfig
from hotlap.bench.serving import bench_serving, quantile
from hotlap.common.errors import DataError
from hotlap.model.gpt import GPT
from hotlap.model.weights import save_model


def test_a_server_is_started_measured_and_ended(tmp_path, tiny_tokenizer):
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", GPT(tiny_config()).init_weights(3), tiny_tokenizer)
    config = ServingConfig(tmp_path / "model", "", (1, 3), 8, 4, 0.3, requests=30, out=tmp_path)
    rows = bench_serving(config)
    assert [row["case"] for row in rows] == [
        f"model 8 + 4 tokens {what}" for what in ("streams 1", "streams 3", "requests 30")
    ]
    for row in rows:
        assert row["requests"] >= 3 and 0 < row["ms"] <= row["ms_99"]
        assert 0 < row["first_token_ms"] <= row["first_token_ms_99"] and row["tokens_per_second"] > 0
        assert row["tokens"] == 4 * row["requests"]
    assert rows[2]["requests"] == 30
    assert 0 < rows[2]["memory_mb_after_a_tenth"] < 2 * rows[2]["memory_mb"]
    assert json.loads((tmp_path / "serving.json").read_text())["rows"] == rows
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_tokens_are_counted_by_the_server_and_an_error_is_no_result(tmp_path, tiny_tokenizer):
    engine = FakeEngine(tiny_tokenizer)
    with running_server(engine, served(tiny_tokenizer)) as server:
        config = ServingConfig(None, f"http://127.0.0.1:{server.port}/v1", (2,), 5, 7, 0.2, out=tmp_path)
        (row,) = bench_serving(config)
        assert row["requests"] >= 2 and row["tokens"] == 7 * row["requests"]
        with pytest.raises(DataError, match="context"):
            bench_serving(ServingConfig(None, config.url, (1,), 1000, 7, 0.2, out=tmp_path))


def test_quantiles_are_measured_values():
    values = [3.0, 1.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0.01, 0.25, 0.5, 0.51, 0.99, 1)] == [1, 1, 2, 3, 4, 4]
