"""A run's model_card.md: what the model is, how it was made, how good it is, and what it is not for.

Every number is from the run's files and those of the models it was made from; what they do not say is n/a.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hotlap.common import files
from hotlap.common.errors import DataError
from hotlap.common.files import read_object
from hotlap.common.log import log
from hotlap.common.terminal import printable
from hotlap.model.adapter_files import read_lora
from hotlap.model.config import Shape, counts_of
from hotlap.model.flops import meta_model, nanochat_flops
from hotlap.model.lora import LoRA, adapter_count
from hotlap.model.manifest import MANIFEST, read_manifest
from hotlap.model.peft import is_peft
from hotlap.model.weights import STATE, load_config, model_folder
from hotlap.train.data.licences import description_of, name_of
from hotlap.train.evaluation.kept_scores import kept_scores
from hotlap.train.run.folder import base_of, read_machine, run_of
from hotlap.train.run.metrics import number, shown

CARD = "model_card.md"
SCORES = ("accuracy", "core", "chatcore", "bpb")  # the number of a task's score, by its name
STAGES = {
    "pretrain": "pretraining on text",
    "sft": "supervised fine-tuning on conversations",
    "dpo": "preference training (DPO) on pairs of answers",
    "rl": "reinforcement learning by rewards for its own answers",
}
MISSING = "n/a"


@dataclass(frozen=True)
class Made:
    """A stage of training, as the checkpoint that ended it says; what it does not say is empty."""

    path: Path
    state: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    shape: Shape | None = None
    machine: str = ""
    lora: LoRA | None = None

    @property
    def stage(self) -> str:
        return str(self.state.get("stage") or "")

    @property
    def data(self) -> list[str]:
        found = self.config.get("data", [])
        return [found] if isinstance(found, str) else [str(entry) for entry in found]

    @property
    def flops(self) -> float | None:
        """Of training, by nanochat's formula."""
        tokens = number(self.state, "tokens")
        if tokens is None or self.shape is None:
            return None
        return nanochat_flops(meta_model(self.shape, self.lora)) * tokens

    @property
    def adapters(self) -> str:
        return f"LoRA, rank {self.lora.rank}" if self.lora else ""


def write_card(run: Path) -> Path:
    """Write model_card.md into a run's directory, and return its path."""
    stages = lineage(run)
    lines = [
        f"# Model card: {code(run.name)}", "", summary(stages[-1]), "",
        *what_it_is(stages), *how_it_was_made(stages), *data_of(stages), *scores_of(run),
        *not_for(stages), *how_to_use(run, stages[-1]),
    ]  # fmt: skip
    path = run / CARD
    files.write(path, "\n".join(lines))
    return path


def lineage(run: Path) -> list[Made]:
    """The stages that made a run's model, the first one first. Where a base is gone, nothing before it is
    known.
    """
    found = [stage_of(run)]
    while base := base_below(found[0]):
        if base in {made.path for made in found}:
            break
        found.insert(0, stage_of(base))
    return found


def base_below(made: Made) -> Path | None:
    """Where the model is that a stage started from. PEFT's files are no run, and name it themselves."""
    if made.config.get("base"):
        return base_of(run_of(made.path), made.config)
    return next((base for base in made.lora.bases if base.exists()), None) if made.lora else None


def stage_of(path: Path) -> Made:
    try:
        folder = model_folder(path)
        state = read_object(folder / STATE) if (folder / STATE).is_file() else {}
        config = read_manifest(folder).get("run", {}) if (folder / MANIFEST).is_file() else {}
        machine = read_machine(run_of(folder))[0]
        shape = None if is_peft(folder) else load_config(folder)
        return Made(path, state, config, shape, machine, read_lora(folder))
    except (OSError, DataError) as error:
        log.warning("the model card lacks what is at %s: %s", path, error)
        return Made(path)


def summary(made: Made) -> str:
    kind = {"": "A language model", "pretrain": "A base model, which continues text"}
    shown = kind.get(made.stage, "A chat model, which answers messages")
    return f"{shown}. {size(made)} This card was written from the files of its training run."


def size(made: Made) -> str:
    if made.shape is None:
        return "Its size is not known."
    total = counts_of(made.shape)["total"]
    return f"It has {total:,} parameters and reads at most {made.shape.context:,} tokens at once."


def what_it_is(stages: list[Made]) -> list[str]:
    made, shape = stages[-1], stages[-1].shape
    rows = {"last stage": STAGES.get(made.stage, code(made.stage) if made.stage else MISSING)}
    if shape is None:
        rows |= dict.fromkeys(("parameters", "shape"), MISSING)
    else:
        counts = counts_of(shape)
        rows["parameters"] = f"{counts['total']:,}, of which {counts['matmul']:,} in matrix products"
        rows["shape"] = (
            f"{shape.layers} layers, width {shape.width}, {shape.heads} query heads, {shape.kv_heads} key "
            f"and value heads, context {shape.context:,}, vocabulary {shape.vocab_size:,}"
        )
    bases = [code(str(made.path)) for made in stages[:-1]]
    rows["made from"] = ", then ".join(bases) or "random weights" if made.config else MISSING
    if made.lora and shape:
        rows["adapters"] = (
            f"{adapter_count(shape, made.lora.rank):,} parameters (LoRA of rank {made.lora.rank}), which are "
            f"all that the last stage trained; they need {code(str(made.lora.bases[0]))}"
        )
    return ["## What it is", "", *table(("", ""), rows.items()), ""]


