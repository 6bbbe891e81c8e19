"""`hotlap speedrun gpt2-grade`: from the download to a chat model and its report card."""

import dataclasses
import json
import math
import re
import shutil

import pytest
from helpers.commands import BAD_DATA, INTERRUPTED, NO_INPUT, USAGE, assert_error
from helpers.core_bundles import mixed_tasks, write_bundle
from helpers.graded_runs import scored_twice, write_run
from helpers.preference_runs import write_pairs
from helpers.ranks import in_world, run_ranks
from helpers.small_runs import conversation
from helpers.tools import tiny_config

pytest.importorskip("pyarrow")
pytest.importorskip("huggingface_hub")
from helpers.hub_data import add_climbmix, add_conversations, add_questions, add_ultrafeedback

from hotlap.cli import main
from hotlap.model.sandbox import find_sandbox
from hotlap.train.data import prepare
from hotlap.train.data.datasets import ARC_CHALLENGE, GSM8K, MMLU, SMOLTALK, ULTRAFEEDBACK
from hotlap.train.data.tasks import built_in, humaneval
from hotlap.train.distributed.world import joined
from hotlap.train.evaluation import chat_tasks, questions
from hotlap.train.evaluation.chatcore import chatcore
from hotlap.train.loop import LoopConfig
from hotlap.train.presets import gpt2_grade, gpt2_grade_dpo, gpt2_grade_rl, gpt2_grade_sft
from hotlap.train.speedruns import chat_stages, grade
from hotlap.train.speedruns import plan as plans
from hotlap.train.speedruns.chat_stages import later

CHAT = {"arc-easy", "arc-challenge", "mmlu", "gsm8k", "arithmetic", "spelling"}


def on_cpu(preset, **fields):
    """A preset of a stage, of few rows in float32."""

    def small(base, data):
        rows = min(preset(base, data).batch_rows, 4)
        return dataclasses.replace(
            preset(base, data), dtype="float32", compile="off", batch_rows=rows, **fields
        )

    return small


