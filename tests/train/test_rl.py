"""`hotlap rl` on a tiny chat model."""

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.preference_runs import make_base
from helpers.ranks import run_ranks
from helpers.rl_runs import config_of, reinforcing, reinforcing_in_parts, write_prompts
from helpers.run_functions import losses, metrics, state_of, stop_at_pass
from helpers.small_runs import write_whole

from hotlap.model.weights import is_model, open_model, run_checkpoints, stage
from hotlap.train import policy_losses
from hotlap.train.loop import LoopConfig
from hotlap.train.rl import questions, reinforce
from hotlap.train.rl_config import CLIPS
from hotlap.train.rollout_log import ROLLOUTS


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("chat"))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_in_float32_on_a_cpu_engine_and_trainer_agree_to_the_last_bit(lora_rank, base, tmp_path):
    lines = reinforcing(str(tmp_path), "run", str(base), lora_rank=lora_rank, loop=LoopConfig(6, 6, 6))
    assert [line["engine_kl"] for line in lines] == [0.0] * 6
    assert all(line["gradient_norm"] > 0 for line in lines), "the weights change, and they agree again"


def test_a_run_earns_more_and_is_a_chat_model(base, tmp_path):
    config = config_of(tmp_path, "run", base, batch_rows=32, samples=8, loop=LoopConfig(40, 40, 40))
    last = reinforce(config)
    rewards = [line["reward"] for line in metrics(config.out)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    assert last["validation_reward"] > rewards[0]
    folder, _, tokenizer = open_model(config.out)
    assert stage(folder) == "rl" and tokenizer.sha256 == open_model(base)[2].sha256
    assert not is_model(config.out)
    assert "| validation reward |" in (config.out / "report.md").read_text()


def test_ranks_and_micro_batches_take_the_steps_of_one(base, tmp_path):
    """The answers are the same, and so are their rewards."""
    folder = str(tmp_path)
    one = reinforcing(folder, "one", str(base))
    singly = reinforcing(folder, "singly", str(base), micro_batch="1")
    two = run_ranks(2, reinforcing_in_parts, folder, "two", str(base), "2")[0]
    for name, found in (("singly", singly), ("two", two)):
        assert [line["reward"] for line in found] == pytest.approx([line["reward"] for line in one]), name
        assert [line["engine_kl"] for line in found] == [0.0] * len(one), name
        for metric in ("loss", "gradient_norm", "entropy", "answer_tokens"):
            mine, theirs = ([line[metric] for line in lines] for lines in (found, one))
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), (name, metric)
        for metric in (name for name in one[-1] if name.startswith("validation")):
            assert found[-1][metric] == pytest.approx(one[-1][metric], rel=1e-4), (name, metric)


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("stop_after", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one(stop_after, updates, base, tmp_path, monkeypatch):
    """Also where it stops between the updates with one set of answers."""
    fields = {"updates": updates, "loop": LoopConfig(7, 7, 1), "resample": 1}
    reinforce(config_of(tmp_path, "whole", base, **fields))
    stopped = config_of(tmp_path, "run", base, **fields)
    with monkeypatch.context() as patch:
        stop_at_pass(patch, policy_losses, "answer_loss", stop_after)
        with pytest.raises(KeyboardInterrupt):
            reinforce(stopped)
    assert run_checkpoints(stopped.out)[-1].name == f"step-{stop_after:06}"
    reinforce(dataclasses.replace(stopped, resume="auto"))
    assert losses(stopped.out) == losses(tmp_path / "whole")
    assert state_of(stopped.out) == state_of(tmp_path / "whole")
    assert (stopped.out / ROLLOUTS).read_text() == (tmp_path / "whole" / ROLLOUTS).read_text()


def test_measuring_micro_batches_leaves_the_rollouts_of_a_resumed_run(base, tmp_path, monkeypatch):
    """On a GPU, `--micro-batch auto` passes a row of answers before the run goes on."""
    rows = []

    def measured(model, batch_rows, world, loss, one_row, sequences):
        rows.append(one_row())
        return 4

    monkeypatch.setattr("hotlap.train.stage.largest_micro_batch", measured)
    config = config_of(tmp_path, "run", base, micro_batch="auto")
    reinforce(config)
    before = (config.out / ROLLOUTS).read_text()
    reinforce(dataclasses.replace(config, resume="auto", loop=LoopConfig(5, 5, 5)))
    after = (config.out / ROLLOUTS).read_text()
    assert after.startswith(before) and len(after.splitlines()) == 5
    assert [len(row.inputs) for row in rows] == [1, 1]


@pytest.mark.parametrize("changed", [{"reward": "helpers.rl_rewards:same_for_all"}, {"samples": 2}])
def test_answers_of_other_settings_are_not_trained_on(changed, base, tmp_path):
    """Where a run is resumed into a new folder between the updates with one set of answers."""
    config = config_of(tmp_path, "run", base, updates=3, loop=LoopConfig(4, 4, 4))
    reinforce(config)
    fields = {"out": tmp_path / "new", "resume": str(config.out), "loop": LoopConfig(5, 5, 5)} | changed
    reinforce(dataclasses.replace(config, **fields))
    (line,) = [json.loads(line) for line in (tmp_path / "new" / ROLLOUTS).read_text().splitlines()]
    rewards = [answer["reward"] for answer in line["answers"]]
    assert len(rewards) == changed.get("samples", 4)
    assert (set(rewards) == {0.25}) == ("reward" in changed)


def test_an_update_starts_at_a_ratio_of_exactly_one_and_moves_away(base, tmp_path):
    """With stored log-probabilities, too: the first of several updates is the only one of a run with one."""
    once, twice = (
        reinforcing(str(tmp_path), f"updates-{updates}", str(base), updates=updates, kl=0.1)
        for updates in (1, 2)
    )
    assert twice[0]["loss"] == once[0]["loss"] and twice[0]["kl"] == once[0]["kl"] == 0
    assert twice[1]["reward"] == twice[0]["reward"], "the second update has the same answers"
    assert twice[1]["engine_kl"] > 0 == twice[2]["engine_kl"], "by which the weights have moved"
    assert once[-1]["kl"] > 0


@pytest.mark.parametrize("loss", CLIPS)
def test_every_loss_trains(loss, base, tmp_path):
    lines = reinforcing(str(tmp_path), loss, str(base), loss=loss, updates=2)
    assert all(line["gradient_norm"] > 0 for line in lines)


def test_a_step_without_differences_is_skipped_and_changes_nothing(base, tmp_path, caplog):
    one, three = (
        config_of(tmp_path, f"steps-{n}", base, reward="same_for_all", loop=LoopConfig(n, n, n))
        for n in (1, 3)
    )
    reinforce(one)
    caplog.clear()
    reinforce(three)
    assert [line["skipped"] for line in metrics(three.out)] == [1, 2, 3]
    assert [line["equal_groups"] for line in metrics(three.out)] == [1.0] * 3
    assert state_of(three.out) == state_of(one.out)
    said = [r.getMessage() for r in caplog.records if "nothing to learn" in r.getMessage()]
    assert len(said) == 1 and "(only 0.25)" in said[0]


def test_groups_with_equal_rewards_are_replaced(base, tmp_path):
    kept = reinforcing(str(tmp_path), "kept", str(base), reward="same_for_even", resample=0)
    replaced = reinforcing(str(tmp_path), "new", str(base), reward="same_for_even", resample=9)
    assert {0.5, 1.0} & {line["equal_groups"] for line in kept}
    assert all(line["gradient_norm"] > 0 for line in replaced)
    assert any(line["equal_groups"] > 0 for line in replaced), "those that were replaced count"


def test_failed_rewards_cost_their_answers_and_not_the_run(base, tmp_path, caplog):
    lines = reinforcing(str(tmp_path), "run", str(base), reward="fails_sometimes", batch_rows=16)
    assert 0 < sum(line["failed_rewards"] for line in lines) < len(lines)
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert "KeyError" in caplog.text


def test_a_reward_that_hangs_costs_its_answer(base, tmp_path):
    fields = {"reward_seconds": 0.5, "loop": LoopConfig(1, 1, 1), "validation_questions": 0}
    write_prompts(tmp_path / "prompts.jsonl")
    (line,) = reinforcing(str(tmp_path), "run", str(base), reward="hangs_on_zero", batch_rows=40, **fields)
    assert 0 <= line["failed_rewards"] < 1 and line["gradient_norm"] > 0


def test_a_step_in_which_every_reward_fails_ends_the_run_with_the_reason(base, tmp_path):
    with pytest.raises(ValueError, match=r"none of 8 answers got a reward, .*no reward today"):
        reinforce(config_of(tmp_path, "run", base, reward="always_fails"))


def test_rollouts_can_be_read(base, tmp_path):
    config = config_of(tmp_path, "run", base)
    reinforce(config)
    lines = [json.loads(line) for line in (config.out / ROLLOUTS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["question"].startswith("square of ") for line in lines)
    assert all(len(line["answers"]) == 4 and type(line["answers"][0]["reward"]) is float for line in lines)


def test_questions_to_validate_are_chosen_from_those_that_fit(base, tmp_path, caplog):
    prompts = [f"square of {i}" for i in range(40)] + ["square of " * 99 + str(i) for i in range(400)]
    write_whole(tmp_path / "mixed.jsonl", "".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    config = config_of(tmp_path, "run", base, data=(str(tmp_path / "mixed.jsonl"),), validation_questions=2)
    _, shape, tokenizer = open_model(base)
    asked = {split: questions(config, split, tokenizer, shape) for split in ("train", "validation")}
    assert len(asked["validation"]) == config.validation_questions
    assert all(len(question.ids) < shape.context for split in asked for question in asked[split])
    assert "questions to train on do not fit" in caplog.text and "to validate do not fit" in caplog.text


def test_other_questions_or_another_stage_do_not_resume_a_run(base, tmp_path):
    config = config_of(tmp_path, "run", base)
    reinforce(config)
    longer = dataclasses.replace(config, resume="auto", loop=LoopConfig(6, 6, 2))
    write_prompts(tmp_path / "prompts.jsonl", 41)
    with pytest.raises(ValueError, match="was started on other data"):
        reinforce(longer)
    with pytest.raises(ValueError, match=r"is a checkpoint of sft, which rl cannot resume; to start from it"):
        reinforce(config_of(tmp_path, "new", base, resume=str(base)))
