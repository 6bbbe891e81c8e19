"""Series of runs: what they share, what is not done again, and what a table of them says."""

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest
from helpers.small_runs import small_run, write_text

from hotlap.cli import main
from hotlap.train.loop import LoopConfig
from hotlap.train.studies import series, sweep
from hotlap.train.studies.sweep import (
    BASE,
    SweepConfig,
    Variant,
    assignments,
    run_variants,
    statistics,
    table_rows,
)


@pytest.fixture
def variants(tmp_path) -> dict[str, Variant]:
    base = small_run(tmp_path, loop=LoopConfig(4))
    smaller = dataclasses.replace(base, batch_rows=2)
    return {BASE: Variant(base), "batch_rows=2": Variant(smaller)}


def count_trainings(monkeypatch) -> list:
    done, real = [], series.pretrain
    monkeypatch.setattr(series, "pretrain", lambda config: done.append(config) or real(config))
    return done


def test_a_variant_is_a_string_of_toml():
    text = "model.smear=false  optim.matrix_lr=0.01 schedule.momentum=[0.8, 0.9, 0.9] data='a b.txt'"
    assert assignments(text) == {
        "model": {"smear": False}, "optim": {"matrix_lr": 0.01}, "schedule": {"momentum": [0.8, 0.9, 0.9]},
        "data": "a b.txt",
    }  # fmt: skip
    assert assignments("") == {}
    with pytest.raises(ValueError, match=r"model\.smear=false"):
        assignments("model.smear off")


def on_machine(monkeypatch, device: str, date: str) -> None:
    monkeypatch.setattr("hotlap.train.run.folder.circumstances", lambda _: {"device": device, "date": date})


def test_equal_tokens_whatever_the_batch_and_seeds_in_turns(variants, tmp_path, monkeypatch):
    on_machine(monkeypatch, "a machine", "a date")
    done = count_trainings(monkeypatch)
    rows = run_variants(variants, 0, 2, tmp_path / "out")
    assert [row["tokens"] for row in rows] == [512, 512] and [row["steps"] for row in rows] == [4, 8]
    assert [config.seed for config in done] == [0, 0, 1, 1]
    assert len({config.data for config in done}) == 1 and not list((tmp_path / "out").glob("*/data"))
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["rows"] == rows and (content["device"], content["date"]) == ("a machine", "a date")
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 0
    assert "| batch_rows=2 | 2 | 8 | 512 |" in (tmp_path / "out" / "sweep.md").read_text()


def test_what_is_done_is_not_done_again_and_more_seeds_are_added(variants, tmp_path, monkeypatch):
    on_machine(monkeypatch, "A", "2026-01-01")
    first = run_variants(variants, 0, 1, tmp_path / "out")
    written = (tmp_path / "out/sweep.json").read_text()
    on_machine(monkeypatch, "B", "2026-01-02")
    assert run_variants(variants, 0, 1, tmp_path / "out") == first
    assert (tmp_path / "out/sweep.json").read_text() == written, "nothing was measured on B"
    done = count_trainings(monkeypatch)
    again = run_variants(variants, 0, 2, tmp_path / "out")
    assert [config.seed for config in done] == [1, 1]
    content = json.loads((tmp_path / "out/sweep.json").read_text())
    assert (content["device"], content["date"]) == ("A and B", "2026-01-02")
    assert again[0]["seeds"] == 2 and first[0]["seeds"] == 1
    assert not list((tmp_path / "out").rglob("step-*")), "a sweep is no place for checkpoints"
    changed = variants | {BASE: Variant(dataclasses.replace(variants[BASE].config, batch_rows=1))}
    with pytest.raises(ValueError, match="batch_rows: saved 4, current 1"):
        run_variants(changed, 0, 1, tmp_path / "out")


