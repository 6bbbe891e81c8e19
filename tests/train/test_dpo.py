"""`hotlap dpo` on a tiny chat model."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.preference_runs import config_of, make_base, preferring, write_pairs
from helpers.ranks import run_ranks
from helpers.run_functions import losses, metrics, state_of, stop_at_pass

from hotlap.common.errors import DataError
from hotlap.model.weights import is_model, open_model, run_checkpoints, stage
from hotlap.train import preference_losses
from hotlap.train.config import DPOConfig
from hotlap.train.data.splits import SPLITS
from hotlap.train.dpo import optimize_preferences, warn_of_failure
from hotlap.train.loop import LoopConfig
from hotlap.train.optim.schedule import ScheduleConfig
from hotlap.train.reference import REFERENCE
from hotlap.train.sampled_pairs import SAMPLES


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("chat"))


def assert_starts_at_the_reference(first: dict) -> None:
    assert np.float32(first["loss"]) == np.float32(math.log(2))
    assert [first[name] for name in ("margin", "chosen_reward", "rejected_reward", "kl")] == [0, 0, 0, 0]
    assert first["accuracy"] == 0.5


@pytest.mark.parametrize("micro_batch", ["1", "2", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_first_step_finds_exactly_the_reference(lora_rank, dtype, micro_batch, base, tmp_path):
    lines = preferring(str(tmp_path), "run", str(base), micro_batch, dtype, lora_rank)
    assert_starts_at_the_reference(lines[0])
    assert lines[1]["margin"] != 0 and lines[-1]["loss"] < lines[0]["loss"]


def test_ranks_start_at_the_reference_and_take_the_steps_of_one(base, tmp_path):
    runs = [run_ranks(size, preferring, str(tmp_path), f"on-{size}", str(base), "1")[0] for size in (1, 2)]
    for lines in runs:
        assert_starts_at_the_reference(lines[0])
    for name in ("loss", "margin", "chosen_reward", "gradient_norm", "chosen_tokens"):
        one, two = ([line[name] for line in lines] for lines in runs)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5), name
    names = [name for name in runs[0][-1] if name.startswith("validation")]
    assert {"validation_loss", "validation_accuracy", "validation_margin"} <= {*names}
    assert [runs[1][-1][name] for name in names] == pytest.approx(
        [runs[0][-1][name] for name in names], rel=1e-4, abs=1e-5
    )


def test_a_run_learns_the_preference_and_is_a_chat_model(base, tmp_path):
    config = config_of(tmp_path, "run", base, loop=LoopConfig(40, 40, 40))
    last = optimize_preferences(config)
    assert last["validation_accuracy"] == 1 and last["margin"] > 0
    folder, _, tokenizer = open_model(config.out)
    assert stage(folder) == "dpo" and tokenizer.sha256 == open_model(base)[2].sha256
    assert not is_model(config.out), "the run's folder is no model beside its checkpoints"
    assert "| validation accuracy | 1.0000 |" in (config.out / "report.md").read_text()


def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_reference(base, tmp_path, monkeypatch):
    optimize_preferences(config_of(tmp_path, "whole", base))
    stopped = config_of(tmp_path, "run", base, loop=LoopConfig(4, 4, 2))
    with monkeypatch.context() as patch:
        stop_at_pass(patch, preference_losses, "pair_loss", 3)
        with pytest.raises(KeyboardInterrupt):
            optimize_preferences(stopped)
    assert [folder.name for folder in run_checkpoints(stopped.out)] == ["step-000002"]
    with monkeypatch.context() as patch:
        patch.setattr("hotlap.train.reference.compute_reference", lambda *_: 1 / 0)
        optimize_preferences(dataclasses.replace(stopped, resume="auto"))
    assert losses(stopped.out) == losses(tmp_path / "whole")
    assert state_of(stopped.out) == state_of(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_lost_reference_is_computed_again_from_the_base_not_from_the_checkpoint(damage, base, tmp_path):
    config = config_of(tmp_path, "run", base)
    optimize_preferences(config)
    path = config.out / REFERENCE
    with np.load(path) as file:
        before = file["reference"]
    path.write_bytes(path.read_bytes()[:100]) if damage == "damaged" else path.unlink()
    optimize_preferences(dataclasses.replace(config, resume="auto", loop=LoopConfig(6, 6, 2)))
    with np.load(path) as file:
        assert np.array_equal(file["reference"], before) and before.any()


def test_another_base_or_tokenizer_or_other_pairs_do_not_resume_a_run(base, tmp_path):
    config = config_of(tmp_path, "run", base)
    optimize_preferences(config)
    (tmp_path / "other").mkdir()
    longer = dataclasses.replace(config, resume="auto", loop=LoopConfig(6, 6, 2))
    write_pairs(tmp_path / "pairs.jsonl", 41)
    with pytest.raises(ValueError, match="was started on other data"):
        optimize_preferences(longer)
    write_pairs(tmp_path / "pairs.jsonl")
    moved = tmp_path / "moved"
    moved.symlink_to(base)
    other = dataclasses.replace(longer, out=tmp_path / "new", resume=str(config.out), base=moved)
    optimize_preferences(other)  # the same model in another place
    (tmp_path / "other" / "text.txt").write_text("")
    trained = dataclasses.replace(config, out=tmp_path / "again", base=config.out)
    optimize_preferences(trained)
    with np.load(config.out / REFERENCE) as file:
        content = dict(file)
    content["facts"] = str(content["facts"]).replace('"base": "', '"base": "0')
    np.savez(config.out / REFERENCE, **content)
    with pytest.raises(DataError, match=r"of another base: the weights that --base names have changed"):
        optimize_preferences(longer)


def test_a_run_in_a_new_folder_takes_the_sampled_pairs_with_it(base, tmp_path, monkeypatch):
    def sample(base, path, seed, device):
        records = [json.loads(line) for line in write_pairs(tmp_path / "made.jsonl").read_text().splitlines()]
        lines = [json.dumps(r | {"split": SPLITS[i % 8 == 0]}) + "\n" for i, r in enumerate(records)]
        path.write_text("".join(lines))

    monkeypatch.setattr("hotlap.train.dpo.sample_pairs", sample)
    config = config_of(tmp_path, "run", base, data=("tasks",))
    optimize_preferences(config)
    monkeypatch.setattr("hotlap.train.dpo.sample_pairs", lambda *_: 1 / 0)
    fields = {"out": tmp_path / "new", "resume": str(config.out), "loop": LoopConfig(6, 6, 2)}
    optimize_preferences(dataclasses.replace(config, **fields))
    assert (tmp_path / "new" / SAMPLES).read_bytes() == (config.out / SAMPLES).read_bytes()


def test_a_base_that_cannot_read_the_built_in_questions_is_refused_with_a_way_out(base, tmp_path):
    with pytest.raises(DataError, match=r"cannot be asked the questions of `tasks`: character .*--data"):
        optimize_preferences(config_of(tmp_path, "run", base, data=("tasks",)))
    assert not (tmp_path / "run").exists()


def test_a_run_by_the_clock_does_not_promise_its_epochs(base, tmp_path, caplog):
    caplog.set_level("INFO")
    loop = LoopConfig(5, 5, 5, minutes=0.0001)
    optimize_preferences(config_of(tmp_path, "run", base, loop=loop, schedule=ScheduleConfig(warmup_steps=0)))
    assert re.search(r"rows, at most \d+\.\d epochs, \d+ to validate", caplog.text)


def test_pairs_that_are_held_out_and_trained_on_are_counted(base, tmp_path, caplog):
    caplog.set_level("INFO")
    data = tmp_path / "one.jsonl"
    data.write_text(6 * (json.dumps({"prompt": "square", "chosen": "is so", "rejected": "on"}) + "\n"))
    optimize_preferences(config_of(tmp_path, "run", base, data=(str(data),), loop=LoopConfig(1)))
    assert "6 of the pairs to validate are trained on, too" in caplog.text


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"validation_margin": -0.1, "validation_accuracy": 0.6}, "are not preferred as they should be"),
        ({"validation_margin": 0.0, "validation_accuracy": 0.5}, "are not preferred as they should be"),
        ({"validation_margin": 2.0, "validation_chosen_reward": -3.0}, "less likely than they were"),
        ({"validation_margin": 2.0, "validation_accuracy": 0.9, "validation_chosen_reward": 0.5}, ""),
        ({}, ""),
    ],
)
def test_answers_that_go_the_wrong_way_are_warned_of(metrics, said, caplog):
    warn_of_failure(metrics, DPOConfig())
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_a_base_model_that_does_not_converse_is_refused_by_name(base, tmp_path):
    with pytest.raises(ValueError, match=r"pretrain is a base model, which does not converse; .*hotlap sft"):
        optimize_preferences(config_of(tmp_path, "run", base.parent / "pretrain"))
    assert not (tmp_path / "run").exists()


def test_a_reference_that_is_not_finite_is_named_with_its_pair_and_token(base, tmp_path, monkeypatch):
    real = preference_losses.log_probabilities

    def broken(model, batch):
        found = real(model, batch)
        return found.where((batch.numbers != 7).all(1)[:, None, None] | (batch.targets < 0), float("nan"))

    monkeypatch.setattr("hotlap.train.reference.log_probabilities", broken)
    with pytest.raises(FloatingPointError, match=r"step 0: the base gives token \d+ \(id \d+\) of the chosen side of .*pairs\.jsonl:\d+ the log-probability nan.*--dtype float32"):  # noqa: E501  # fmt: skip
        optimize_preferences(config_of(tmp_path, "run", base))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_pairs(base, tmp_path, monkeypatch):
    passes, real = iter(range(2)), preference_losses.pair_loss

    def broken(model, batch, config):
        value, found = real(model, batch, config)
        return (value if next(passes, None) is not None else value * float("nan")), found

    monkeypatch.setattr(preference_losses, "pair_loss", broken)
    with pytest.raises(
        FloatingPointError, match=r"at step 2: rank 0 has loss nan on batch \w+ .* of pairs \d+, "
    ):
        optimize_preferences(config_of(tmp_path, "run", base))
    assert len(metrics(tmp_path / "run")) == 2
