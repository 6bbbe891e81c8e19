"""The report card of a run: the scores after each stage that made its model, what each stage has gained, and
nanochat's published scores beside them.

The scores are those that `hotlap eval` has left in the stages' runs (evaluation.json). ChatCORE is computed
from them again, as tasks may have been scored one at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from hotlap.common import files
from hotlap.common.terminal import printable
from hotlap.model.weights import model_folder
from hotlap.train.evaluation.chatcore import CHANCE, chatcore
from hotlap.train.evaluation.intervals import difference
from hotlap.train.evaluation.kept_scores import kept_scores
from hotlap.train.run.card import MISSING, Made, code, how_it_was_made, lineage, plain, size, table, value_of
from hotlap.train.run.folder import run_of
from hotlap.train.run.metrics import number
from hotlap.train.speedruns.chat_records import CHAT_RECORDS, FIVE, SIX, ChatRecord
from hotlap.train.speedruns.config import ReportCardConfig
from hotlap.train.speedruns.report_card_figure import draw

NAME = "report_card"  # of the files in the run's directory
BUILT_IN = ("spelling", "arithmetic", "facts", "refusals")
ORDER = ("bpb", "core", *CHANCE, FIVE, SIX, *BUILT_IN)
SHARED = {"core", *CHANCE}  # what we ask as nanochat does


class Graded(NamedTuple):
    """A stage and its scores: task -> score, interval, n and more; see `scores_of`."""

    name: str
    made: Made
    scores: dict[str, dict]


def write_report_card(run: Path, seen_from: str = "") -> list[str]:
    """Write report_card.json, .png and .md into a run's directory, and return the lines of the last one for a
    file from which the run's directory is `seen_from`, such as "sft/". ValueError if no stage has scores.
    """
    stages = graded(run)
    if not any(stage.scores for stage in stages):
        raise ValueError(f"no stage of {run} has scores; leave some there with `hotlap eval {run}`")
    gains = [gain(*pair) for pair in itertools.pairwise(stages)]
    ours = {task for stage in stages for task in stage.scores}
    published = CHAT_RECORDS if ours & SHARED else ()
    content = {
        "stages": [
            {"stage": s.name, "model": str(s.made.path), "machine": s.made.machine, "scores": s.scores}
            for s in stages
        ],
        "gains": gains,
        "published": [dataclasses.asdict(record) for record in published],
    }  # fmt: skip
    files.write_object(run / f"{NAME}.json", content)
    drawn = draw(run / f"{NAME}.png", {s.name: s.scores for s in stages}, published, ORDER, *facts(stages))
    figure = f"{NAME}.png" if drawn else ""
    rest = published_lines() if published else []
    lines = [*card_lines(stages, gains, figure), *rest]
    files.write(run / f"{NAME}.md", "\n".join([f"# Report card: {code(run.name)}", "", *lines]))
    return [*card_lines(stages, gains, figure and seen_from + figure), *rest]


def graded(run: Path) -> list[Graded]:
    """The stages that made a run's model, the first one first, with the scores of the checkpoints that were
    gone on from.
    """
    found = []
    for made in lineage(run):
        stage, folder = made.stage or MISSING, run_of(made.path)
        name = stage if folder.name == stage else f"{stage} ({plain(folder.name)})"
        found.append(Graded(name, made, scores_of(made.path) if made.path.exists() else {}))
    return found


def scores_of(model: Path) -> dict[str, dict]:
    """The kept scores of a run's newest checkpoint, or of the checkpoint that is named: score, interval (None
    for bits per byte), n, in_training, device and date of each task that has them.
    """
    checkpoint = model_folder(model)
    kept = kept_scores(run_of(checkpoint))
    kept = {task: score for task, score in kept.items() if score.get("checkpoint") == checkpoint.name}
    found = {}
    for task, score in kept.items():
        value, interval = value_of(score)
        if value is not None and task != "chatcore":
            about = {key: score[key] for key in ("n", "in_training", "device", "date") if key in score}
            found[task] = {"score": value, "interval": interval, **about}
    asked = {
        t: kept[t] for t, s in found.items() if s["interval"] and number(kept[t], "accuracy") is not None
    }
    if mean := chatcore(asked):
        missing = {"missing": mean["missing"]}
        found[FIVE] = {"score": mean["chatcore"], "interval": mean["interval"], **missing}
        if both := mean.get("with_spelling"):
            found[SIX] = {"score": both["chatcore"], "interval": both["interval"], **missing}
    return {task: found[task] for task in sorted(found, key=place)}


def place(task: str) -> tuple[int, str]:
    return ORDER.index(task) if task in ORDER else len(ORDER), task


def gain(before: Graded, after: Graded) -> dict:
    """What a stage has gained in the tasks that both were asked. A mean of other tasks is not compared."""
    scores = {}
    for task, score in after.scores.items():
        earlier = before.scores.get(task)
        if earlier is None or earlier.get("missing") != score.get("missing"):
            continue
        if score["interval"] and earlier["interval"]:
            pairs = [(s["score"], s["interval"]) for s in (score, earlier)]
            value, interval = difference(*pairs)
        else:
            value, interval = score["score"] - earlier["score"], None
        scores[task] = {"gain": value, "interval": interval}
    return {"from": before.name, "to": after.name, "scores": scores}


def facts(stages: list[Graded]) -> list[str]:
    """The devices and the last day of the scores."""
    every = [score for stage in stages for score in stage.scores.values()]
    devices = sorted({str(score["device"]) for score in every if score.get("device")})
    return [*devices, max((str(score["date"]) for score in every if score.get("date")), default="")]


def card_lines(stages: list[Graded], gains: list[dict], figure: str) -> list[str]:
    gains = [found for found in gains if found["scores"]]
    tasks = sorted({task for stage in stages for task in stage.scores}, key=place)
    heads = ["", *(stage.name for stage in stages), "n", *(f"{g['from']} to {g['to']}" for g in gains)]
    rows = []
    for task in tasks:
        scores = [stage.scores.get(task) for stage in stages]
        counts = dict.fromkeys(f"{s['n']:,}" for s in scores if s and number(s, "n") is not None)
        found = [g["scores"].get(task) for g in gains]
        rows.append((
            plain(task), *map(cell, scores), ", ".join(counts), *map(gain_cell, found),
        ))  # fmt: skip
    lines = [f"{size(stages[-1].made)} Scores with 95 % intervals after each stage:", ""]
    lines += [*table(tuple(heads), rows), ""]
    lines += [f"![scores after each stage]({figure})", ""] if figure else []
    return [*lines, *notes(stages, bool(gains)), "", *how_it_was_made([stage.made for stage in stages])]


def cell(score: dict | None) -> str:
    if score is None:
        return ""
    ends = "{:.3f} to {:.3f}".format(*score["interval"]) if score["interval"] else ""
    return f"{score['score']:.4f}" + (f" ({ends})" if ends else "")


def gain_cell(found: dict | None) -> str:
    """In bold if the interval leaves out 0."""
    if found is None:
        return ""
    if found["interval"] is None:
        return f"{found['gain']:+.4f}"
    low, high = found["interval"]
    text = f"{found['gain']:+.4f} ({low:+.3f} to {high:+.3f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def notes(stages: list[Graded], compared: bool) -> list[str]:
    """What a reader of the table must know."""
    tasks = {task for stage in stages for task in stage.scores}
    lines = ["Scores are shares of right answers, unless another thing is said here."]
    if tasks & {"core", FIVE}:
        lines.append("`core` and `chatcore` are means of how far tasks are above chance.")
    if "bpb" in tasks:
        lines.append("`bpb` is bits per byte of text, where less is better.")
    scores = [(stage.name, task, score) for stage in stages for task, score in stage.scores.items()]
    for name, task, score in scores:
        if task == FIVE and score["missing"]:
            without, of = ", ".join(score["missing"]), len(CHANCE) - len(score["missing"])
            lines.append(f"After {name}, ChatCORE is over {of} of {len(CHANCE)} tasks, without {without}.")
        if number(score, "in_training"):
            lines.append(
                f"After {name}, {score['in_training']:,} of the {score['n']:,} questions of {plain(task)} "
                "had been trained on."
            )
    if compared:
        lines.append(
            "Differences in bold are larger than chance explains. Their intervals take the scores as "
            "independent. As they are of the same questions, smaller differences may be real, too."
        )
    return [f"* {line}" for line in lines]


def published_lines() -> list[str]:
    tasks = sorted({task for record in CHAT_RECORDS for task in record.scores}, key=place)
    rows = [
        (r.name, *(published_score(r, task) for task in tasks), r.source) for r in CHAT_RECORDS
    ]  # fmt: skip
    return [
        "## nanochat's published scores", "",
        *table(("model and stage", *tasks, "source"), rows), "",
        "[own]: by the makers of a fork or model, and checked by nobody else. Spelling is SpellingBee there, "
        "whose questions are others than ours, and bits per byte are of other text. ChatCORE is over five "
        "tasks, or six with spelling. Published scores have no intervals.", "",
    ]  # fmt: skip


def published_score(record: ChatRecord, task: str) -> str:
    if task not in record.scores:
        return ""
    score = record.scores[task]
    return f"about {score:g}" if record.approximate else f"{score:g}"


def main(config: ReportCardConfig) -> None:
    """`hotlap report-card`."""
    run = run_of(model_folder(config.run))
    lines = write_report_card(run)
    print(printable("\n".join([*lines, str(run / f"{NAME}.md")])))
