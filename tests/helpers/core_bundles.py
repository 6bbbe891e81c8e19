"""Helpers that tests of CORE import: small bundles in nanochat's format, and a model that is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from hotlap.model.tokenizer import Tokenizer, train_characters
from hotlap.train.distributed.world import World
from hotlap.train.evaluation.core import evaluate_core
from hotlap.train.evaluation.core_bundle import read_bundle

COLUMNS = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description"
WORDS = ("a", "bad", "cab", "dab", "add", "bead", "cabbage", "deed", "fed", "gag")


def write_bundle(folder: Path, tasks: dict[str, tuple]) -> Path:
    """tasks: {label: (kind, shots, delimiter or None for the default, chance in %, examples)}."""
    lines, table = ["icl_tasks:"], [COLUMNS, 'not_asked,"a, b",x,0,1,25,,"of another ""gauntlet"""']
    for label, (kind, shots, delimiter, chance, examples) in tasks.items():
        lines += ["-", f"  label: {label}", f"  dataset_uri: some_folder/{label}.jsonl"]
        lines += [f"  num_fewshot: [{shots}]", f"  icl_task_type: {kind}"]
        if delimiter is not None:
            lines += [f"  continuation_delimiter: {json.dumps(delimiter)}", "  has_categories: true"]
        table.append(f'{label},some folder,{kind},{shots},{len(examples)},{chance},,"questions, and answers"')
        path = folder / "eval_data" / "some_folder" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples), "utf-8")
    (folder / "core.yaml").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n", "utf-8")
    return folder


def mixed_tasks(count: int = 12, longest: int = 12) -> dict[str, tuple]:
    """A task of each kind, with shots and without, of up to `longest` words an example, in letters a to g."""
    rng = random.Random(0)

    def text(low: int = 1, high: int = longest) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    choices = [
        {"query": text(), "choices": [text(1, 3) for _ in range(3)], "gold": rng.randrange(3)}
        for _ in range(count)
    ]
    schema = [
        {"context_options": [text(), text()], "continuation": text(1, 3), "gold": rng.randrange(2)}
        for _ in range(count)
    ]
    modelling = [
        {"context": f" {text()} \n", "continuation": "abcdefg"[: rng.randint(1, 7)] if i % 2 else text(1, 3)}
        for i in range(count)
    ]
    return {
        "choosing": ("multiple_choice", 2, "\nAnswer: ", 25, choices),
        "choosing_at_once": ("multiple_choice", 0, None, 33.3, choices),
        "fitting": ("schema", 0, None, 50, schema),
        "fitting_after_one": ("schema", 1, None, 50, schema),
        "going_on": ("language_modeling", 1, None, 0, modelling),
    }


def letters() -> Tokenizer:
    """A tokenizer of the characters that the tasks above are made of."""
    return train_characters("abcdefgnswrA: \n")


class NextLetter:
    """A model that looks at the last token alone: mostly the next letter of the alphabet follows, and at the
    end of a word a space; `logits_after` (V, V) says the rest.
    """

    def __init__(self, tokenizer: Tokenizer, context: int = 1000):
        generator = torch.Generator().manual_seed(0)
        self.logits_after = torch.randn(64, 64, generator=generator)  # more ids than the tokenizer has
        self.logits_after[:, tokenizer.vocab_size :] = 100
        for this, following in zip("abcdef", "bcdefg", strict=True):
            self.logits_after[tokenizer.encode(this)[0], tokenizer.encode(following)[0]] = 9
        for this in WORDS:
            self.logits_after[tokenizer.encode(this[-1])[0], tokenizer.encode(" ")[0]] = 10
        self.logits_after[tokenizer.encode(" ")[0], tokenizer.encode("a")[0]] = 9
        self.config = SimpleNamespace(context=context)
        self.embedding = torch.nn.Embedding(1, 1)

    def hidden(self, ids: Tensor) -> Tensor:
        assert ids.shape[1] <= self.config.context
        return self.logits_after[ids]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def __call__(self, ids: Tensor) -> Tensor:
        return self.logits(self.hidden(ids))


def core_of_letters(world: World, folder: Path) -> dict:
    tokenizer = letters()
    return evaluate_core(NextLetter(tokenizer), tokenizer, read_bundle(folder), world)