def test_equal_time_gives_the_steps_that_fit_and_keeps_them(variants, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_variants(variants, 0.05, 1, out)
    speeds = json.loads((out / "steps.json").read_text())
    assert set(speeds) == set(variants) and not list(out.glob("timing-*"))
    configs = {name: json.loads((out / f"{name}-0" / "config.json").read_text()) for name in variants}
    for name, config in configs.items():
        assert config["loop"]["steps"] == max(1, int(0.05 / speeds[name])) == config["loop"]["evaluate_every"]
    monkeypatch.setattr(sweep, "pretrain", lambda config: pytest.fail("timed again"))
    run_variants(variants, 0.05, 1, out)


def test_a_variant_that_is_added_is_timed_beside_the_base(variants, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with sweep.joined() as world:
        out.mkdir()
        (out / "steps.json").write_text('{"base": 10.0}')  # of a machine that was slow that day
        monkeypatch.setattr(sweep, "pretrain", lambda config: config.out.mkdir())
        monkeypatch.setattr(
            sweep, "logged_step_seconds", lambda run, skip: [0.2 if "base" in run.name else 0.3]
        )
        assert sweep.seconds_per_step(variants, tmp_path, out, world) == pytest.approx(
            {"base": 10.0, "batch_rows=2": 15.0}
        )


def test_a_step_of_a_variant_in_stages_is_the_mean_of_theirs(variants, tmp_path, monkeypatch):
    stages = ((0.25, 0.5), (0.5, 1.0), (1.0, 1.0))
    base = variants[BASE].config
    grows = dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, stages=stages))
    rows: list[int] = []
    monkeypatch.setattr(
        sweep, "pretrain", lambda config: config.out.mkdir() or rows.append(config.batch_rows)
    )
    monkeypatch.setattr(sweep, "logged_step_seconds", lambda run, skip: [float(rows[-1]), 9.0])
    with sweep.joined() as world:
        (tmp_path / "out").mkdir()
        found = sweep.seconds_per_step(
            {BASE: variants[BASE], "grows": Variant(grows)}, tmp_path, tmp_path / "out", world
        )
    assert found == pytest.approx({BASE: 4.0, "grows": (1 + 2 + 4) / 3})


