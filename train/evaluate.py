"""What a model is worth: loss and bits per byte on held-out text, CORE, what it says, and the share of
questions answered right.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hotlap.kernels.cross_entropy import IGNORE
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.model.conversation import render_prompt
from hotlap.model.engine import Engine
from hotlap.model.gpt import GPT
from hotlap.model.sampling import Sampling
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import TOKENIZER, load_model, open_model, stage
from hotlap.train.core import counted, evaluate_core
from hotlap.train.core_tasks import Task, read_bundle
from hotlap.train.data import PackedRows, packed_rows, validation_batches
from hotlap.train.dist import World, joined
from hotlap.train.log import log
from hotlap.train.shards import documents_in
from hotlap.train.sources import cache_folder, split_documents
from hotlap.train.tasks import arithmetic, facts, spelling

ANSWER_TOKENS = 96
SUMS, SPELLINGS = 200, 100  # held-out questions
BATCH_TOKENS = 16_384  # of the text that is read at a time
OPENINGS = (  # letters and spaces alone, which a tokenizer of characters is likely to have
    "The largest animal that lives in the sea is",
    "Water freezes when",
    "In the morning she opened the window and",
    "A function returns",
)
QUESTIONS = ("Hello!", "Who are you?", "What does len do?", "What is 123 + 456?", "How do you spell python?")


@dataclass(frozen=True)
class EvalConfig:
    """Score a model: bits per byte of text, CORE, what it says, held-out questions of the built-in tasks."""

    model: Path = Path("runs/tiny/sft")
    """Run or model directory."""
    tasks: tuple[str, ...] = ("facts", "arithmetic", "spelling")
    """Which of bpb, core and samples, and of a model that converses facts, arithmetic and spelling."""
    data: Path | None = None
    """For bpb: text, as for pretraining, or a folder of shards. What validates there is read."""
    validation_tokens: int = 0
    """For bpb: tokens that are read, from the start; 0 is all."""
    core_bundle: Path | None = None
    """For core: nanochat's folder eval_bundle. It is downloaded where none is named."""
    max_per_task: int = 0
    """For core: examples of each of its tasks, nanochat reads 500 while it trains; 0 is all."""
    out: Path | None = None
    """A JSON file for the scores, what was said and every wrong answer; it must not exist yet."""


@torch.no_grad()
def validation(
    model: GPT, rows: PackedRows, tokenizer: Tokenizer, batch_rows: int, world: World
) -> dict[str, float]:
    """validation_loss: mean nats a token. validation_bpb: bits for each byte of text, special tokens apart.

    Over all rows, each rank taking its part; every rank has to ask.
    """
    device = world.device
    sizes = torch.zeros(model.config.vocab_size, device=device)
    sizes[: tokenizer.vocab_size] = torch.tensor(tokenizer.byte_counts(), dtype=torch.float32)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # nats, tokens, nats of text, bytes of text
    for batch in validation_batches(rows, batch_rows, world.rank, world.size):
        batch = batch.to(device)
        losses = model(
            batch.inputs, batch.targets, reduction="none", document_start=batch.document_start
        ).double()
        targets = batch.targets.flatten()
        carries = targets != IGNORE
        size = sizes[targets.clamp(min=0)] * carries
        sums += torch.stack((losses.sum(), carries.sum(), (losses * (size > 0)).sum(), size.sum()))
    nats, count, text_nats, text_bytes = world.total(*sums.tolist())
    if not math.isfinite(nats):
        raise FloatingPointError("the validation loss is not finite; the model's weights are spoilt")
    return {"validation_loss": nats / count, "validation_bpb": text_nats / text_bytes / math.log(2)}


