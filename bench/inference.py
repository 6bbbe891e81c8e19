"""`hotlap bench inference`: time to first token and per decoding step, beside the memory-bandwidth limit.

inference-BATCH.txt has the kernels of our decoding steps, profiled: operations on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile

from hotlap.bench import plots, results
from hotlap.bench.breakdown import kernel_times, listed
from hotlap.bench.cases import NO_TIME, Budget, failure, start_afresh
from hotlap.bench.config import InferenceConfig
from hotlap.bench.models import model_config
from hotlap.bench.peer_steps import nanochat_attention, nanochat_decoding, nanochat_model, shape_beside
from hotlap.common import files
from hotlap.common.log import log
from hotlap.common.machine import log_warnings
from hotlap.common.timing import measure
from hotlap.kernels.cpu.threads import threads_for
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.kernels.peaks import measure_ceilings
from hotlap.model.config import GPTConfig
from hotlap.model.decoding import Decoder, Row
from hotlap.model.flops import parameter_counts
from hotlap.model.gpt import GPT
from hotlap.model.kv_cache import KVCache, Span, check_cache
from hotlap.model.sampling import Draw, Sampling, sample

PROFILED = 10  # decoding steps
TURNS = 7


@torch.inference_mode()
def bench_inference(config: InferenceConfig) -> list[dict]:
    """Measure each batch size, write inference.json, .csv and .png, and return the rows. A batch size that
    fails has a row that says so.
    """
    config.validate()
    budget, device = Budget(config.minutes), default_device()
    name = config.model or ("d24" if device.type == "cuda" else "tiny")
    shape = model_config(name)
    prompt = config.prompt or shape.context // 2
    if prompt >= shape.context:
        raise ValueError(f"prompt={prompt} must leave room in {name}'s context of {shape.context}")
    check_cache(shape, min(config.batches), prompt + 1, fast_dtype(device.type, shape.width), device)
    if config.nanochat:
        if not config.nanochat.is_dir():
            raise FileNotFoundError(f"no checkout of nanochat at {config.nanochat}")
        shape = shape_beside("nanochat", shape)
    path = results.open_file("inference", config.out, device)
    log_warnings(device)
    with torch.device("meta"):
        model = GPT(shape, fast_dtype(device.type, shape.width))
    without_zeros(model.to_empty(device=device).init_weights().eval(), shape.width).for_inference()
    sides: dict[str, Callable[..., list[dict]]] = {"hotlap": partial(measure_decoding, model, path.parent)}
    if config.nanochat:
        theirs = without_zeros(nanochat_model(config.nanochat, shape, device).eval(), shape.width)
        sides["nanochat"] = partial(measure_nanochat, config.nanochat, theirs, shape)
    ceilings = measure_ceilings(device)
    rows: list[dict] = []
    for batch in config.batches:
        case = f"{name} prompt {prompt} batch {batch}"
        limit = decoding_bytes(model, batch, prompt) / ceilings.copy
        found: list[dict] = []
        for who, measure_side in turns(sides, device):
            start_afresh(device)
            note = "" if budget.fits() else NO_TIME
            try:
                found += [] if note else measure_side(case, batch, prompt, limit, device)
            except ImportError:  # of a checkout that no batch size can use
                raise
            except Exception as error:  # recorded as a row; the other sizes still run
                note = failure(error).replace("--rows", "--batches")
                results.write_traceback(path.parent, f"inference {case}")
            if note:
                found.append({"case": case, "provider": who, "ms": None, "note": note})
        found = typical(found)
        if config.nanochat:
            peer = found[-1]["ms"]
            for row in found:
                row["times_as_fast_as_peer"] = peer / row["ms"] if peer and row["ms"] else None
        for row in found:
            log.info("%s", results.as_line(row))
        rows += found
        results.save(path, rows, device, ceilings=vars(ceilings))
    plots.draw(path, plots.inference)
    log.info("written to %s", path)
    return rows


def turns(sides: dict[str, Callable], device: torch.device) -> list[tuple[str, Callable]]:
    """Whom to measure, in order: beside a peer on a CPU several times by turns, because its speed drifts."""
    return list(sides.items()) * (TURNS if len(sides) > 1 and device.type == "cpu" else 1)


def typical(rows: list[dict]) -> list[dict]:
    """The row with the median time of each provider, or its first one without a time."""
    found = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        failed = [row for row in own if row["ms"] is None]
        found.append(failed[0] if failed else sorted(own, key=lambda row: row["ms"])[len(own) // 2])
    return found


def without_zeros(model: nn.Module, width: int) -> nn.Module:
    """The model, with random numbers in parameters that are zero at initialisation: matmuls of zeros take
    less power and time.
    """
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(0, width**-0.5)
    return model


def measure_decoding(
    model: GPT, folder: Path, case: str, batch: int, prompt: int, limit: float, device: torch.device
) -> list[dict]:
    """Time the prefill of one prompt, and the engine's decoding step with `batch` greedy sequences of that
    length, from their last tokens to their next. On a GPU the engine's step is "hotlap in a graph"; "hotlap"
    runs the same step eagerly.

    folder: for the profile. limit: the seconds that reading what a step needs would take.
    """
    shape = model.config
    cache = KVCache(shape, batch, prompt + 1, model.compute_dtype, device)
    ids = torch.randint(shape.vocab_size, (1, prompt), device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    ids_before = torch.cat((ids[:, :1] * 0 - 1, ids[:, :-1]), dim=1)
    last_tokens = [Row(i % shape.vocab_size, 0, i, prompt) for i in range(batch)]
    greedy = [Draw(Sampling(temperature=0))] * batch
    flops = 2 * batch * parameter_counts(model)["matmul"]

    def prefill(_: int) -> None:
        cache.use(Span(first, first, prompt), previous=ids_before)
        model(ids, cache=cache, only=first - 1)

    def decode(_: int) -> None:
        with threads_for(flops):
            sample(decoder(last_tokens), greedy).tolist()

    for tensor in (*cache.k, *cache.v):
        tensor.normal_()
    rows = []
    for graph in (False, True) if device.type == "cuda" else (False,):
        decoder = Decoder(model, cache)
        decoder.captures = graph
        provider = "hotlap in a graph" if graph else "hotlap"
        row = measured(case, provider, prefill, decode, batch, limit, device)
        if graph != decoder.captures:  # the capture failed, which is logged
            break
        rows.append(row)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for i in range(PROFILED):
            decode(i)
    files.write(folder / f"inference-{batch}.txt", listed(kernel_times(profiler, on_gpu)))
    return rows


def measure_nanochat(
    path: Path, model: nn.Module, shape: GPTConfig, case: str, batch: int, prompt: int, limit: float, device
) -> list[dict]:
    """The same of nanochat's engine, against the same limit as ours."""
    prefill, decode = nanochat_decoding(path, model, batch, prompt)
    row = measured(case, "nanochat", prefill, decode, batch, limit, device)
    return [row | {"attention": nanochat_attention(path, shape)}]


