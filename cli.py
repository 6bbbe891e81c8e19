"""The `hotlap` command: a table of commands, whose modules are imported when they are called."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys

from hotlap.common.errors import guarded, known
from hotlap.common.log import set_up_logging

# What it does, and the module, or module:function, that takes the rest of the command line.
Table = dict[str, tuple[str, "str | Table"]]

SPEEDRUNS: Table = {
    "tiny": (
        "a model that answers questions about Python, in minutes, with nothing but this machine",
        "train.speedruns.demo",
    ),
    "minutes": ("the best bits per byte that this device reaches in five minutes", "train.speedruns.minutes"),
    "gpt2-124m": ("modded-nanogpt's main track: a loss of 3.28 on FineWeb", "train.speedruns.track"),
    "gpt2-grade": ("nanochat's: a model as good as GPT-2 that converses", "train.speedruns.grade"),
}
BENCHMARKS: Table = {
    "look": ("do the kernels run on this GPU, and where does the time go (4 minutes)", "bench.suite:look"),
    "check": ("are they right, and which tiles are fastest (6 minutes)", "bench.suite:check"),
    "figures": ("training and inference (4 minutes)", "bench.suite:figures"),
    "kernels": ("each operation against every provider and the device's ceiling", "bench.kernels"),
    "training": ("tokens/s, MFU and where the time of a step goes", "bench.training"),
    "speedrun": ("a speedrun's steps on this machine beside the records", "bench.pace"),
    "inference": ("time to the first token and to each next one", "bench.inference"),
    "peers": ("a training step of nanoGPT and nanochat beside ours", "bench.peers"),
    "compare": ("what got slower between two result files", "bench.compare"),
    "static": ("compile every kernel for six GPUs that need not be here", "bench.static"),
    "tune": ("measure the kernels' tile sizes on this GPU", "bench.tune"),
}
COMMANDS: Table = {
    "speedrun": ("train a model from nothing: hotlap speedrun tiny", SPEEDRUNS),
    "tokenizer": ("train a tokenizer on text", "train.data.prepare:tokenizer_command"),
    "data": ("turn text into token shards", "train.data.prepare:data_command"),
    "pretrain": ("train a base model on text", "train.presets:pretrain_command"),
    "sft": ("fine-tune a base model on conversations", "train.sft"),
    "eval": ("score a model: bits per byte, CORE, samples, held-out questions", "train.evaluation.command"),
    "report": ("rewrite a run's report", "train.run.report"),
    "sweep": ("train variants of a recipe, and compare them", "train.studies.sweep"),
    "scaling": ("train a series of depths, and fit scaling laws", "train.studies.scaling"),
    "ablations": ("train the demo's model without each part of its recipe", "train.studies.ablations"),
    "bench": ("measure this device: kernels, training, inference, peers", BENCHMARKS),
    "export": ("write a model for other programs", {
        "weights": ("config.json, tokenizer.json and model.safetensors", "model.export"),
    }),
    "chat": ("talk to a model", "chat"),
}  # fmt: skip
HELP = ("-h", "--help", "help")
FLAGS = """
  --debug    show the traceback of an error (any command)
  --version  print the version of hotlap"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line, and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments == ["--version"]:
        print(f"hotlap {importlib.metadata.version('hotlap')}")
        return 0
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)):  # of torchrun's processes, rank 0 alone prints
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return guarded(lambda: run("hotlap", COMMANDS, arguments), debug)


def run(path: str, table: Table, arguments: list[str]) -> int | None:
    """Find the command in a table, and hand it the rest of the command line."""
    if not arguments or arguments[0] in HELP:
        print(f"usage: {path} COMMAND [flags]     ({path} COMMAND --help lists the flags)\n")
        print("\n".join(f"  {name:10} {text}" for name, (text, _) in table.items()))
        print(FLAGS)
        return 0 if arguments else 2
    kind = "command" if table is COMMANDS else path.split()[-1]
    name, *rest = arguments
    target = table[known(name, table, kind)][1]
    if isinstance(target, dict):
        return run(f"{path} {name}", target, rest)
    set_up_logging()
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(f"hotlap.{module}"), function or "main")(rest)


if __name__ == "__main__":
    raise SystemExit(main())
