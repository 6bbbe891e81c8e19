"""`hotlap eval`: bits per byte on held-out text, CORE, ChatCORE, samples, and accuracy on questions."""

from __future__ import annotations

import os
import time

from hotlap.common.files import cache_folder, write_object
from hotlap.common.log import log
from hotlap.common.machine import circumstances
from hotlap.common.terminal import printable
from hotlap.model import sandbox
from hotlap.model.conversation import spoken
from hotlap.model.engine import Engine
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import open_model, stage
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation import chat_tasks
from hotlap.train.evaluation.bits_per_byte import bits_per_byte, held_out_rows
from hotlap.train.evaluation.chat_tasks import ask, examine
from hotlap.train.evaluation.chatcore import chatcore
from hotlap.train.evaluation.config import ANY_MODEL, BUILT_IN, HUMANEVAL, PUBLIC, WAIT, EvalConfig, check_out
from hotlap.train.evaluation.contamination import mark_seen, scored_records
from hotlap.train.evaluation.core import evaluate_core
from hotlap.train.evaluation.core_bundle import Task, core_bundle, read_bundle
from hotlap.train.evaluation.kept_scores import keep, kept_scores
from hotlap.train.evaluation.questions import QUESTIONS, greedy, load_engine, question
from hotlap.train.evaluation.table import as_table
from hotlap.train.run.card import write_card

OPENINGS = (  # only letters and spaces, which a character tokenizer is likely to have
    "The largest animal that lives in the sea is",
    "Water freezes when",
    "In the morning she opened the window and",
    "A function returns",
)


def sample_prompts(tokenizer: Tokenizer, converses: bool) -> dict[str, list[int]]:
    """The tokens of a few questions; for a base model, of openings to continue."""
    if converses:
        return {text: question(text, tokenizer) for text in QUESTIONS}
    return {text: [tokenizer.bos, *tokenizer.encode(text)] for text in OPENINGS}


ASKED = (*PUBLIC, *BUILT_IN)  # of chat models alone
KNOWN = (*ANY_MODEL, *ASKED)


def check(config: EvalConfig) -> tuple[str, ...]:
    """Raise what is wrong with the config itself, else return the tasks that can be scored here."""
    config.validate()
    tasks = config.chosen
    if not tasks:
        raise ValueError(f"no --tasks; known: {', '.join(KNOWN)}")
    if unknown := [task for task in tasks if task not in KNOWN]:
        if os.path.exists(unknown[0]):
            raise ValueError(f"{unknown[0]} is a path, not a task; put the model before --tasks")
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(KNOWN)}")
    check_out(config.out)
    if "bpb" in tasks and config.data is None:
        raise ValueError("bpb needs text; give it, or a folder of shards, with --data")
    if HUMANEVAL in tasks:
        try:
            sandbox.require_sandbox(HUMANEVAL)
        except ValueError as error:
            if config.tasks is not None:
                raise
            log.info("left out: %s", error)
            tasks = tuple(task for task in tasks if task != HUMANEVAL)
    return tasks


def check_stage(config: EvalConfig, trained_for: str | None) -> None:
    questions = [task for task in config.chosen if task in ASKED]
    if questions and trained_for == "pretrain":
        raise ValueError(
            f"{config.model} is a base model, and {', '.join(questions)} need a chat model; try --tasks "
            "samples, bpb or core, or fine-tune it with `hotlap sft`"
        )


def evaluate_model(config: EvalConfig) -> dict:
    """Score the model. Prints a table, then writes to config.out and returns scores, samples and wrong
    answers, with the device, versions and date; the scores go to the run's evaluation.json and card, too.

    Reads the data before loading the model, to find errors early. All ranks share the work; rank 0 shows
    samples.
    """
    began = time.perf_counter()
    tasks = check(config)
    folder, shape, tokenizer = open_model(config.model)
    trained_for = stage(folder)
    converses = trained_for != "pretrain"
    check_stage(config, trained_for)
    kept_scores(config.model)  # a damaged file shows now
    with joined(WAIT) as world:
        rows = (
            held_out_rows(config.data, tokenizer, shape.context, config.validation_tokens)
            if "bpb" in tasks
            else None
        )
        core_tasks = open_bundle(config, world) if "core" in tasks else []
        prompts = sample_prompts(tokenizer, converses) if "samples" in tasks else {}
        chosen = [task for task in ASKED if task in tasks]
        with world.main_first("public questions"):
            if world.is_main:
                chat_tasks.download(chosen)
        asked = [ask(task, tokenizer, shape.context, config.max_per_task) for task in chosen]
        engine = load_engine(folder, world.device)
        scores: dict[str, dict] = {}
        wrong: dict[str, list] = {}
        if rows:
            scores["bpb"] = bits_per_byte(engine.model, rows, tokenizer, world)
        if core_tasks:
            scores["core"] = evaluate_core(engine.model, tokenizer, core_tasks, world)
        for questions in asked:
            scores[questions.task], wrong[questions.task] = examine(engine, questions, world)
        if mean := chatcore(scores):
            scores["chatcore"] = mean
        samples = answered(engine, prompts, converses) if world.is_main else []
        if world.is_main:
            mark_seen(*scored_records(scores, asked, core_tasks), folder)
        result = {
            "model": str(config.model), "folder": str(folder), "stage": trained_for,
            **circumstances(engine.device), "dtype": str(engine.model.compute_dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - began, 1),
            "ranks": world.size, "scores": scores, "samples": samples, "wrong": wrong,
        }  # fmt: skip
        if world.is_main:
            print(printable(as_table(result)), flush=True)  # before the disk turns out to be full
            if config.out:
                write_object(config.out, result)
            if keep(config.model, result):
                write_card(config.model)
    return result


def answered(engine: Engine, prompts: dict[str, list[int]], converses: bool) -> list[tuple[str, str]]:
    """The prompts' texts, and how the model answers or continues them."""
    tokenizer, found = engine.tokenizer, greedy(engine, list(prompts.values()))
    shown = [spoken(ids, tokenizer) if converses else tokenizer.decode(ids) for ids in found]
    return list(zip(prompts, shown, strict=True))


def open_bundle(config: EvalConfig, world: World) -> list[Task]:
    """CORE's tasks from config.core_bundle, or from a download by rank 0."""
    folder = config.core_bundle
    if folder is None:
        with world.main_first("CORE's bundle"):
            folder = core_bundle(cache_folder())
    return read_bundle(folder, config.max_per_task)


def main(config: EvalConfig) -> None:
    """`hotlap eval`."""
    evaluate_model(config)
