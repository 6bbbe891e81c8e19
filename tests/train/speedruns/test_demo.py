"""From nothing to a model that answers, in one command."""

import dataclasses
import json
from functools import partial
from types import SimpleNamespace

import pytest
from helpers.small_runs import small_run, write_conversations
from helpers.tools import tiny_config

from hotlap.cli import main
from hotlap.train import stage
from hotlap.train.data.tasks import identity
from hotlap.train.data.tasks.refusals import REFUSAL
from hotlap.train.evaluation import questions
from hotlap.train.loop import LoopConfig
from hotlap.train.sft import SFTConfig
from hotlap.train.speedruns import demo


@pytest.fixture
def small_speedrun(tmp_path, monkeypatch) -> list[str]:
    """The command of a speedrun whose stages take 12 and 4 steps; its questions are two a task."""
    (tmp_path / "words").mkdir()
    base = small_run(
        tmp_path / "words", tokenizer="bpe",
        model=tiny_config(vocab_size=300, context=64, layers=1, width=32, heads=1, kv_heads=1),
    )  # fmt: skip
    tuned = SFTConfig(
        data=str(write_conversations(tmp_path / "talks.jsonl")),
        batch_rows=2,
        loop=LoopConfig(4),
        dtype="float32",
    )
    monkeypatch.setattr(demo, "tiny", lambda: base)
    monkeypatch.setattr(demo, "tiny_sft", lambda: tuned)
    monkeypatch.setattr(questions, "ANSWER_TOKENS", 8)
    for task, examples in list(questions.TASKS.items()):
        monkeypatch.setitem(questions.TASKS, task, partial(lambda examples: examples()[:2], examples))
    return ["speedrun", "tiny", "--out", str(tmp_path / "tiny")]


def test_a_speedrun_goes_on_after_an_interruption_and_then_is_complete(tmp_path, small_speedrun, capsys):
    real = stage.prefetched

    def failing(items, device):
        for i, item in enumerate(real(items, device)):
            if i == 8:
                raise OSError("the power is gone")
            yield item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "prefetched", failing)
        assert main(small_speedrun) == 74
    assert not (tmp_path / "tiny" / "scores.json").exists()
    capsys.readouterr()

    assert main(small_speedrun) == 0
    printed = capsys.readouterr()
    assert "resuming after step 6" in printed.err and "# A model trained from scratch" in printed.out
    scores = json.loads((tmp_path / "tiny" / "scores.json").read_text())
    assert set(scores) == {
        "facts",
        "arithmetic",
        "spelling",
        "refusals",
        "wrongly_refused",
        "validation_bpb",
        "seconds",
    }
    report = (tmp_path / "tiny" / "report.md").read_text()
    assert all(f"> **you** {question}" in report for question in questions.QUESTIONS)
    for name, score in (("else, refused", "refusals"), ("refused by mistake", "wrongly_refused")):
        assert f"{name} | {scores[score]:.1%} |" in report
    assert (tmp_path / "tiny" / "pretrain" / "report.md").exists()
    card = (tmp_path / "tiny" / "sft" / "model_card.md").read_text()
    assert f"| facts | {scores['facts']:.4f} |" in card and "(sft/model_card.md)" in report

    assert main(small_speedrun) == 0
    printed = capsys.readouterr()
    assert "is complete; remove it to train again" in printed.out and "step" not in printed.err
    assert json.loads((tmp_path / "tiny" / "scores.json").read_text()) == scores


def test_the_demo_trains_in_the_directory_that_it_is_given(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(demo, "pretrain", lambda config: seen.append(config) or {"validation_bpb": 1.0})
    monkeypatch.setattr(demo, "fine_tune", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.tiny_speedrun(demo.TinyConfig(tmp_path / "here"))
    assert seen == [dataclasses.replace(demo.tiny(), out=tmp_path / "here" / "pretrain", resume="auto")]


def test_refusals_count_as_mistakes_where_the_model_should_answer(monkeypatch):
    answers = {"len?": REFUSAL, "sum?": "no", "Hamlet?": REFUSAL}
    tasks = {"facts": ["len?"], "arithmetic": ["sum?", "sum?"], "refusals": ["Hamlet?"]}
    for task, asked in tasks.items():
        examples = [(question, REFUSAL if task == "refusals" else "yes") for question in asked]
        monkeypatch.setitem(questions.TASKS, task, lambda examples=examples: examples)
    monkeypatch.delitem(questions.TASKS, "spelling")
    monkeypatch.setattr(identity, "held_out", lambda: [("hi?", "Hello!")])
    monkeypatch.setattr(questions, "question", lambda text, tokenizer: text)
    monkeypatch.setattr(
        questions, "greedy", lambda engine, asked: [answers.get(text, REFUSAL) for text in asked]
    )
    monkeypatch.setattr(questions, "spoken", lambda answer, tokenizer: answer)
    scores = demo.scores_of(demo.wrong_by_task(SimpleNamespace(tokenizer=None)))
    assert scores == {"facts": 0, "arithmetic": 0, "refusals": 1, "wrongly_refused": 2 / 4}
