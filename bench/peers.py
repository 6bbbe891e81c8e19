"""`hotlap bench peers`: time training steps of nanoGPT, nanochat and modded-nanogpt, from your checkouts, and
ours in the same run. Nothing is written to the checkouts. race.py compares whole runs.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from hotlap.bench import modded, results
from hotlap.bench.cases import NO_TIME, Budget, failure, start_afresh
from hotlap.bench.config import PeersConfig
from hotlap.bench.models import ROWS, model_config
from hotlap.bench.peer_steps import Step, nanochat_attention, nanochat_step, nanogpt_step, shape_beside
from hotlap.bench.race import race
from hotlap.bench.training import made
from hotlap.common.log import log
from hotlap.common.machine import log_warnings
from hotlap.common.timing import Timing, measure
from hotlap.kernels.dispatch import default_device
from hotlap.kernels.fp8 import check_fp8
from hotlap.model.config import GPTConfig
from hotlap.model.flops import meta_model, mfu, nanochat_flops, peak_flops
from hotlap.train.data.rows import Batch
from hotlap.train.distributed.world import World
from hotlap.train.losses import next_token_loss
from hotlap.train.passes import Passes
from hotlap.train.step import take_step


def bench_peers(config: PeersConfig) -> list[dict]:
    """Measure every pair, write peers.json and .csv, and return the rows. With config.race, race instead."""
    config.validate()
    if config.race:
        if not config.nanogpt or config != PeersConfig(config.nanogpt, race=config.race, out=config.out):
            raise ValueError("--race needs --nanogpt PATH, and takes no other flag but --out")
        return race(config.nanogpt, config.race, config.out)
    paths = {n: getattr(config, n) for n in ("nanogpt", "nanochat", "modded") if getattr(config, n)}
    if not paths:
        raise ValueError("no peer; name a checkout with --nanogpt PATH, --nanochat PATH or --modded PATH")
    for name, path in paths.items():
        if not path.is_dir():
            raise FileNotFoundError(f"no checkout of {name} at {path}")
    device = default_device()
    scripts = modded.runnable(config.modded, device) if config.modded else {}
    peers = [name for name in ("nanogpt", "nanochat") if name in paths]
    if config.fp8:
        if not config.nanochat:
            raise ValueError("--fp8 needs --nanochat PATH; nanoGPT has no fp8")
        check_fp8(device)
        if config.nanogpt:
            log.warning("skipping nanoGPT: it has no fp8")
        peers = ["nanochat"]
    budget = Budget(config.minutes)
    names = config.models or (("124m", "d12", "d24") if device.type == "cuda" else ("tiny",))
    pairs = [
        (name, peer, shape_beside(peer, model_config(name), config.window_pattern))
        for name in names
        for peer in peers
    ]
    path = results.open_file("peers", config.out, device)
    log_warnings(device)
    rows: list[dict] = []
    for name, peer, shape in pairs:
        start_afresh(device)
        case = case_name(name, peer, shape, config)
        note = "" if budget.fits() else NO_TIME
        try:
            rows += [] if note else bench_pair(case, name, peer, shape, config, device)
        except (ImportError, FileNotFoundError):  # a checkout that no pair can use
            raise
        except Exception as error:  # such as out of memory; recorded as a row, and the other pairs still run
            note = failure(error)
            results.write_traceback(path.parent, case)
        if note:
            rows.append({"case": case, "provider": peer, "ms": None, "note": note})
            log.error("%s: %s", case, note)
        results.save(path, rows, device)
    for name, script in scripts.items():
        start_afresh(device)
        shape = model_config("124m")
        step = our_step(shape, ROWS["124m"], device)
        rows += modded.bench_script(name, script, modded.data_folder(config.modded), shape, step, device)
        results.save(path, rows, device)
    log.info("written to %s", path)
    return rows


def case_name(name: str, peer: str, shape: GPTConfig, config: PeersConfig) -> str:
    """Such as "step d24 4x8x2048 fp8 windows L beside nanochat"."""
    passes = f"{config.micro_batches}x" if config.micro_batches > 1 else ""
    case = f"step {name} {passes}{config.rows or ROWS[name]}x{shape.context}{' fp8' if config.fp8 else ''}"
    if config.window_pattern and peer == "nanochat":
        case += f" windows {shape.window_pattern}"
    return f"{case} beside {peer}"


def bench_pair(
    case: str, name: str, peer: str, shape: GPTConfig, config: PeersConfig, device: torch.device
) -> list[dict]:
    """Time our step and a peer's: in turns on a CPU, whose speed drifts; one after the other on a GPU, whose
    memory may not hold both.
    """
    rows = config.rows or ROWS[name]
    batch = config.micro_batches * rows
    if peer == "nanogpt":
        build, attention = partial(nanogpt_step, config.nanogpt), "SDPA"
    else:
        build = partial(nanochat_step, config.nanochat, fp8=config.fp8)
        attention = nanochat_attention(config.nanochat, shape)
    sides = {"hotlap": partial(our_step, fp8=config.fp8), peer: build}
    tokens = torch.randint(shape.vocab_size, (2, batch, shape.context + 1), device=device)
    timings: dict[str, Timing] = {}
    for group in [[side] for side in sides] if device.type == "cuda" else [list(sides)]:
        steps: dict[str, Step] = {who: sides[who](shape, rows, device) for who in group}
        timings |= measure(
            {who: (lambda i, step=step: step(tokens[i])) for who, step in steps.items()},
            device, sets=2, seconds=config.seconds, capture=False,
        )  # fmt: skip
        del steps
        start_afresh(device)
    model, peak = meta_model(shape), peak_flops(device)
    flops = nanochat_flops(model)
    found = []
    for who, timing in timings.items():
        speed = batch * shape.context / timing.median
        found.append(
            {
                "case": case,
                "provider": who,
                "ms": 1e3 * timing.median,
                "ms_low": 1e3 * timing.low,
                "ms_high": 1e3 * timing.high,
                "tokens_per_second": speed,
                "mfu_nanochat": mfu(flops, speed, peak),
                "times_as_fast_as_peer": timings[peer].median / timing.median,
                "windows": shape.window_pattern,
                "attention": attention if who == peer else "hotlap's, without document masks",
            }
        )
        if config.fp8 and who == "hotlap":
            found[-1]["fp8_layers"] = model.use_fp8()  # none in a small model, where fp8 would be slower
        log.info("%s", results.as_line(found[-1]))
    return found


def our_step(shape: GPTConfig, rows: int, device: torch.device, fp8: bool = False) -> Step:
    """Our training step, as the training loop takes it: passes of `rows` rows, the gradient norm, which the
    loop logs, and the optimizer; on a GPU compiled. But documents are not masked.

    On a CPU without `keep_freed_memory`, unlike training: the peer runs in the same process, and as its users
    run it.
    """
    world = World(0, 1, device, dist.HashStore())
    shape = dataclasses.replace(shape, document_masks=False)
    model, optimizer = made(shape, device.type == "cuda", fp8, world)
    passes = Passes(model, next_token_loss)

    def step(tokens: Tensor) -> None:
        micro = [
            Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), torch.zeros_like(part[:, :-1]), 0)
            for part in tokens.split(rows)
        ]
        take_step(passes, micro, tokens[:, 1:].numel(), 0.0, world)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(config: PeersConfig) -> None:
    """`hotlap bench peers`."""
    bench_peers(config)
