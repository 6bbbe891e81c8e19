"""Report cards of runs, from the scores that evaluations have left in them."""

import json
import math
import sys

import pytest
from helpers.graded_runs import keep, write_run

from hotlap.cli import main
from hotlap.common.errors import DataError
from hotlap.train.evaluation.chatcore import CHANCE, chatcore
from hotlap.train.evaluation.intervals import counted, difference
from hotlap.train.speedruns.chat_records import CHAT_RECORDS, FIVE, SIX
from hotlap.train.speedruns.report_card import write_report_card


@pytest.fixture
def runs(tmp_path):
    """A base model with bits per byte, fine-tuned, and preference-trained, with scores of both."""
    base = write_run(tmp_path / "pretrain", "pretrain", bpb={"bpb": 0.75, "rows": 9})
    sft = write_run(
        tmp_path / "sft", "sft", base,
        arc_easy=counted(300, 1000), gsm8k=counted(40, 1000) | {"in_training": 3}, spelling=counted(35, 100),
    )  # fmt: skip
    dpo = write_run(
        tmp_path / "dpo", "dpo", sft,
        arc_easy=counted(400, 1000), gsm8k=counted(45, 1000), spelling=counted(30, 100),
    )  # fmt: skip
    return base, sft, dpo


def card_of(run) -> dict:
    write_report_card(run)
    return json.loads((run / "report_card.json").read_text())


def test_a_card_has_the_scores_after_every_stage_and_what_each_has_gained(runs):
    card = card_of(runs[-1])
    base, _, dpo = (stage["scores"] for stage in card["stages"])
    assert base == {
        "bpb": {"score": 0.75, "interval": None, "date": "2026-11-27 12:00 UTC", "device": "a GPU"}
    }
    expected = counted(400, 1000)
    assert dpo["arc-easy"]["score"] == 0.4 and dpo["arc-easy"]["interval"] == expected["interval"]
    mean = chatcore({"arc-easy": expected, "gsm8k": counted(45, 1000), "spelling": counted(30, 100)})
    assert dpo["chatcore"]["score"] == mean["chatcore"]
    assert dpo["chatcore with spelling"]["interval"] == mean["with_spelling"]["interval"]
    assert card["gains"][0]["scores"] == {}
    gain = card["gains"][1]["scores"]["arc-easy"]
    low, high = gain["interval"]
    assert gain["gain"] == pytest.approx(0.1) and 0.05 < low < 0.1 < high < 0.15
    low, high = card["gains"][1]["scores"]["gsm8k"]["interval"]
    assert low < 0 < high


def test_a_reader_sees_what_is_more_than_chance_and_what_was_trained_on(runs):
    text = "\n".join(write_report_card(runs[-1], "dpo/"))
    arc, gsm8k = (
        next(line for line in text.splitlines() if line.startswith(f"| {t} ")) for t in ("arc-easy", "gsm8k")
    )
    assert arc.startswith(
        "| arc-easy |  | 0.3000 (0.272 to 0.329) | 0.4000 (0.370 to 0.431) | 1,000 | **+0.1000 ("
    )
    assert "**" not in gsm8k
    assert "After sft, 3 of the 1,000 questions of gsm8k had been trained on." in text
    assert "After dpo, ChatCORE is over 2 of 5 tasks, without arc-challenge, mmlu, humaneval." in text
    assert (
        "](dpo/report_card.png)" in text and "](report_card.png)" in (runs[-1] / "report_card.md").read_text()
    )
    assert "karpathy/nanochat README.md at 3a5e0bc" in text and "[own]" in text


def test_scores_of_another_checkpoint_are_not_on_the_card(runs):
    keep(runs[1], "step-000003", arc_easy=counted(900, 1000))
    assert card_of(runs[-1])["stages"][1]["scores"] == {}


def test_means_over_other_tasks_are_not_compared(runs):
    keep(runs[1], arc_easy=counted(300, 1000))
    gains = card_of(runs[-1])["gains"][1]["scores"]
    assert set(gains) == {"arc-easy"}


def test_a_run_without_public_tasks_is_not_set_beside_nanochat(runs):
    keep(runs[1], facts=counted(9, 10), spelling=counted(3, 10))
    card = card_of(runs[1])
    assert card["published"] == [] and "published" not in (runs[1] / "report_card.md").read_text()


def test_a_card_is_written_where_the_picture_cannot_be_drawn(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = "\n".join(write_report_card(runs[-1]))
    assert "0.4000" in text and ".png" not in text and not (runs[-1] / "report_card.png").exists()


def test_the_command_takes_a_run_or_one_of_its_checkpoints(runs, capsys):
    assert main(["report-card", str(runs[-1] / "checkpoints" / "step-000007")]) == 0
    printed = capsys.readouterr().out
    assert "| arc-easy |" in printed and printed.endswith(f"{runs[-1]}/report_card.md\n")


def test_a_damaged_file_of_scores_is_an_error(runs):
    (runs[1] / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json is not JSON"):
        write_report_card(runs[-1])


# Published scores


@pytest.mark.parametrize("record", CHAT_RECORDS, ids=lambda r: r.name)
def test_a_published_score_has_a_source_and_agrees_with_its_mean(record):
    assert record.source and all(0 <= score < 1 for score in record.scores.values())
    above_chance = [(record.scores[t] - c) / (1 - c) for t, c in CHANCE.items() if t in record.scores]
    if SIX in record.scores:
        above_chance.append(record.scores["spelling"])
    mean = record.scores.get(FIVE, record.scores.get(SIX))
    if mean is not None:
        assert sum(above_chance) / (6 if SIX in record.scores else 5) == pytest.approx(mean, abs=1.1e-3)


# Differences


def test_a_difference_is_what_newcombe_s_example_says():
    """56/70 and 48/80: 0.2, from 0.0524 to 0.3339 (Newcombe, 1998, table II, method 10)."""
    pairs = [(s["accuracy"], s["interval"]) for s in (counted(56, 70), counted(48, 80))]
    gain, interval = difference(*pairs)
    assert gain == pytest.approx(0.2) and interval == pytest.approx([0.0524, 0.3339], abs=5e-5)


def test_a_difference_of_nothing_is_as_wide_as_both_intervals():
    score = counted(50, 100)
    half = (score["interval"][1] - score["interval"][0]) / 2
    _, (low, high) = difference(*[(score["accuracy"], score["interval"])] * 2)
    assert high == pytest.approx(half * math.sqrt(2)) == pytest.approx(-low)
