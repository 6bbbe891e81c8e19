"""The speedruns: plan, download, training, result."""

import dataclasses
import json
import sys

import pytest
from helpers.commands import USAGE, assert_error
from helpers.records import CEILING
from helpers.small_runs import MODEL, small_run
from helpers.tools import tiny_config

pytest.importorskip("pyarrow")
pytest.importorskip("huggingface_hub")
from helpers.hub_data import add_climbmix, add_fineweb

from hotlap.cli import main
from hotlap.common.options import to_json
from hotlap.model.flops import meta_model, nanochat_flops, parameter_counts
from hotlap.train.config import MOST_EPOCHS, OptimConfig
from hotlap.train.data import prepare
from hotlap.train.loop import LoopConfig
from hotlap.train.presets import gpt2_124m, gpt2_grade
from hotlap.train.pretrain import pretrain
from hotlap.train.run.metrics import read_metrics
from hotlap.train.speedruns import minutes, track
from hotlap.train.speedruns.shapes import TrainingShape

TRACK = [
    "speedrun",
    "gpt2-124m",
    "--out",
    "runs",
    "--data",
    "data",
    "--micro-batch",
    "1",
    "--dtype",
    "float32",
]


@pytest.fixture
def small_track(hub_server, tmp_path, monkeypatch):
    """The main track with a model of one layer, on shards of 400 tokens."""
    monkeypatch.chdir(tmp_path)
    add_fineweb(hub_server, tmp_path, monkeypatch, tokens=280)
    recipe = dataclasses.replace(
        gpt2_124m(), batch_rows=3, model=tiny_config(**MODEL, vocab_size=320), compile="off",
        loop=LoopConfig(6, evaluate_every=3, save_every=6), validation_tokens=200,
    )  # fmt: skip
    monkeypatch.setattr(track, "gpt2_124m", lambda: recipe)
    monkeypatch.setattr(track, "SHARD_TOKENS", 200)  # two shards for its 384 tokens
    return hub_server


def test_the_track_goes_from_the_download_to_its_statistics(small_track, tmp_path, capsys):
    from scipy.stats import t

    assert main([*TRACK, "--runs", "3", "--yes"]) == 0
    printed = capsys.readouterr()
    assert "3 files, 0.00 GB, to data" in printed.out and "384" not in printed.err.split("tokens")[0]
    assert set(small_track.fetched()) == {
        f"fineweb_{n}_00000{i}.bin" for n, i in (("val", 0), ("train", 1), ("train", 2))
    }
    result = json.loads((tmp_path / "runs/result.json").read_text())
    losses = result["losses"]
    assert len(set(losses)) == 3 and result["mean"] == pytest.approx(sum(losses) / 3)
    sigma = (sum((loss - result["mean"]) ** 2 for loss in losses) / 2) ** 0.5
    assert result["sigma"] == pytest.approx(sigma) and not result["reached"]
    assert result["p"] == pytest.approx(t.cdf((result["mean"] - 3.28) / (sigma / 3**0.5), 2), abs=1e-9)
    assert result["tokens"] == 32 * (2 * 1 + 2 * 2 + 2 * 3)  # the batch grows in thirds
    assert (tmp_path / "runs/curves.png").exists() and "| mean |" in (tmp_path / "runs/report.md").read_text()

    assert main([*TRACK, "--runs", "3", "--yes"]) == 0  # complete: nothing is trained or fetched again
    assert "step 6/6" not in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/result.json").read_text()) == result


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_done_before_somebody_agrees_to_the_plan(
    small_track, tmp_path, monkeypatch, capsys, terminal
):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    code = main(TRACK)
    if terminal:
        assert code == 0 and "cost" not in capsys.readouterr().out
    else:
        assert_error(capsys, code, USAGE, "--yes")
    assert not small_track.fetched() and not (tmp_path / "data").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("losses", "reached"), [([3.279] * 3 + [3.278], True), ([3.27, 3.29, 3.275], False)])
def test_a_record_needs_a_mean_that_is_surely_below(losses, reached):
    runs = [{"validation_loss": loss, "seconds": 100.0, "tokens": 7} for loss in losses]
    assert track.track_result(runs, track.one_sided_test())["reached"] is reached


def test_one_run_alone_is_no_record():
    alone = track.track_result([{"validation_loss": 3.0, "seconds": 1.0, "tokens": 7}], None)
    assert alone["p"] is None and not alone["reached"]


def test_the_recipes_are_as_long_as_they_are_said_to_be():
    track, grade = gpt2_124m().validate(), gpt2_grade().validate()
    assert 1.1e9 < track.tokens < 1.2e9 and track.validation_tokens == 20 * 524_288
    counts = parameter_counts(meta_model(track.model))
    assert counts["matrices"] + counts["head"] == pytest.approx(123.6e6, rel=1e-3)
    assert grade.loop.steps == 5568 and grade.tokens == pytest.approx(5.84e9, rel=1e-3)
    assert nanochat_flops(meta_model(grade.model)) == pytest.approx(4.78e9, rel=2e-2)


