"""`hotlap eval`: bits per byte on held-out text, CORE, samples, and accuracy on held-out questions."""

from __future__ import annotations

import json
import os
import time

from hotlap.common.files import cache_folder, write
from hotlap.common.machine import circumstances
from hotlap.common.terminal import printable
from hotlap.model.conversation import spoken
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import open_model, stage
from hotlap.train.distributed.world import World, joined
from hotlap.train.evaluation.bits_per_byte import bits_per_byte, held_out_rows
from hotlap.train.evaluation.config import EvalConfig
from hotlap.train.evaluation.contamination import mark_seen, scored_records
from hotlap.train.evaluation.core import evaluate_core
from hotlap.train.evaluation.core_bundle import Task, core_bundle, read_bundle
from hotlap.train.evaluation.questions import (
    QUESTIONS,
    TASKS,
    examine,
    examples_of,
    greedy,
    load_engine,
    question,
)

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


KNOWN = ("bpb", "core", "samples", *TASKS)


def check(config: EvalConfig) -> None:
    """Raise what is wrong with the config itself."""
    config.validate()
    if not config.tasks:
        raise ValueError(f"no --tasks; known: {', '.join(KNOWN)}")
    if unknown := [task for task in config.tasks if task not in KNOWN]:
        if os.path.exists(unknown[0]):
            raise ValueError(f"{unknown[0]} is a path, not a task; put the model before --tasks")
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(KNOWN)}")
    if config.out and config.out.exists():
        raise FileExistsError(f"{config.out} exists; choose another file with --out")
    if config.out and not config.out.parent.is_dir():
        raise FileNotFoundError(f"no folder {config.out.parent} for {config.out.name}; create it first")
    if "bpb" in config.tasks and config.data is None:
        raise ValueError("bpb needs text; give it, or a folder of shards, with --data")


def check_stage(config: EvalConfig, trained_for: str | None) -> None:
    questions = [task for task in config.tasks if task in TASKS]
    if questions and trained_for == "pretrain":
        raise ValueError(
            f"{config.model} is a base model, and {', '.join(questions)} need a chat model; try --tasks "
            "samples, bpb or core, or fine-tune it with `hotlap sft`"
        )


def evaluate_model(config: EvalConfig) -> dict:
    """Score the model. Prints a table, then writes to config.out and returns scores, samples and wrong
    answers, with the device, versions and date.

    Reads the data before loading the model, to find errors early. All ranks share the work of bpb and core;
    rank 0 does the rest.
    """
    began = time.perf_counter()
    check(config)
    folder, shape, tokenizer = open_model(config.model)
    trained_for = stage(folder)
    converses = trained_for != "pretrain"
    check_stage(config, trained_for)
    with joined() as world:
        rows = (
            held_out_rows(config.data, tokenizer, shape.context, config.validation_tokens)
            if "bpb" in config.tasks
            else None
        )
        core_tasks = open_bundle(config, world) if "core" in config.tasks else []
        prompts = sample_prompts(tokenizer, converses) if "samples" in config.tasks else {}
        chosen = [task for task in TASKS if task in config.tasks] if world.is_main else []
        examples = {task: examples_of(task, tokenizer, shape.context) for task in chosen}
        engine = load_engine(folder, world.device)
        scores: dict[str, dict] = {}
        wrong: dict[str, list] = {}
        samples: list[tuple[str, str]] = []
        if rows:
            scores["bpb"] = bits_per_byte(engine.model, rows, tokenizer, world)
        if core_tasks:
            scores["core"] = evaluate_core(engine.model, tokenizer, core_tasks, world)
        if world.is_main:
            for task in examples:
                scores[task], wrong[task] = examine(engine, task, examples[task])
            if prompts:
                answers = greedy(engine, list(prompts.values()))
                shown = [spoken(ids, tokenizer) if converses else tokenizer.decode(ids) for ids in answers]
                samples = list(zip(prompts, shown, strict=True))
            mark_seen(*scored_records(scores, examples, core_tasks), folder)
        result = {
            "model": str(config.model), "folder": str(folder), "stage": trained_for,
            **circumstances(engine.device), "dtype": str(engine.model.compute_dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - began, 1),
            "ranks": world.size, "scores": scores, "samples": samples, "wrong": wrong,
        }  # fmt: skip
        if world.is_main:
            print(printable(as_table(result)), flush=True)  # before the disk turns out to be full
            if config.out:
                write(config.out, json.dumps(result, indent=1) + "\n")
    return result


def open_bundle(config: EvalConfig, world: World) -> list[Task]:
    """CORE's tasks from config.core_bundle, or from a download by rank 0."""
    folder = config.core_bundle
    if folder is None:
        with world.main_first("CORE's bundle"):
            folder = core_bundle(cache_folder())
    return read_bundle(folder, config.max_per_task)


def as_table(result: dict) -> str:
    """The result of evaluate_model as text: a line per score, then the samples."""
    lines = [f"{result['folder']} on {result['device']}, {result['dtype']}", ""]
    lines.append(f"{'':34}{'score':>8}{'95 %':>18}{'n':>8}{'centred':>9}")
    for name, score in result["scores"].items():
        if name == "bpb":
            lines.append(f"{name:34}{score['bpb']:8.4f}{'':18}{score['rows']:>8} rows of {score['context']}")
        elif name == "core":
            lines.append(line(name, score["core"], score["interval"], len(score["tasks"])) + " tasks")
            for label, part in score["tasks"].items():
                shown = line(f"  {label}", part["accuracy"], part["interval"], part["n"])
                lines.append(f"{shown}{part['centred']:9.4f}")
        else:
            lines.append(line(name, score["accuracy"], score["interval"], score["n"]))
    for text, answer in result["samples"]:
        lines += ["", f"> {text}", answer.strip() or "[no answer]"]
    return "\n".join(lines)


def line(name: str, score: float, interval: list[float], n: int) -> str:
    return f"{name:34}{score:8.4f}{'{:.4f} to {:.4f}'.format(*interval):>18}{n:>8}"


def main(config: EvalConfig) -> None:
    """`hotlap eval`."""
    evaluate_model(config)
