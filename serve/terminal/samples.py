"""`hotlap sample`: what a model writes, from the beginning of a text or from nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from hotlap.common.errors import DataError
from hotlap.common.log import log
from hotlap.common.terminal import lenient, printable
from hotlap.kernels.dispatch import default_device
from hotlap.model.config import Sampling
from hotlap.model.engine import Engine
from hotlap.model.request import Request
from hotlap.model.weights import load_model, model_folder, stage
from hotlap.serve.config import SampleConfig
from hotlap.serve.terminal.conversation import ids_to_continue, seeds
from hotlap.serve.terminal.printing import note

SLOTS = 16  # samples that are generated at once
BETWEEN = "-" * 16


def read_prompt(config: SampleConfig) -> str:
    """The text to continue, without what a terminal would obey. DataError if a file is not UTF-8."""
    if config.prompt_file is None:
        return printable(config.prompt or "")
    piped = str(config.prompt_file) == "-"
    if piped and sys.stdin is None:
        raise ValueError("standard input is closed, and --prompt-file - reads it; name a file")
    if not piped and not config.prompt_file.exists():
        raise FileNotFoundError(f"no file {config.prompt_file}; --prompt-file takes one, or - for a pipe")
    try:
        raw = sys.stdin.buffer.read() if piped else config.prompt_file.read_bytes()
        return printable(raw.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{'the input' if piped else config.prompt_file} is not UTF-8 text: {error}"
        ) from None


def continuations(
    engine: Engine, prompt: list[int], sampling: Sampling, samples: int, seed: int | None
) -> Iterator[Iterator[str]]:
    """Each sample's text as it comes. Others are generated meanwhile, as many as the engine has slots, so
    take the samples one after the other. seed: as in `seeds`.
    """
    numbers = islice(seeds(seed), samples)
    while batch := list(islice(numbers, len(engine.slots))):
        requests = [engine.add(prompt, replace(sampling, seed=number), tools={}) for number in batch]

        def pieces(request: Request) -> Iterator[str]:
            shown = 0
            while True:
                yield request.text[shown:]
                shown = len(request.text)
                if request.finish_reason:
                    return
                engine.step()

        yield from map(pieces, requests)


def main(config: SampleConfig) -> None:
    """`hotlap sample`."""
    config.validate()
    lenient(sys.stdout)
    log.setLevel("WARNING")  # which kernels were chosen would stand between the samples
    text = read_prompt(config)
    folder, device = model_folder(config.model), default_device()
    sampling = config.sampling(base=stage(folder) == "pretrain")
    model, tokenizer = load_model(folder, device)
    engine = Engine(model.for_inference(), tokenizer, slots=min(config.samples, SLOTS))
    prompt = ids_to_continue(text, engine)
    note(f"{folder} on {device}, temperature {sampling.temperature:g}")
    for i, pieces in enumerate(continuations(engine, prompt, sampling, config.samples, config.seed)):
        if i:
            print(BETWEEN)
        last = text
        print(text, end="", flush=True)
        for piece in map(printable, pieces):
            print(piece, end="", flush=True)
            last = piece or last
        print(end="" if last.endswith("\n") else "\n", flush=True)
