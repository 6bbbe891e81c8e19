"""From nothing to a model that answers: corpus, tokenizer, pretraining, fine-tuning, scores, report,
conversation.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from hotlap.common import files, options
from hotlap.model.conversation import render_prompt, spoken
from hotlap.model.engine import Engine
from hotlap.model.sampling import Sampling
from hotlap.train.evaluation.questions import QUESTIONS, evaluate_tasks, load_engine
from hotlap.train.presets import tiny, tiny_sft
from hotlap.train.pretrain import pretrain
from hotlap.train.sft import fine_tune
from hotlap.train.speedruns.result import talk_to


@dataclass(frozen=True)
class TinyConfig:
    """Train a model that answers questions about Python, in minutes, with nothing but this machine."""

    out: Path = Path("runs/tiny")
    """Directory of everything that this makes."""


def tiny_speedrun(config: TinyConfig) -> dict[str, float]:
    """Run every stage that is not done yet, print the scores and a conversation, and return the scores."""
    began = time.perf_counter()
    run = config.out
    base = dataclasses.replace(tiny(), out=run / "pretrain", resume="auto")
    tuned = dataclasses.replace(tiny_sft(), out=run / "sft", base=run / "pretrain", resume="auto")
    scores_path = run / "scores.json"
    if scores_path.exists():
        scores = json.loads(scores_path.read_text())
        print(f"{run} is complete; remove it to train again.\n")
    else:
        bits = pretrain(base)["validation_bpb"]
        fine_tune(tuned)
        engine = load_engine(tuned.out)
        scores = evaluate_tasks(engine)[0] | {"validation_bpb": bits}
        scores["seconds"] = round(time.perf_counter() - began, 1)
        write_summary(run, scores, sample_conversation(engine))
        # last, because it says that the run is complete
        files.write(scores_path, json.dumps(scores, indent=1) + "\n")
    print((run / "report.md").read_text())
    print(f"the whole report: {run / 'report.md'}\ntalk to it:       python chat.py {tuned.out}")
    return scores


def sample_conversation(engine: Engine) -> list[tuple[str, str]]:
    """Questions and the model's greedy answers."""
    prompts = [render_prompt([{"role": "user", "content": q}], engine.tokenizer) for q in QUESTIONS]
    answers = engine.complete(prompts, Sampling(temperature=0, max_tokens=96))
    return [(q, spoken(ids, engine.tokenizer)) for q, ids in zip(QUESTIONS, answers, strict=True)]


def write_summary(run: Path, scores: dict[str, float], sample: list[tuple[str, str]]) -> None:
    """report.md: the scores, a conversation, and where the stages' own reports are."""
    shown = {
        "facts of Python answered right, asked in new words": f"{scores['facts']:.1%}",
        "new sums right, with the calculator": f"{scores['arithmetic']:.1%}",
        "new words spelled right": f"{scores['spelling']:.1%}",
        "bits per byte of held-out documentation": f"{scores['validation_bpb']:.3f}",
        "seconds": f"{scores['seconds']:.0f}",
    }
    lines = ["# A model from nothing", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in shown.items()]
    lines += ["", "## A conversation with it", ""]
    lines += [line for q, a in sample for line in (f"> **you** {q}", ">", f"> **hotlap** {a}", "")]
    lines += ["Curves: [pretraining](pretrain/report.md), [fine-tuning](sft/report.md).", ""]
    files.write(run / "report.md", "\n".join(lines))


def main(arguments: list[str]) -> int:
    """`hotlap speedrun tiny`."""
    config = options.parse(TinyConfig, arguments, command="speedrun tiny")
    tiny_speedrun(config)
    return talk_to(config.out / "sft")