def measured(
    case: str, provider: str, prefill: Callable, decode: Callable, batch: int, limit: float, device
) -> dict:
    timings = measure({"prefill": prefill, "decode": decode}, device, capture=False)
    step = timings["decode"]
    return {
        "case": case,
        "provider": provider,
        "first_token_ms": 1e3 * timings["prefill"].median,
        "ms": 1e3 * step.median,
        "ms_low": 1e3 * step.low,
        "ms_high": 1e3 * step.high,
        "tokens_per_second": batch / step.median,
        "limit_ms": 1e3 * limit,
        "share_of_bandwidth": limit / step.median,
    }


def decoding_bytes(model: GPT, batch: int, length: int) -> int:
    """Bytes that a decoding step must read: matmul weights in their stored dtype, which for inference is the
    compute dtype, and the keys and values in each layer's window.
    """
    counts, c = parameter_counts(model), model.config
    weights = (counts["matrices"] + counts["head"]) * model.head.weight.element_size()
    size = torch.empty((), dtype=model.compute_dtype).element_size()
    seen = sum(min(window, length + 1) for window in c.windows)
    return weights + batch * seen * 2 * c.kv_heads * c.head_dim * size


def main(config: InferenceConfig) -> None:
    """`hotlap bench inference`."""
    bench_inference(config)