def held_out_rows(source: Path, tokenizer: Tokenizer, context: int, limit: int) -> PackedRows:
    """What pretraining on a source would validate with, or its first `limit` tokens: shards of a folder, or a
    part of the documents.
    """
    if source.is_dir() and any(source.glob("*.bin")):
        beside = source / TOKENIZER
        if beside.is_file() and Tokenizer.load(beside).sha256 != tokenizer.sha256:
            raise ValueError(f"the shards in {source} were made with another tokenizer than the model's")
        return packed_rows(source, "validation", tokenizer, context, limit=limit)
    texts = split_documents(str(source))[1]
    tokens = np.concatenate([[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(texts)])
    documents = documents_in(tokens, tokenizer.bos, limit)
    return PackedRows([lambda: documents], context, 0, shuffle=False)


def bits_per_byte(model: GPT, rows: PackedRows, tokenizer: Tokenizer, world: World) -> dict:
    """validation(), and the number of rows that it read."""
    batch_rows = max(1, BATCH_TOKENS // model.config.context)
    scores = validation(model, rows, tokenizer, batch_rows, world)
    return {
        "bpb": scores["validation_bpb"], "loss": scores["validation_loss"],
        "rows": rows.epoch_rows(), "context": model.config.context,
    }  # fmt: skip


def greedy(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """The likeliest continuations; FloatingPointError where the model's logits are not finite."""
    longest = torch.tensor([max(prompts, key=len)], device=engine.device)
    with torch.inference_mode():
        if not engine.model(longest).isfinite().all():
            raise FloatingPointError("the model's logits are not finite; its weights are spoilt")
    return engine.complete(prompts, Sampling(temperature=0, max_tokens=ANSWER_TOKENS))


def question(text: str, tokenizer: Tokenizer) -> list[int]:
    return render_prompt([{"role": "user", "content": text}], tokenizer)


def sample_prompts(tokenizer: Tokenizer, converses: bool) -> dict[str, list[int]]:
    """The tokens of a few questions, or for a base model of texts to go on with."""
    if converses:
        return {text: question(text, tokenizer) for text in QUESTIONS}
    return {text: [tokenizer.bos, *tokenizer.encode(text)] for text in OPENINGS}


def share_right(engine: Engine, examples: list[tuple[str, str]]) -> tuple[float, list[tuple[str, str, str]]]:
    """Share of questions whose greedy answer is the expected one, and (question, expected, answer) of the
    others.
    """
    answers = greedy(engine, [question(text, engine.tokenizer) for text, _ in examples])
    wrong = [
        (text, expected, answer)
        for (text, expected), answer in zip(examples, map(engine.spoken, answers), strict=True)
        if " ".join(answer.split()) != " ".join(expected.split())
    ]
    return 1 - len(wrong) / len(examples), wrong


TASKS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "facts": facts.held_out,
    "arithmetic": lambda: arithmetic.held_out(SUMS),
    "spelling": lambda: spelling.held_out(spelling.words(split_documents("pydocs")[0]), SPELLINGS),
}
KNOWN = ("bpb", "core", "samples", *TASKS)


def examine(engine: Engine, task: str) -> tuple[dict, list[tuple[str, str, str]]]:
    """Accuracy with its interval and n in one of the built-in tasks, and what was answered wrong."""
    examples = TASKS[task]()
    share, wrong = share_right(engine, examples)
    log.info("%s: %.1f %% of %d right", task, 100 * share, len(examples))
    return counted(len(examples) - len(wrong), len(examples)), wrong


def evaluate_tasks(
    engine: Engine, tasks: tuple[str, ...] = tuple(TASKS)
) -> tuple[dict[str, float], dict[str, list]]:
    """Share of held-out questions answered right for each task, and what was answered wrong."""
    examined = {task: examine(engine, task) for task in tasks}
    shares = {task: score["accuracy"] for task, (score, _) in examined.items()}
    return shares, {task: wrong for task, (_, wrong) in examined.items()}


def load_engine(path: Path, device: torch.device | None = None) -> Engine:
    device = device or default_device()
    return Engine(*load_model(path, device, fast_dtype(device.type)))


def check(config: EvalConfig) -> None:
    """Errors that show without the model."""
    if unknown := [task for task in config.tasks if task not in KNOWN]:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(KNOWN)}")
    if config.out and config.out.exists():
        raise FileExistsError(f"{config.out} exists; name another file by --out")
    if config.out and not config.out.parent.is_dir():
        raise FileNotFoundError(f"no folder {config.out.parent} for {config.out.name}; make it first")
    if "bpb" in config.tasks and config.data is None:
        raise ValueError("bpb needs text; name it, or a folder of shards, by --data")
    if config.validation_tokens < 0:
        raise ValueError(f"validation_tokens={config.validation_tokens} must be 0 (all) or more")


def check_stage(config: EvalConfig, trained_for: str | None) -> None:
    questions = [task for task in config.tasks if task in TASKS]
    if questions and trained_for == "pretrain":
        raise ValueError(
            f"{config.model} is a base model, which was never taught to converse, and {', '.join(questions)} "
            "would ask it questions; try --tasks samples, bpb or core, or teach it with `hotlap sft`"
        )


def evaluate_model(config: EvalConfig) -> dict:
    """Run the tasks that config names. Returns, and writes to config.out, scores, samples and wrong answers,
    with what was measured when and where.

    Data is read before the model is loaded, so that what is wrong with it shows first. Several ranks share
    bpb and core, and the first does the rest.
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
        engine = load_engine(folder, world.device)
        scores: dict[str, dict] = {}
        wrong: dict[str, list] = {}
        samples: list[tuple[str, str]] = []
        if rows:
            scores["bpb"] = bits_per_byte(engine.model, rows, tokenizer, world)
        if core_tasks:
            scores["core"] = evaluate_core(engine.model, tokenizer, core_tasks, world)
        if world.leads:
            for task in [task for task in TASKS if task in config.tasks]:
                scores[task], wrong[task] = examine(engine, task)
            if prompts:
                said = greedy(engine, list(prompts.values()))
                show = engine.spoken if converses else tokenizer.decode
                samples = [(text, show(ids)) for text, ids in zip(prompts, said, strict=True)]
        result = {
            "model": str(config.model), "folder": str(folder), "stage": trained_for,
            **circumstances(engine), "seconds": round(time.perf_counter() - began, 1),
            "ranks": world.size, "scores": scores, "samples": samples, "wrong": wrong,
        }  # fmt: skip
        if config.out and world.leads:
            config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def open_bundle(config: EvalConfig, world: World) -> list[Task]:
    """CORE's tasks from the folder that was named, or from a download that one rank makes."""
    folder = config.core_bundle
    if folder is None:
        from hotlap.train.hub import core_bundle

        with world.leader_first("CORE's bundle"):
            folder = core_bundle(cache_folder())
    return read_bundle(folder, config.max_per_task)


def circumstances(engine: Engine) -> dict:
    """When and with what a model is measured."""
    device = engine.device
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{device.type}, {name}",
        "dtype": str(engine.model.compute_dtype).removeprefix("torch."),
        "versions": {
            "hotlap": importlib.metadata.version("hotlap"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def as_table(result: dict) -> str:
    """What evaluate_model found, to be read: a line for each score, and the samples."""
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
    for text, said in result["samples"]:
        lines += ["", f"> {text}", said.strip()]
    return "\n".join(lines)


def line(name: str, score: float, interval: list[float], n: int) -> str:
    return f"{name:34}{score:8.4f}{'{:.4f} to {:.4f}'.format(*interval):>18}{n:>8}"