@pytest.fixture
def small_grade(hub_server, tmp_path, monkeypatch):
    """The command of a small gpt2-grade run, but for its data, and its hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    add_climbmix(hub_server, tmp_path)
    monkeypatch.setattr(prepare, "TOKENIZER_SHARDS", 1)
    add_conversations(hub_server, tmp_path, monkeypatch)
    add_questions(hub_server, monkeypatch)
    add_ultrafeedback(hub_server, tmp_path)
    (tmp_path / "bundle").mkdir()
    bundle = write_bundle(tmp_path / "bundle", mixed_tasks(count=4, longest=4))
    recipe = dataclasses.replace(
        gpt2_grade(1), batch_rows=2, micro_batch="1", compile="off", loop=LoopConfig(4), validation_tokens=20,
        model=tiny_config(vocab_size=300, context=256, layers=1, width=32, heads=1, kv_heads=1),
    )  # fmt: skip
    monkeypatch.setattr(grade, "gpt2_grade", lambda depth: recipe)
    monkeypatch.setattr(chat_stages, "gpt2_grade_sft", on_cpu(gpt2_grade_sft))
    monkeypatch.setattr(chat_stages, "gpt2_grade_dpo", on_cpu(gpt2_grade_dpo))
    few = {"samples": 2, "max_tokens": 4, "loop": LoopConfig(2), "validation_questions": 2}
    monkeypatch.setattr(chat_stages, "gpt2_grade_rl", on_cpu(gpt2_grade_rl, **few))
    monkeypatch.setattr(chat_stages, "find_sandbox", lambda: None)
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 4)
    monkeypatch.setitem(chat_tasks.PUBLIC, "gsm8k", chat_tasks.PUBLIC["gsm8k"]._replace(max_tokens=4))
    for task in questions.TASKS:
        monkeypatch.setitem(questions.TASKS, task, lambda: [("dog?", "fox"), ("cat?", "fox")])
    for task in ("spelling", "arithmetic", "greetings"):
        talks = [conversation(f"{task} {i}?", f"{2 * i}.") for i in range(20)]
        monkeypatch.setitem(built_in.TASKS, task, lambda seed, talks=talks: talks)
    command = ["speedrun", "gpt2-grade", "--depth", "1", "--out", "grade", "--data", "mix", "--yes",
               "--core-bundle", str(bundle), "--micro-batch", "1"]  # fmt: skip
    return command, hub_server


def kept(run) -> dict:
    return json.loads((run / "evaluation.json").read_text())["scores"]


def test_the_grade_is_scored_with_core_and_taught_to_converse(small_grade, tmp_path, capsys):
    command, hub = small_grade
    assert main(command) == 0
    printed = capsys.readouterr()
    for count, name in ((5, "smoltalk"), (3, "mmlu"), (2, "gsm8k"), (1, "arc-easy")):
        assert f"; {count} files, 0.00 GB, to {tmp_path}/cache/hotlap/{name}" in printed.out
    needed = {*SMOLTALK.names(4), *MMLU.names(1), *GSM8K.files["train"], *ARC_CHALLENGE.files["test"]}
    assert needed < set(hub.fetched()) and not set(ULTRAFEEDBACK.names(1)) & set(hub.fetched())
    result = json.loads((tmp_path / "grade/result.json").read_text())
    fields = {"core", "interval", "reached", "bpb", "seconds", "tokens", "device", "date"}
    assert set(result) == fields and not result["reached"]
    talks, rows, epochs = re.search(
        r"sft: .* (\d+) conversations in (\d+) rows, (\S+) epochs", printed.err
    ).groups()
    steps = sorted((tmp_path / "grade/sft/checkpoints").glob("step-*"))
    own_splits = 4 * 20 + 3 * 20  # SmolTalk's four files, and three passes over MMLU's
    assert own_splits + 4 * 15 < int(talks) <= own_splits + 4 * 20 + 3 * 20 and epochs == "1.0"
    assert int(steps[-1].name.removeprefix("step-")) == math.ceil(int(rows) / 2)
    assert set(kept(tmp_path / "grade/sft")) == {*CHAT, "chatcore"}
    assert main(command) == 0
    assert json.loads((tmp_path / "grade/result.json").read_text()) == result


def test_the_grade_ends_with_preferences_and_a_report_card_of_all_stages(small_grade, tmp_path, capsys):
    command, _ = small_grade
    assert main([*command, "--finish", "dpo"]) == 0
    printed = capsys.readouterr()
    assert f"; 2 files, 0.00 GB, to {tmp_path}/cache/hotlap/ultrafeedback" in printed.out
    plan = printed.out[: printed.out.index("step 1") if "step 1" in printed.out else None]
    assert re.search(r"^  sft +smoltalk mmlu:3 .* about 500M tokens$", plan, re.MULTILINE)
    assert re.search(r"^  dpo +ultrafeedback, about 60M tokens$", plan, re.MULTILINE)
    assert re.search(r"^  scores +bpb and core of the base; arc-easy .* after each", plan, re.MULTILINE)
    out = tmp_path / "grade"
    card = json.loads((out / "dpo/report_card.json").read_text())
    assert [stage["stage"] for stage in card["stages"]] == ["pretrain", "sft", "dpo"]
    base, *chat = [stage["scores"] for stage in card["stages"]]
    told = kept(out / "pretrain")
    assert set(base) == {"bpb", "core"} and base["bpb"]["score"] == told["bpb"]["bpb"]
    assert (base["core"]["score"], base["core"]["interval"]) == (
        told["core"]["core"],
        told["core"]["interval"],
    )
    for stage, scores in zip(("sft", "dpo"), chat, strict=True):
        told = kept(out / stage)
        assert set(scores) == {*CHAT, "chatcore", "chatcore with spelling"}
        for task in CHAT:
            assert scores[task]["score"] == told[task]["accuracy"] and scores[task]["n"] == told[task]["n"]
            assert scores[task]["interval"] == told[task]["interval"]
        mean = chatcore({task: told[task] for task in CHAT})
        assert scores["chatcore"]["score"] == mean["chatcore"] == told["chatcore"]["chatcore"]
        assert scores["chatcore with spelling"]["score"] == mean["with_spelling"]["chatcore"]
    gain = card["gains"][1]["scores"]["arc-easy"]["gain"]
    assert gain == chat[1]["arc-easy"]["score"] - chat[0]["arc-easy"]["score"]
    assert len(card["published"]) > 10 and (out / "dpo/report_card.png").exists()
    report = (out / "report.md").read_text()
    assert "](dpo/report_card.png)" in report and "| core | " in report
    assert "ChatCORE is over 4 of 5 tasks, without humaneval" in report


def test_the_grade_ends_with_rewards_and_scores_code_where_a_sandbox_works(
    small_grade, tmp_path, capsys, monkeypatch
):
    command, hub = small_grade
    monkeypatch.setattr(chat_stages, "find_sandbox", find_sandbox)
    monkeypatch.setattr(humaneval, "download_problems", lambda: None)
    problem = humaneval.Problem(
        "a", "def one():\n", "one", "def check(f):\n    assert f() == 1\n", "    return 1"
    )
    monkeypatch.setattr(humaneval, "problems", lambda: [problem] * 3)
    assert main([*command, "--finish", "rl"]) == 0
    plan = capsys.readouterr().out
    assert re.search(r"^  rl +gsm8k, 2 steps of 4 answers of at most 4 tokens", plan, re.MULTILINE)
    assert {*GSM8K.files["train"], *GSM8K.files["test"]} <= set(hub.fetched())
    if find_sandbox():
        assert f"; 1 files, 0.00 GB, to {tmp_path}/cache/hotlap" in plan
        asked, missing = {*CHAT, "humaneval"}, []
    else:
        asked, missing = CHAT, ["humaneval"]
    card = json.loads((tmp_path / "grade/rl/report_card.json").read_text())
    assert [stage["stage"] for stage in card["stages"]] == ["pretrain", "sft", "rl"]
    for stage in card["stages"][1:]:
        assert set(stage["scores"]) == {*asked, "chatcore", "chatcore with spelling"}
        assert stage["scores"]["chatcore"]["missing"] == missing
    assert (tmp_path / "grade/report.md").read_text().count("](rl/report_card.png)") == 1


def no_work(*arguments):
    raise AssertionError("this is done already")


def test_a_second_start_goes_on_where_the_first_one_ended(small_grade, tmp_path, capsys, monkeypatch):
    command, _ = small_grade
    command += ["--finish", "dpo"]
    scores = chat_stages.evaluate_model

    def stopped(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat_stages, "optimize_preferences", stopped)
        assert main(command) == INTERRUPTED  # between two stages
    before = kept(tmp_path / "grade/sft")
    assert not (tmp_path / "grade/report.md").exists() and not (tmp_path / "grade/dpo").exists()

    scored = []

    def noted(config):
        scored.append(config.model.name)
        return scores(config)

    monkeypatch.setattr(chat_stages, "evaluate_model", noted)
    assert main(command) == 0
    assert scored == ["dpo"] and kept(tmp_path / "grade/sft") == before
    report = (tmp_path / "grade/report.md").read_text()
    monkeypatch.setattr(chat_stages, "evaluate_model", no_work)
    assert main(command) == 0
    assert (tmp_path / "grade/report.md").read_text() == report


def test_only_the_scores_that_are_missing_are_made_up_for(small_grade, tmp_path, monkeypatch):
    command, _ = small_grade
    assert main(command) == 0
    path = tmp_path / "grade/sft/evaluation.json"
    told = kept(path.parent)
    left = {task: score for task, score in told.items() if task not in ("mmlu", "chatcore")}
    left["arc-easy"] = left["arc-easy"] | {"checkpoint": "step-000000"}  # of another checkpoint
    path.write_text(json.dumps({"scores": left}))
    asked, scores = [], chat_stages.evaluate_model

    def noted(config):
        asked.append(config.tasks)
        return scores(config)

    monkeypatch.setattr(chat_stages, "evaluate_model", noted)
    assert main(command) == 0
    assert asked == [("arc-easy", "mmlu")]
    card = json.loads((tmp_path / "grade/sft/report_card.json").read_text())["stages"][1]["scores"]
    assert card["chatcore"]["score"] == told["chatcore"]["chatcore"]  # over all tasks, old and new


def test_another_finish_leaves_the_first_one_and_its_report_card(small_grade, tmp_path):
    command, _ = small_grade
    assert main(command) == 0
    card = (tmp_path / "grade/sft/report_card.json").read_text()
    assert main([*command, "--finish", "dpo"]) == 0
    assert (tmp_path / "grade/sft/report_card.json").read_text() == card
    stages = json.loads((tmp_path / "grade/dpo/report_card.json").read_text())["stages"]
    assert stages[1] == json.loads(card)["stages"][1]


def test_the_plan_counts_the_time_and_the_cost_of_all_stages(monkeypatch):
    monkeypatch.setattr(plans, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    recipe = gpt2_grade()
    sft = gpt2_grade_sft(recipe)
    stages = [later(stage, recipe) for stage in (sft, gpt2_grade_dpo(sft))]
    with joined() as world:
        alone, all_ = (plans.plan(recipe, world, "nothing", later=found) for found in ([], stages))

    def hours_and_dollars(lines: dict[str, str]) -> list[float]:
        return [float(re.search(r"about \$?([\d.]+)", lines[name])[1]) for name in ("time", "cost")]

    share = 1 + (500e6 + 60e6 * 4 / 3) / recipe.tokens
    assert hours_and_dollars(all_) == pytest.approx([share * x for x in hours_and_dollars(alone)], rel=0.01)
    assert "per stage" in all_["disk"] and {"sft", "dpo"} < set(all_)


def test_ranks_agree_about_what_is_scored_already(tmp_path):
    run = write_run(
        tmp_path / "run", "sft", tmp_path / "gone", facts={"accuracy": 0.5, "interval": [0.1, 0.9], "n": 2}
    )
    found = run_ranks(2, in_world, scored_twice, str(run), ("facts", "spelling"))
    (first, second), other = found
    assert first == second and [first, second] == other
    assert first["scores"]["facts"]["device"] == "a GPU" != first["scores"]["spelling"]["device"]


@pytest.mark.parametrize("finish", ["sft", "dpo"])
def test_what_cannot_be_trained_on_shows_before_the_grade_is_trained(small_grade, tmp_path, capsys, finish):
    command, hub = small_grade
    command += ["--finish", finish]
    (tmp_path / "talks.jsonl").write_text('{"messages": []}\n')
    assert_error(capsys, main([*command, "--talks", "talks.jsonl"]), BAD_DATA, "talks.jsonl:1: ")
    assert_error(capsys, main([*command, "--talks", "smaltalk"]), NO_INPUT, "no conversations at smaltalk")
    if finish == "dpo":
        path = write_pairs(tmp_path / "pairs.jsonl")
        path.write_text(path.read_text() + '{"prompt": "?"}\n')
        assert_error(capsys, main([*command, "--pairs", "pairs.jsonl"]), BAD_DATA, "pairs.jsonl:41: ")
        assert_error(capsys, main([*command, "--pairs", "none.jsonl"]), NO_INPUT, "no pairs at none.jsonl")
    shutil.rmtree(tmp_path / "bundle/eval_data")
    assert_error(capsys, main(command), NO_INPUT, "no eval_data in ")
    rows = command.index("--micro-batch") + 1
    assert_error(capsys, main([*command[:rows], "3", *command[rows + 1 :]]), USAGE, "1 ranks x 3 rows")
    assert not hub.fetched() and not (tmp_path / "grade").exists()


def test_the_chat_stages_are_as_long_as_they_are_said_to_be():
    recipe = gpt2_grade()
    sft = gpt2_grade_sft(recipe)
    rl, dpo = gpt2_grade_rl(sft).validate(), gpt2_grade_dpo(sft).validate()
    assert rl.batch_rows == 16 * 16 and rl.loop.steps == 7473 // 16
    assert rl.optim.matrix_lr == pytest.approx(0.05 * sft.optim.matrix_lr)
    assert dpo.base == rl.base == sft.out
