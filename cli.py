"""The `hotlap` command: a table of commands.

A command's flags are read before its code and torch are imported, which takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    from hotlap.common import options
    from hotlap.common.errors import INTERRUPTED, guarded, known
    from hotlap.common.log import set_up_logging
    from hotlap.common.process import wait_asleep
    from hotlap.common.terminal import lenient, printable
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None


class Command(NamedTuple):
    """A row of the table. Objects are named module:object and imported when they are needed."""

    text: str
    """What the command does."""
    config: str
    """The dataclass of its flags, or a function that reads them. In a module that imports no torch."""
    run: str
    """The function that takes the configuration and returns an exit code or None."""
    presets: str = ""
    """A module with PRETRAIN and from_depth, for --preset and --depth."""


class Group(NamedTuple):
    """A command that has further commands."""

    text: str
    commands: Table


Table = dict[str, "Command | Group"]

SPEEDRUNS: Table = {
    "tiny": Command(
        "the demo: a chat model in minutes, without a GPU or a download",
        "train.speedruns.config:TinyConfig", "train.speedruns.demo:main",
    ),
    "minutes": Command(
        "autoresearch's: the best model in five minutes",
        "train.speedruns.config:MinutesConfig", "train.speedruns.minutes:main",
    ),
    "gpt2-124m": Command(
        "modded-nanogpt's main track: a loss of 3.28 on FineWeb",
        "train.speedruns.config:TrackConfig", "train.speedruns.track:main",
    ),
    "gpt2-grade": Command(
        "nanochat's: GPT-2's CORE score, then a chat model",
        "train.speedruns.config:GradeConfig", "train.speedruns.grade:main",
    ),
}  # fmt: skip
BENCHMARKS: Table = {
    "look": Command(
        "4 minutes on a GPU: do the kernels run, and where does the time go",
        "bench.config:suite_flags", "bench.suite:main",
    ),
    "check": Command(
        "6 minutes on a GPU: native tests, tuning, kernels against alternatives",
        "bench.config:suite_flags", "bench.suite:main",
    ),
    "figures": Command(
        "4 minutes on a GPU: training and inference",
        "bench.config:suite_flags", "bench.suite:main",
    ),
    "kernels": Command(
        "each operation against its alternatives and the device's ceiling",
        "bench.config:KernelsConfig", "bench.kernels:main",
    ),
    "training": Command(
        "tokens/s, MFU and the time of each part of a step",
        "bench.config:TrainingConfig", "bench.training:main",
    ),
    "speedrun": Command(
        "a speedrun's steps on this machine, beside the records",
        "bench.config:SpeedrunConfig", "bench.pace:main",
    ),
    "inference": Command(
        "time to first token, and tokens/s while decoding",
        "bench.config:InferenceConfig", "bench.inference:main",
    ),
    "serving": Command(
        "a server's tokens/s and waiting times, with many users at once",
        "bench.config:ServingConfig", "bench.serving:main",
    ),
    "peers": Command(
        "nanoGPT, nanochat or modded-nanogpt beside ours: steps, or a race",
        "bench.config:PeersConfig", "bench.peers:main",
    ),
    "records": Command(
        "the table of records of speedrun minutes: add one, write the page",
        "bench.config:RecordsConfig", "bench.records:main",
    ),
    "compare": Command(
        "what got slower between two result files",
        "bench.compare:CompareConfig", "bench.compare:main",
    ),
    "static": Command(
        "compile every kernel for six GPU architectures, no GPU needed",
        "bench.config:StaticConfig", "bench.static:main",
    ),
    "tune": Command(
        "find the fastest tiles for this GPU",
        "bench.config:TuneConfig", "bench.tune:main",
    ),
}  # fmt: skip
COMMANDS: Table = {
    "speedrun": Group("train a model from scratch, for example hotlap speedrun tiny", SPEEDRUNS),
    "tokenizer": Command(
        "train a tokenizer on text",
        "train.data.prepare:TokenizerConfig", "train.data.prepare:tokenizer_command",
    ),
    "data": Command(
        "turn text into token shards",
        "train.data.prepare:DataConfig", "train.data.prepare:data_command",
    ),
    "pretrain": Command(
        "train a base model on text",
        "train.config:PretrainConfig", "train.pretrain:main", presets="train.presets",
    ),
    "sft": Command(
        "fine-tune a base model on conversations",
        "train.config:SFTConfig", "train.sft:main",
    ),
    "dpo": Command(
        "train a chat model on preferred and other answers",
        "train.config:DPOConfig", "train.dpo:main",
    ),
    "rl": Command(
        "train a chat model by rewards for its own answers",
        "train.rl_config:RLConfig", "train.rl:main",
    ),
    "eval": Command(
        "evaluate a model: bits per byte, CORE, ChatCORE, samples, questions",
        "train.evaluation.config:EvalConfig", "train.evaluation.command:main",
    ),
    "lm-eval": Command(
        "evaluate a model on lm-eval's tasks, or your own",
        "train.evaluation.config:LmEvalConfig", "train.evaluation.lm_eval_command:main",
    ),
    "verify": Command(
        "check a record of speedrun minutes",
        "train.speedruns.config:VerifyConfig", "train.speedruns.verify:main",
    ),
    "report": Command(
        "rewrite a run's report",
        "train.config:ReportConfig", "train.run.report:main",
    ),
    "report-card": Command(
        "the scores after each stage of a run, beside nanochat's",
        "train.speedruns.config:ReportCardConfig", "train.speedruns.report_card:main",
    ),
    "sweep": Command(
        "train variants of a recipe and compare them",
        "train.studies.config:SweepConfig", "train.studies.fill_table:main",
    ),
    "compare": Command(
        "how much less compute a change needs, over a ladder of sizes",
        "train.studies.config:CompareConfig", "train.studies.compare:main",
    ),
    "scaling": Command(
        "train several depths and fit scaling laws",
        "train.studies.config:ScalingConfig", "train.studies.scaling:main",
    ),
    "ablations": Command(
        "train the demo's model without each part of its recipe",
        "train.studies.config:AblationsConfig", "train.studies.ablations:main",
    ),
    "bench": Group("benchmark this device: kernels, training, inference, peers", BENCHMARKS),
    "export": Group("export a model for other programs", {
        "weights": Command(
            "config.json, tokenizer.json and model.safetensors",
            "model.config:ExportConfig", "model.export:main",
        ),
        "adapter": Command(
            "a run's adapters (--lora-rank) as PEFT's files",
            "model.config:AdapterExportConfig", "model.export:adapter_main",
        ),
        "hf": Command(
            "a folder for Transformers and vLLM, with tokenizer and chat template",
            "model.config:HfExportConfig", "model.export_hf:main",
        ),
        "gguf": Command(
            "one file for llama.cpp and what is built on it",
            "model.config:GGUFExportConfig", "model.export_gguf:main",
        ),
    }),
    "import": Group("import a model of other programs", {
        "hf": Command(
            "a model of Transformers (Apertus, NanoChat, GPT-2, an export) as a model directory",
            "model.config:ImportConfig", "model.import_hf:main",
        ),
    }),
    "completion": Group("print a script for a shell that completes commands and flags", {
        shell: Command(
            f"a script for {shell}; docs/flags.md says where it goes",
            "common.completion:shell", "cli:completion",
        ) for shell in ("bash", "zsh", "fish")
    }),
    "chat": Command("chat with a model", "chat:ChatConfig", "chat:main"),
    "sample": Command(
        "what a model writes, from the beginning of a text or from nothing",
        "serve.config:SampleConfig", "serve.terminal.samples:main",
    ),
    "serve": Command(
        "serve a model behind OpenAI's HTTP API",
        "serve.config:ServeConfig", "serve.command:main",
    ),
    "web": Command(
        "chat with a model in a web browser",
        "serve.config:WebConfig", "serve.web:main",
    ),
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
    if first := shadow(list(sys.modules["hotlap"].__path__)):
        text = f"warning: {first} comes before the installed hotlap; start `hotlap` instead"
        print(printable(text), file=sys.stderr)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("RANK", 0)):  # under torchrun, only rank 0 prints
            stack.enter_context(
                contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
            )
        return guarded(lambda: run("hotlap", COMMANDS, arguments), debug)


def run(path: str, table: Table, arguments: list[str]) -> int | None:
    """Find the command in a table, and pass it the remaining arguments."""
    words, last = arguments[:-1], arguments[-1:]
    if last in (["--version"], ["-V"]) and not any(word.startswith("-") for word in words):
        print(f"hotlap {version()}")
        return 0
    if not arguments or arguments[0] in HELP:
        print(f"usage: {path} COMMAND [flags]     ({path} COMMAND --help lists the flags)\n")
        print("\n".join(f"  {name:10} {text}" for name, (text, *_) in table.items()))
        print(FLAGS)
        return 0 if arguments else 2
    name, *rest = arguments
    command = table[known(name, table, f"{path} command")]
    if isinstance(command, Group):
        return run(f"{path} {name}", command.commands, rest)
    set_up_logging()
    wait_asleep()
    rest = ["--help"] if rest == ["help"] else rest
    with importing():
        config = read_flags(f"{path} {name}", command, rest)
        function = named(command.run)
    try:
        return function(config)
    except ValueError as error:
        if type(error) is ValueError:  # not about a file
            error.args = (options.as_typed(str(error), config, rest),)
        raise


def shadow(folders: list[str]) -> str | None:
    """The folder that Python searches for modules of hotlap before this file's, if there is one: with
    `python -m`, a folder named hotlap in the current one. folders: hotlap's, in Python's order.
    """
    first = Path(folders[0])
    return None if first.resolve() == Path(__file__).resolve().parent else str(first)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While flags are read and torch is imported, Ctrl-C ends the process: what is interrupted in the middle
    may catch the exception, and then fails in other ways.
    """

    def stop(*given: object) -> None:
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # somebody else handles it
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def version() -> str:
    """The version of the installed package, or of the checkout that this file is in."""
    import importlib.metadata  # takes half as long as all other imports of this file

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("hotlap")
    project = Path(__file__).with_name("pyproject.toml")
    return f"{options.read_toml(project)['project']['version']} (not installed)"


def read_flags(path: str, command: Command, arguments: list[str]) -> Any:
    """The configuration of a command from its flags."""
    kind = named(command.config)
    if not dataclasses.is_dataclass(kind):
        return kind(path.split()[-1], *arguments)
    if not command.presets:
        return options.parse(kind, arguments, command=path)
    recipes = importlib.import_module(f"hotlap.{command.presets}")
    return options.parse(kind, arguments, command=path, presets=recipes.PRETRAIN, depth=recipes.from_depth)


def completion(shell: str) -> None:
    from hotlap.common.completion import script

    print(script(shell, COMMANDS), end="")


def named(name: str) -> Any:
    """The object of a name module:object."""
    module, _, object_name = name.partition(":")
    return getattr(importlib.import_module(f"hotlap.{module}"), object_name)


if __name__ == "__main__":
    raise SystemExit(main())
