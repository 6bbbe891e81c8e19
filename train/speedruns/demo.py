"""The demo: train a tokenizer and a base model, fine-tune it, score it, write a report, open a chat."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from hotlap.common import files
from hotlap.common.machine import circumstances
from hotlap.common.terminal import printable
from hotlap.model.conversation import render_prompt, spoken
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.model.weights import model_folder
from hotlap.train.data.tasks import identity
from hotlap.train.data.tasks.refusals import is_refusal
from hotlap.train.evaluation.contamination import mark_seen
from hotlap.train.evaluation.intervals import counted
from hotlap.train.evaluation.kept_scores import keep
from hotlap.train.evaluation.questions import QUESTIONS, TASKS, load_engine, wrong_answers
from hotlap.train.presets import tiny, tiny_sft
from hotlap.train.pretrain import pretrain
from hotlap.train.run.card import write_card
from hotlap.train.sft import fine_tune
from hotlap.train.speedruns.config import TinyConfig
from hotlap.train.speedruns.result import talk_to

Answers = dict[str, tuple[int, list[tuple[str, str, str]]]]  # task -> how many, and (question, right, wrong)


def tiny_speedrun(config: TinyConfig) -> dict[str, float]:
    """Run the stages that are not done yet, print the report, and return the scores."""
    began = time.perf_counter()
    run = config.out
    base = dataclasses.replace(tiny(), out=run / "pretrain", resume="auto")
    tuned = dataclasses.replace(tiny_sft(), out=run / "sft", base=run / "pretrain", resume="auto")
    scores_path = run / "scores.json"
    if scores_path.exists():
        scores = json.loads(scores_path.read_text(encoding="utf-8"))
        print(printable(f"{run} is complete; remove it to train again.\n"))
    else:
        bits = pretrain(base)["validation_bpb"]
        fine_tune(tuned)
        engine = load_engine(tuned.out)
        found = wrong_by_task(engine)
        keep_scores(tuned.out, engine, found)
        scores = scores_of(found)
        scores["validation_bpb"] = bits
        scores["seconds"] = round(time.perf_counter() - began, 1)
        write_summary(run, scores, sample_conversation(engine))
        # written last: it marks the run as complete
        files.write_object(scores_path, scores)
    print(printable((run / "report.md").read_text(encoding="utf-8", errors="replace")))
    chat = f"python chat.py {tuned.out}"
    print(printable(f"report: {run / 'report.md'}\nchat:   {chat}\npage:   {chat} --web"))
    return scores


def wrong_by_task(engine: Engine) -> Answers:
    """For every task, and for greetings, how many questions the model was asked, and its wrong answers."""
    asked = {"greetings": identity.held_out()} | {task: examples() for task, examples in TASKS.items()}
    return {task: (len(held_out), wrong_answers(engine, held_out)) for task, held_out in asked.items()}


def scores_of(found: Answers) -> dict[str, float]:
    """Accuracy on every task, and `wrongly_refused`: the share that is refused of the questions of all tasks
    but `refusals`, and of greetings.
    """
    scores = {task: (asked - len(wrong)) / asked for task, (asked, wrong) in found.items() if task in TASKS}
    taught = [answers for task, answers in found.items() if task != "refusals"]
    refused = sum(is_refusal(answer) for _, wrong in taught for _, _, answer in wrong)
    return scores | {"wrongly_refused": refused / sum(asked for asked, _ in taught)}


def keep_scores(run: Path, engine: Engine, found: Answers) -> None:
    """Leave the scores in the fine-tuned model's run, and in its model card."""
    folder = model_folder(run)
    scores = {
        task: counted(asked - len(wrong), asked) for task, (asked, wrong) in found.items() if task in TASKS
    }
    mark_seen(scores, {task: [text for text, _ in examples()] for task, examples in TASKS.items()}, folder)
    dtype = str(engine.model.compute_dtype).removeprefix("torch.")
    keep(run, {"scores": scores, "folder": str(folder), "dtype": dtype, **circumstances(engine.device)})
    write_card(run)


def sample_conversation(engine: Engine) -> list[tuple[str, str]]:
    """Questions and the model's greedy answers."""
    prompts = [render_prompt([{"role": "user", "content": q}], engine.tokenizer) for q in QUESTIONS]
    answers = engine.complete(prompts, Sampling(temperature=0, max_tokens=96))
    return [(q, spoken(ids, engine.tokenizer)) for q, ids in zip(QUESTIONS, answers, strict=True)]


def write_summary(run: Path, scores: dict[str, float], sample: list[tuple[str, str]]) -> None:
    """Write report.md: the scores, a sample conversation, and links to the reports of both stages."""
    shown = {
        "questions about Python in new phrasings, answered correctly": f"{scores['facts']:.1%}",
        "new sums solved with the calculator": f"{scores['arithmetic']:.1%}",
        "new words spelled correctly": f"{scores['spelling']:.1%}",
        "new questions about anything else, refused": f"{scores['refusals']:.1%}",
        "questions about what was taught, refused by mistake": f"{scores['wrongly_refused']:.1%}",
        "bits per byte on held-out documentation": f"{scores['validation_bpb']:.3f}",
        "seconds": f"{scores['seconds']:.0f}",
    }
    lines = ["# A model trained from scratch", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in shown.items()]
    lines += ["", "## Sample conversation", ""]
    lines += [line for q, a in sample for line in (f"> **you** {q}", ">", f"> **hotlap** {a}", "")]
    lines += ["Curves: [pretraining](pretrain/report.md), [fine-tuning](sft/report.md).", ""]
    lines += ["What the model is, and what it is not for: [model card](sft/model_card.md).", ""]
    files.write(run / "report.md", "\n".join(lines))


def main(config: TinyConfig) -> int:
    """`hotlap speedrun tiny`."""
    tiny_speedrun(config)
    return talk_to(config.out / "sft")
