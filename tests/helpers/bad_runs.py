"""Rows of bad input: runs to resume, their checkpoints and reports."""
# ruff: noqa: E501  a row is one line

from helpers.bad_files import (
    DEEP,
    DPO,
    PRETRAIN,
    SFT,
    STEPS,
    Row,
    checkpoint,
    copy,
    folder,
    lines,
    text,
    without,
)
from helpers.commands import BAD_DATA, CANNOT_CREATE, NO_INPUT, USAGE

SAME = f"{PRETRAIN} --data base/data --tokenizer base/tokenizer.json --loop.steps {STEPS + 2}"
RESUME = f"{SAME} --resume base"
AUTO = f"{PRETRAIN} --loop.steps {STEPS + 2} --out bad --resume auto"
EXPORT = "export weights --model bad --out new"

ROWS: list[Row] = [
    # another run than the one to resume
    (f"{PRETRAIN} --out base --loop.steps {STEPS - 1} --resume auto", None, USAGE, rf"base/checkpoints/step-\d+ has taken {STEPS} steps.*--loop\.steps"),
    (f"{RESUME} --seed 3", None, USAGE, r"base/checkpoints.* another order of the data: seed: saved 0, current 3"),
    (f"{RESUME} --model.layers 2", None, BAD_DATA, r"base/checkpoints.* does not fit this run: model\.layers: saved 1, current 2"),
    (f"{RESUME} --data shards --tokenizer tokenizer.json", None, BAD_DATA, r"base/checkpoints.* has another tokenizer: saved sha256 \w+.*, current"),
    (f"{SFT} --resume base", None, USAGE, r"base/checkpoints.* is a checkpoint of pretrain, which sft cannot resume"),
    (f"{DPO} --resume sft", lines("a.jsonl", {"prompt": "square of 2", "chosen": "is 4.", "rejected": "is 5."}), USAGE, r"sft/checkpoints.* is a checkpoint of sft, which dpo cannot resume; to start from it, give --base"),
    (f"{PRETRAIN} --resume none", None, NO_INPUT, r"no model at none"),
    (f"{PRETRAIN} --resume ''", None, NO_INPUT, r"no model in the folder \."),
    (f"{PRETRAIN} --resume shards", None, NO_INPUT, r"shards has token shards and no model"),
    (f"{PRETRAIN} --resume model", None, BAD_DATA, r"model is a model without the state of its training; --resume needs a checkpoint"),
    (f"{SAME} --resume sft", None, USAGE, r"sft/checkpoints.* is a checkpoint of sft, which pretrain cannot resume"),
    # damaged runs
    (AUTO, copy("base", text("config.json", "")), BAD_DATA, r"bad/config\.json is not a run's configuration"),
    (AUTO, copy("base", text("config.json", "[]")), BAD_DATA, r"bad/config\.json is not a run's configuration"),
    (AUTO, copy("base", text("config.json", '{"mine": 1}')), USAGE, r"bad was started with another configuration"),
    (AUTO, copy("base", without("config.json")), CANNOT_CREATE, r"bad has checkpoints, but no config\.json"),
    (AUTO, copy("base", without("run.lock"), folder("run.lock")), CANNOT_CREATE, r"cannot lock bad: run\.lock cannot be opened"),
    (AUTO, checkpoint("state.json", lambda raw: b"{"), BAD_DATA, r"all checkpoints in bad/checkpoints are damaged"),
    (EXPORT, checkpoint("manifest.json", lambda raw: DEEP.encode()), BAD_DATA, r"cannot read bad/.*manifest\.json"),
    (EXPORT, checkpoint("manifest.json", lambda raw: b"[]"), BAD_DATA, r"cannot read bad/.*manifest\.json"),
    (EXPORT, checkpoint("manifest.json", lambda raw: raw[:-3]), BAD_DATA, r"bad/.*manifest\.json"),
    (EXPORT, checkpoint("tokenizer.json", lambda raw: raw + b" "), BAD_DATA, r"bad/.*tokenizer\.json is missing or not"),
    # reports
    ("report text.txt", None, NO_INPUT, r"no metrics\.jsonl in text\.txt; give a run's directory"),
    ("report --run none", None, NO_INPUT, r"no metrics\.jsonl in none"),
    ("report bad", copy("base", without("metrics.jsonl"), folder("metrics.jsonl")), NO_INPUT, r"no metrics\.jsonl in bad"),
]  # fmt: skip