def cached(hub_server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    add_climbmix(hub_server, tmp_path)
    for module in (prepare, minutes):
        monkeypatch.setattr(module, "TOKENIZER_SHARDS", 1)
    return hub_server


def test_minutes_learns_a_tokenizer_trains_by_the_clock_and_says_the_bits(
    hub_server, tmp_path, monkeypatch, capsys
):
    cached(hub_server, tmp_path, monkeypatch)
    monkeypatch.setattr(minutes, "VOCABULARY", 300)
    monkeypatch.setattr(minutes, "trial_flops", lambda world, dtype: 1e9)
    monkeypatch.setattr(minutes, "ceilings", lambda world: dict(CEILING))
    monkeypatch.setattr(minutes, "REFERENCE_BATCH", 20)
    real = minutes.timed

    def small(*arguments):
        model = tiny_config(**MODEL, vocab_size=300)
        return dataclasses.replace(real(*arguments), model=model, batch_rows=4, compile="off")

    monkeypatch.setattr(minutes, "timed", small)
    command = ["speedrun", "minutes", "--minutes", "0.02", "--out", "run", "--dtype", "float32", "--yes"]
    assert main(command) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert 0 < result["bpb"] < 9 and result["seconds"] > 0 and result["tokens"] > 0
    assert (tmp_path / "data/climbmix-300/tokenizer.json").exists()
    assert "0.02 minutes of training" in capsys.readouterr().out
    monkeypatch.setattr(
        minutes, "timed", real
    )  # the device is measured otherwise: another shape, but for the run
    assert main(command) == 0
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    capsys.readouterr()
    assert main(["verify", "run/record.json"]) == 0
    printed = capsys.readouterr().out
    assert "scored again" in printed and "its training shards are those in" in printed
    assert "not checked" not in printed


def test_weight_decays_grow_with_the_passes_of_a_timed_run(tmp_path):
    shape, plain = TrainingShape(2, 64, 128, 320), OptimConfig()
    for passes, times in ((1.0, 1), (3.2, 3), (1000.0, minutes.MOST_PASSES)):
        run = minutes.timed(tmp_path, "pydocs", 5.0, shape, passes).validate()
        assert run.optim.weight_decay == pytest.approx(times * plain.weight_decay)
        assert run.optim.adamw_decay == pytest.approx(times)
        assert run.optim.scalar_lr == pytest.approx(plain.scalar_lr * (128 / 2**19) ** 0.5)
        assert run.most_epochs == minutes.MOST_PASSES and run.model.bigram_rows


def test_a_timed_run_goes_on_with_the_passes_and_decays_that_it_began_with(tmp_path):
    shape = TrainingShape(2, 64, 128, 320)
    begun = minutes.timed(tmp_path, "pydocs", 5.0, shape, 4)
    saved = json.loads(to_json(dataclasses.replace(begun, most_epochs=6)))
    now = minutes.timed(tmp_path, "pydocs", 5.0, TrainingShape(4, 64, 256, 640), 8)
    for kept, passes in ((saved, 6), ({k: v for k, v in saved.items() if k != "most_epochs"}, MOST_EPOCHS)):
        (tmp_path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        resumed = minutes.as_begun(now)
        assert resumed.most_epochs == passes
        assert (resumed.optim, resumed.model) == (begun.optim, begun.model)


def test_a_timed_run_of_little_data_ends_with_the_data(tmp_path):
    timed = LoopConfig(10**6, 10**6, 10**6, minutes=10.0)
    last = pretrain(small_run(tmp_path, loop=timed))
    rows = -(-last["tokens"] // (32 * 4)) * 4 / MOST_EPOCHS
    text = (tmp_path / "text.txt").read_text()
    assert rows * 32 == pytest.approx(len(text), rel=0.2)  # a token a character, of which some validate
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["lr_share"] < 0.2 and lines[-1]["seconds"] < 600


def test_the_trial_counts_the_work_of_its_steps(monkeypatch):
    from hotlap.train.distributed.world import joined

    clock = [0.0]

    def now() -> float:
        clock[0] += 0.5  # each step begins and ends
        return clock[0]

    monkeypatch.setattr(minutes.time, "perf_counter", now)
    monkeypatch.setattr(minutes, "TRIAL", tiny_config(**MODEL))
    with joined() as world:
        rate = minutes.trial_flops(world, "float32")
    assert rate == pytest.approx(nanochat_flops(meta_model(tiny_config(**MODEL))) * 4 * 32 / 0.5)