def test_a_run_that_diverges_is_a_row_without_a_score(variants, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def broken():
        with monkeypatch.context() as patch:
            patch.setattr("hotlap.train.pretrain.next_token_loss", lambda *given: diverge())
            yield

    def diverge():
        raise FloatingPointError("the loss is nan")

    bad = Variant(variants["batch_rows=2"].config, broken)
    rows = run_variants({BASE: variants[BASE], "bad": bad}, 0, 1, tmp_path / "out")
    assert rows[0]["bpb"] > 0 and rows[1]["bpb"] is None and rows[1]["difference"] is None
    assert "bad (1 of 1 runs diverged)" in sweep.markdown(rows)


def test_differences_are_taken_within_a_seed():
    def runs(*scores):
        return [{"bpb": s, "steps": 2, "tokens": 20, "seconds": 1.0, "ms": 500.0} for s in scores]

    base, other = table_rows({BASE: runs(1.0, 2.0, 3.0), "other": runs(0.9, 1.9, 2.9)})
    assert base["bpb"] == 2.0 and base["bpb_error"] == pytest.approx(3**-0.5) and base["difference"] is None
    assert other["difference"] == pytest.approx(-0.1) and other["difference_error"] < 1e-9
    assert other["tokens_per_second"] == 20
    (_, fewer) = table_rows({BASE: runs(1.0, 2.0, 3.0), "other": runs(0.9)})
    assert fewer["difference"] == pytest.approx(-0.1) and fewer["difference_error"] is None


def test_the_statistics_are_those_of_a_t_test():
    scipy = pytest.importorskip("scipy.stats")
    values = [0.1, 0.3, 0.15, 0.2]
    middle, error, p = statistics(values)
    assert (middle, error) == (pytest.approx(0.1875), pytest.approx(scipy.sem(values)))
    assert p == pytest.approx(scipy.ttest_1samp(values, 0).pvalue)
    assert statistics([0.1]) == (0.1, None, None) and statistics([]) == (None, None, None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--variants", "model.smaer=false"], "did you mean 'model.smear'?"),
        (["--variants", "model.vocab_size=999"], "share"),
        (["--variants", "data='other.txt'"], "share"),
        (["--variants", "batch_rows=0"], "batch_rows"),
        (["--variants", "batch_rows=2", "batch_rows = 2"], "two variants"),
        (["--preset", "tinny"], "did you mean 'tiny'?"),
        (["--seeds", "0"], "--seeds 0"),
        (["--seconds", "-1"], "--seconds -1"),
        ([], "nothing to compare with the base"),
        (["--variants", "model.layers=2", "model.layers=2"], "has 'model.layers=2' twice"),
        (["--variants", "model.layers=2", "model.layers=2 "], "trains the same as 'model.layers=2'"),
        (["--variants", "model.smear=true"], "'model.smear=true' trains the same as 'base'"),
        (["--variants", "batch_rows=1024", "--base", "loop.steps=2"], "give the base more steps"),
        (["--variants", "model.layers=2", "--base", "model.context=1099511627776"], "this machine has"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_before_anything_is_made(work, capsys, monkeypatch, flags, said):
    monkeypatch.setattr(series, "prepare", lambda config: pytest.fail("not refused"))
    assert main(["sweep", *flags]) == 2
    assert said in capsys.readouterr().err and not (work / "runs").exists()


def test_a_series_keeps_to_its_folder_and_its_data(variants, tmp_path, monkeypatch):
    for name, said in (
        ("notes.txt", "holds notes.txt and no series"),
        ("config.json", "holds a run or model"),
    ):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(FileExistsError, match=said):
            run_variants(variants, 0, 1, folder)
    monkeypatch.setattr(sweep, "outcome", lambda run, variant, world: pytest.fail("trained"))
    with sweep.joined() as world, series.shared_data(variants[BASE].config, tmp_path / "out", world):
        pass
    other = write_text(tmp_path / "other.txt")
    moved = {name: Variant(dataclasses.replace(v.config, data=str(other))) for name, v in variants.items()}
    with pytest.raises(ValueError, match=r"out was started with .*text\.txt.* not .*other\.txt"):
        run_variants(moved, 0, 1, tmp_path / "out")


def test_a_full_disk_shows_before_anything_is_made(variants, tmp_path, monkeypatch):
    monkeypatch.setattr(series.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"the checkpoints in .* need about .* GB, and 0.0 GB are free"):
        run_variants(variants, 0, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_series_says_how_often_it_reads_its_text_and_may_refuse(variants, tmp_path, caplog):
    base = variants[BASE].config
    with sweep.joined() as world, series.shared_data(base, tmp_path / "out", world) as folder:
        there = sum(map(series.shard_tokens, series.shard_paths(folder, "train")))
        steps = round(2.5 * there / base.tokens * base.loop.steps)
        long = dataclasses.replace(base, loop=LoopConfig(steps))
        with caplog.at_level("INFO", "hotlap"):
            series.check_epochs([base, long], folder, 4, world)
        assert f"and the data has {there:,}: 2.5 epochs" in caplog.text
        with pytest.raises(ValueError, match="more than 2 teach less and less; add text, or train less"):
            series.check_epochs([base, long], folder, 2, world)


def test_time_for_less_than_a_step_is_refused(variants, tmp_path):
    with pytest.raises(ValueError, match="seconds=1e-09 are less than a step of"):
        run_variants(variants, 1e-9, 1, tmp_path / "out")


def test_the_command_prints_the_table(work, capsys):
    shape = "model.layers=1 model.width=32 model.heads=1 model.kv_heads=1 model.context=32"
    base = f"data='text.txt' tokenizer='characters' dtype='float32' loop.steps=2 batch_rows=4 {shape}"
    assert main(["sweep", "--base", base, "--variants", "model.smear=false", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "| base | 1 | 2 | 256 |" in out and "| model.smear=false | 1 | 2 |" in out
    assert SweepConfig().out.name == "sweep" and (work / "runs/sweep/sweep.md").exists()
