"""The records of others agree with themselves, and carry what they are from."""

import datetime
import json
from pathlib import Path

import pytest

from hotlap.model.config import GPTConfig
from hotlap.model.flops import PEAK_BF16, meta_model, nanochat_flops, parameter_counts
from hotlap.train.presets import gpt2_124m
from hotlap.train.speedruns.records import (
    BATCH,
    D24_QUARTER,
    D24_WEIGHTS,
    GOALS,
    GPT2_ATTENTION,
    GPT2_WEIGHTS,
    PRICES,
    RECORDS,
    dollars_per_hour,
    of_recipe,
    throughput,
)

CPU = "AMD EPYC (family 26, model 17, AVX512-BF16), 2 threads"
NAMES = [f"{t.project} {t.name}" for t in RECORDS]


@pytest.mark.parametrize("target", RECORDS, ids=NAMES)
def test_a_record_says_when_and_where_and_its_figures_fit_together(target):
    assert datetime.date(2019, 1, 1) < datetime.date.fromisoformat(target.date) <= datetime.date.today()
    owner, name = target.source.split()[0].split("/")[:2]
    assert owner and name and target.recipe in {"", *GOALS} and target.device in dict(PEAK_BF16)
    if target.batch:
        assert target.tokens == target.batch * target.steps
        timed = target.batch * (target.steps - target.untimed)
        assert target.tokens_per_second == pytest.approx(timed / target.seconds, rel=1e-9)
        assert target.ms_per_step == pytest.approx(1e3 * target.batch / target.tokens_per_second, rel=1e-9)
    assert 0.25 < target.mfu < 0.65


@pytest.mark.parametrize("target", [t for t in RECORDS if t.stated_mfu], ids=lambda t: t.name)
def test_the_mfu_that_a_record_is_known_by_follows_from_its_figures(target):
    assert target.mfu == pytest.approx(target.stated_mfu, abs=0.006 if target.stated_mfu >= 0.5 else 0.0015)


@pytest.mark.parametrize(
    ("name", "ms", "tokens_per_second"),
    [
        ("#1 llm.c", 140, 3.75e6), ("#5 ", 178.89, 2.93e6), ("#7 ", 141.82, 3.70e6), ("#8 ", 141.87, 3.70e6),
        ("#10 ", 144.68, 3.62e6), ("#12 ", 161.84, 3.24e6), ("#20 ", 129.81, 4.04e6),
        ("#21 ", 101.60, 3.87e6), ("#29 ", 97.98, 4.01e6), ("#40 ", 60.38, 4.34e6), ("#89 ", 57.4, 4.59e6),
        ("run 1 ", 655.9, 800e3), ("run 2 ", 704.7, 744e3), ("run 3 ", 1373, 764e3),
        ("run 6 ", 1068, 983e3), ("baseline", 318, 1.647e6),
    ],
)  # fmt: skip
def test_times_are_those_of_the_logs(name, ms, tokens_per_second):
    (target,) = (t for t in RECORDS if t.name.startswith(name))
    assert target.ms_per_step == pytest.approx(ms, rel=2e-3)
    assert target.tokens_per_second == pytest.approx(tokens_per_second, rel=2e-3)


def test_the_shapes_are_those_of_our_own_models():
    d24 = meta_model(GPTConfig.from_depth(24))
    counts = parameter_counts(d24)
    last = next(t for t in RECORDS if t.name.startswith("run 6 "))
    assert last.weights == counts["matrices"] + counts["head"] > D24_WEIGHTS
    assert nanochat_flops(d24) == last.flops_per_token and last.attention == D24_QUARTER
    gpt2 = GPTConfig(50304, 1024, window_pattern="L", value_embeddings=False, smear=False)
    assert nanochat_flops(meta_model(gpt2)) == 6 * GPT2_WEIGHTS + 2 * GPT2_ATTENTION


def test_what_is_expected_of_a_card_is_what_its_nearest_record_reached_there():
    run_1 = next(t for t in RECORDS if t.name.startswith("run 1 "))
    eight = throughput("NVIDIA H100 80GB HBM3", 8, run_1.flops_per_token)
    assert eight.tokens_per_second == pytest.approx(run_1.tokens_per_second)
    assert "run 1 d24" in eight.assumes and "50%" in eight.assumes
    two = throughput("NVIDIA H100 80GB HBM3", 2, run_1.flops_per_token)
    assert 4 * two.tokens_per_second == pytest.approx(eight.tokens_per_second)
    unknown = throughput("NVIDIA GeForce RTX 4090", 1, 1e9)
    assert unknown.tokens_per_second == pytest.approx(0.35 * 165.2e12 / 1e9)
    assert "no record" in unknown.assumes
    for name in (CPU, "NVIDIA RTX 4090 Laptop GPU"):
        assert throughput(name, 1, 1e9) is None


def test_what_is_expected_of_one_card_is_what_we_measured_there():
    """The constants are those of the result file, which an installed package does not have."""
    path = Path(__file__).parents[3] / "bench/results/nvidia-h100-80gb-hbm3/training.json"
    rows = {row["case"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for depth, case, share in ((12, "d12 4x32x2048", "44%"), (24, "d24 4x16x2048", "53%")):
        flops = nanochat_flops(meta_model(GPTConfig.from_depth(depth)))
        found = throughput("NVIDIA H100 80GB HBM3", 1, flops)
        assert found.tokens_per_second == pytest.approx(rows[case]["tokens_per_second"], rel=2e-4)
        assert found.assumes.startswith(f"{share} MFU, as measured with hotlap on one H100 (d{depth}")
    between = throughput("NVIDIA H100 80GB HBM3", 1, nanochat_flops(meta_model(gpt2_124m().model)))
    assert "(d12" in between.assumes


def test_a_price_has_a_source_or_is_not_known():
    assert dollars_per_hour("NVIDIA H100 80GB HBM3", 8) == (24.0, PRICES["H100"][1])
    assert dollars_per_hour("NVIDIA L4") is None and dollars_per_hour(CPU) is None


def test_a_recipe_has_its_records_in_order():
    dates = [t.date for t in of_recipe("gpt2-124m")]
    assert len(dates) > 5 and dates == sorted(dates)
    assert all(t.batch in (None, BATCH, 393_216, 262_144) for t in of_recipe("gpt2-124m"))
