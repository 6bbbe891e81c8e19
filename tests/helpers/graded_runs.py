"""Runs with a checkpoint and scores, and what several ranks make of them."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.chat_questions import random_engine

from hotlap.common.files import file_sha256
from hotlap.model.manifest import FORMAT, MANIFEST, manifest_text
from hotlap.model.weights import STATE, save_model
from hotlap.train.distributed.world import World
from hotlap.train.evaluation import questions
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.speedruns.chat_stages import score


def write_run(run: Path, stage: str, base: Path | None = None, **scores: dict) -> Path:
    """A run of this stage with a checkpoint, from a base, and with these kept scores of it."""
    engine, folder = random_engine(), run / "checkpoints" / "step-000007"
    folder.mkdir(parents=True)
    save_model(folder, engine.model.float(), engine.tokenizer)
    (folder / STATE).write_text(json.dumps({"stage": stage, "tokens": 100, "seconds": 2.0}))
    files = {p.name: {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in folder.iterdir()}
    config = {"out": str(run), "data": ["tasks"], "seed": 0} | ({"base": str(base)} if base else {})
    manifest = {"format": FORMAT, "ranks": 1, "files": files, "run": config}
    (folder / MANIFEST).write_text(manifest_text(manifest))
    if scores:
        keep(run, **scores)
    return run


def keep(run: Path, checkpoint: str = "step-000007", **scores: dict) -> None:
    """Scores of tasks, whose names have underscores here, as an evaluation leaves them."""
    about = {"date": "2026-11-27 12:00 UTC", "device": "a GPU", "checkpoint": checkpoint}
    kept = {name.replace("_", "-"): found | about for name, found in scores.items()}
    (run / "evaluation.json").write_text(json.dumps({"scores": kept}))


def scored_twice(world: World, run: str, tasks: tuple[str, ...]) -> list[dict]:
    """What is kept after each of two calls of `score`. Every task has two questions."""
    questions.ANSWER_TOKENS = 3
    for task in questions.TASKS:
        questions.TASKS[task] = lambda: [("dog?", "fox"), ("cat?", "fox")]
    found = []
    for _ in range(2):
        score(Path(run), EvalConfig(tasks=tasks), world)
        with world.main_first("look"):
            found.append(json.loads((Path(run) / "evaluation.json").read_text()))
    return found
