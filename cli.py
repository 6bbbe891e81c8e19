"""The `hotlap` command: a table of commands. A command's module is imported only when it is called."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import sys

from hotlap.common.errors import guarded, known
from hotlap.common.log import set_up_logging
from hotlap.common.process import wait_asleep
from hotlap.common.terminal import lenient

# What a command does, and its module or module:function, which takes the remaining arguments. Words after
# the module are arguments that come before them.
Table = dict[str, tuple[str, "str | Table"]]

SPEEDRUNS: Table = {
    "tiny": ("the demo: a chat model in minutes, without a GPU or a download", "train.speedruns.demo"),
    "minutes": ("autoresearch's: the best model in five minutes", "train.speedruns.minutes"),
    "gpt2-124m": ("modded-nanogpt's main track: a loss of 3.28 on FineWeb", "train.speedruns.track"),
    "gpt2-grade": ("nanochat's: GPT-2's CORE score, then a chat model", "train.speedruns.grade"),
}
BENCHMARKS: Table = {
    "look": ("4 minutes on a GPU: do the kernels run, and where does the time go", "bench.suite look"),
    "check": ("6 minutes on a GPU: native tests, tuning, kernels against alternatives", "bench.suite check"),
    "figures": ("4 minutes on a GPU: training and inference", "bench.suite figures"),
    "kernels": ("each operation against its alternatives and the device's ceiling", "bench.kernels"),
    "training": ("tokens/s, MFU and the time of each part of a step", "bench.training"),
    "speedrun": ("a speedrun's steps on this machine, beside the records", "bench.pace"),
    "inference": ("time to first token, and tokens/s while decoding", "bench.inference"),
    "peers": ("nanoGPT, nanochat or modded-nanogpt beside ours: steps, or a race", "bench.peers"),
    "compare": ("what got slower between two result files", "bench.compare"),
    "static": ("compile every kernel for six GPU architectures, no GPU needed", "bench.static"),
    "tune": ("find the fastest tiles for this GPU", "bench.tune"),
}
COMMANDS: Table = {
    "speedrun": ("train a model from scratch, for example hotlap speedrun tiny", SPEEDRUNS),
    "tokenizer": ("train a tokenizer on text", "train.data.prepare:tokenizer_command"),
    "data": ("turn text into token shards", "train.data.prepare:data_command"),
    "pretrain": ("train a base model on text", "train.presets:pretrain_command"),
    "sft": ("fine-tune a base model on conversations", "train.sft"),
    "eval": ("evaluate a model: bits per byte, CORE, samples, questions", "train.evaluation.command"),
    "report": ("rewrite a run's report", "train.run.report"),
    "sweep": ("train variants of a recipe and compare them", "train.studies.sweep"),
    "scaling": ("train several depths and fit scaling laws", "train.studies.scaling"),
    "ablations": ("train the demo's model without each part of its recipe", "train.studies.ablations"),
    "bench": ("benchmark this device: kernels, training, inference, peers", BENCHMARKS),
    "export": ("export a model for other programs", {
        "weights": ("config.json, tokenizer.json and model.safetensors", "model.export"),
    }),
    "chat": ("chat with a model", "chat"),
}  # fmt: skip
HELP = ("-h", "--help", "help")
FLAGS = """
  --debug    show the traceback of an error (any command)
  --version  print the version of hotlap"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    lenient(sys.stdout)
    if arguments == ["--version"]:
        print(f"hotlap {importlib.metadata.version('hotlap')}")
        return 0
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)):  # under torchrun, only rank 0 prints
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        return guarded(lambda: run("hotlap", COMMANDS, arguments), debug)


def run(path: str, table: Table, arguments: list[str]) -> int | None:
    """Find the command in a table, and pass it the remaining arguments."""
    if not arguments or arguments[0] in HELP:
        print(f"usage: {path} COMMAND [flags]     ({path} COMMAND --help lists the flags)\n")
        print("\n".join(f"  {name:10} {text}" for name, (text, _) in table.items()))
        print(FLAGS)
        return 0 if arguments else 2
    name, *rest = arguments
    target = table[known(name, table, f"{path} command")][1]
    if isinstance(target, dict):
        return run(f"{path} {name}", target, rest)
    set_up_logging()
    wait_asleep()
    target, *leading = target.split()
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(f"hotlap.{module}"), function or "main")([*leading, *rest])


if __name__ == "__main__":
    raise SystemExit(main())