def how_it_was_made(stages: list[Made]) -> list[str]:
    rows = [
        (
            f"{made.stage or MISSING}{made.adapters and f' ({made.adapters})'}", code(str(made.path)),
            shown(number(made.state, "tokens"), ",.0f"), shown(made.flops, ".3g"),
            shown(number(made.state, "seconds"), ",.0f", " s"), plain(made.machine) or MISSING,
        )
        for made in stages
    ]  # fmt: skip
    heads = ("stage", "model", "tokens", "FLOPs (nanochat's formula)", "training time", "device")
    return ["## How it was made", "", *table(heads, rows), ""]


def data_of(stages: list[Made]) -> list[str]:
    rows = []
    for made in stages:
        for entry in made.data or [MISSING]:
            found = description_of(entry, made.stage)
            known = made.data and (code(entry), found.about, found.licence)
            rows.append((made.stage or MISSING, *(known or (MISSING,) * 3)))
    return ["## Data and licences", "", *table(("stage", "data", "what it is", "licence"), rows), ""]


def scores_of(run: Path) -> list[str]:
    """The scores that `hotlap eval` has left in the run."""
    lines = ["## Scores", ""]
    try:
        scores = kept_scores(run)
    except (OSError, DataError) as error:
        log.warning("the model card is without scores: %s", error)
        scores = {}
    if not scores:
        return [*lines, f"{MISSING}: `hotlap eval` has left none in the run.", ""]
    rows = [(plain(task), *score_cells(score)) for task, score in scores.items()]
    heads = ("task", "score", "95 % interval", "n", "of these trained on", "date", "device")
    lines += [*table(heads, rows), ""]
    lines += ["Scores are shares of right answers; `bpb` is bits per byte of text, where less is better.", ""]
    return lines


def value_of(score: dict) -> tuple[float | None, list[float] | None]:
    """The number of a task's score and its interval, as far as they are there."""
    value = next((v for name in SCORES if (v := number(score, name)) is not None), None)
    ends = score.get("interval")
    ends = dict(zip(("low", "high"), ends, strict=True)) if isinstance(ends, list) and len(ends) == 2 else {}
    low, high = number(ends, "low"), number(ends, "high")
    return value, None if None in (low, high) else [low, high]


def score_cells(score: dict) -> list[str]:
    value, interval = value_of(score)
    return [
        shown(value, ".4f"), "{:.4f} to {:.4f}".format(*interval) if interval else MISSING,
        shown(number(score, "n"), ",.0f"), shown(number(score, "in_training"), ",.0f", missing="not checked"),
        *(plain(str(score.get(name) or MISSING)) for name in ("date", "device")),
    ]  # fmt: skip


def not_for(stages: list[Made]) -> list[str]:
    made = stages[-1]
    lines = [
        "* **Facts.** It writes what sounds likely, right or wrong. Check its answers.",
        "* **Anything that can do harm.** It had no safety training, and its behaviour was not tested. It can"
        " write what is offensive or dangerous. Let nothing depend on its answers: no advice about health,"
        " law or money, no decision about people.",
        f"* **What large models do.** {size(made)} It knows little beyond its training data and their"
        " languages, and repeats their errors and prejudices.",
    ]
    if made.stage == "pretrain":
        lines.append("* **Conversation.** It was not taught to answer; fine-tune it first.")
    if any(name_of(entry) == "bigbench" for stage in stages for entry in stage.data):
        lines.append("* **BIG-bench.** It was trained on tasks of it, so it must not be scored on it.")
    return ["## What it is not for", "", *lines, ""]


def how_to_use(run: Path, made: Made) -> list[str]:
    path = shlex.quote(printable(str(run)).replace("\n", " "))
    commands = [f"hotlap chat {path}", f"hotlap serve {path}", f"hotlap eval {path}"]
    if made.stage == "pretrain":
        commands = [f"hotlap sft --base {path}", f"hotlap eval {path} --tasks samples"]
    return ["## How to use it", "", *(f"    {command}" for command in commands), ""]


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def code(text: str) -> str:
    """Text of the user's as code in a table, where nothing of it is Markdown or HTML."""
    return f"`{plain(text).replace('`', chr(39))}`"


def plain(text: str) -> str:
    """Text on one line of a table, of which nothing is HTML."""
    text = " ".join(printable(text).split())
    return text.replace("|", "/").replace("<", "(").replace(">", ")")
