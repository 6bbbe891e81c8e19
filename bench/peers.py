"""`hotlap bench peers`: time training steps of nanoGPT, nanochat and modded-nanogpt, from your checkouts, and
ours in the same run. Nothing is written to the checkouts. race.py compares whole runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from hotlap.bench import modded, results
from hotlap.bench.models import ROWS, model_config
from hotlap.bench.race import race
from hotlap.bench.timing import failure, measure, start_afresh
from hotlap.common import options
from hotlap.common.log import log
from hotlap.common.machine import log_warnings
from hotlap.kernels.dispatch import default_device, fast_dtype
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.train.optim.muon_adamw import MuonAdamW, OptimConfig

Step = Callable[[Tensor], None]  # trains on tokens (B, T + 1)


@dataclass(frozen=True)
class PeersConfig:
    """Time a whole training step (forward, backward, optimizer) of peers and of hotlap at the same shape and
    batch. Or, with --race, whole runs of nanoGPT's recipe for a CPU and of ours.
    """

    nanogpt: Path | None = None
    """Your checkout of nanoGPT."""
    nanochat: Path | None = None
    """Your checkout of nanochat; its requirements must be installed."""
    modded: Path | None = None
    """Your checkout of modded-nanogpt, with its data; it is compared with our 124m, at its scripts' batch."""
    race: str = ""
    """Train on this text with nanoGPT's recipe and ours, in turns: a file, or shakespeare (downloaded)."""
    models: tuple[str, ...] = ()
    """Any of tiny, 124m, d12, d20 and d24; the default is tiny on a CPU; 124m, d12 and d24 on a GPU."""
    rows: int = 0
    """Rows per step; 0: a usual number for the model."""
    seconds: float = 5.0
    """Measuring time of each step."""
    out: Path | None = None
    """Folder for the results; bench/results/DEVICE by default."""


def bench_peers(config: PeersConfig) -> list[dict]:
    """Measure every pair, write peers.json and .csv, and return the rows. With config.race, race instead."""
    if config.race:
        if not config.nanogpt or config != PeersConfig(config.nanogpt, race=config.race, out=config.out):
            raise ValueError("--race needs --nanogpt PATH, and takes no other flag but --out")
        return race(config.nanogpt, config.race, config.out)
    builders = {"nanogpt": nanogpt_step, "nanochat": nanochat_step}
    paths = {name: getattr(config, name) for name in (*builders, "modded") if getattr(config, name)}
    if not paths:
        raise ValueError("no peer; name a checkout with --nanogpt PATH, --nanochat PATH or --modded PATH")
    for name, path in paths.items():
        if not path.is_dir():
            raise FileNotFoundError(f"no checkout of {name} at {path}")
    device = default_device()
    scripts = modded.runnable(config.modded, device) if config.modded else {}
    if not config.seconds > 0 or config.rows < 0:
        raise ValueError(f"seconds={config.seconds} must be positive and rows={config.rows} 0 or more")
    names = config.models or (("124m", "d12", "d24") if device.type == "cuda" else ("tiny",))
    shapes = {name: model_config(name) for name in names}
    path = results.open_file("peers", config.out, device)
    log_warnings(device)
    rows: list[dict] = []
    for name, shape in shapes.items():
        for peer in [peer for peer in builders if peer in paths]:
            start_afresh(device)
            try:
                rows += bench_pair(name, shape, peer, builders[peer], paths[peer], config, device)
            except RuntimeError as error:  # such as out of memory; the other pairs still run
                case, note = f"step {name} beside {peer}", failure(error)
                rows.append({"case": case, "provider": peer, "ms": None, "note": note})
                log.error("%s: %s", case, note)
                results.write_traceback(path.parent, case)
            results.save(path, rows, device)
    for name, script in scripts.items():
        start_afresh(device)
        shape = model_config("124m")
        step = our_step(shape, device, micro_rows=ROWS["124m"])
        rows += modded.bench_script(name, script, modded.data_folder(config.modded), shape, step, device)
        results.save(path, rows, device)
    log.info("written to %s", path)
    return rows


def bench_pair(
    name: str, shape: GPTConfig, peer: str, build: Callable, path: Path, config: PeersConfig, device
) -> list[dict]:
    """Time our step and a peer's, interleaved. Beside nanoGPT, our model is a plain GPT without the speedrun
    extras.
    """
    if peer == "nanogpt":
        shape = dataclasses.replace(
            shape, window_pattern="L", value_embeddings=False, residual_scalars=False, smear=False,
            backout=False, softcap=0.0,
        )  # fmt: skip
    count = config.rows or ROWS[name]
    tokens = torch.randint(shape.vocab_size, (2, count, shape.context + 1), device=device)
    steps: dict[str, Step] = {"hotlap": our_step(shape, device), peer: build(path, shape, device)}
    timings = measure(
        {who: (lambda i, step=step: step(tokens[i])) for who, step in steps.items()},
        device, sets=2, seconds=config.seconds, capture=False,
    )  # fmt: skip
    rows = []
    for who, timing in timings.items():
        rows.append(
            {
                "case": f"step {name} {count}x{shape.context} beside {peer}",
                "provider": who,
                "ms": 1e3 * timing.median,
                "ms_low": 1e3 * timing.low,
                "ms_high": 1e3 * timing.high,
                "tokens_per_second": count * shape.context / timing.median,
                "times_as_fast_as_peer": timings[peer].median / timing.median,
            }
        )
        log.info("%s", results.as_line(rows[-1]))
    return rows


def our_step(shape: GPTConfig, device, micro_rows: int = 0) -> Step:
    """Our training step. micro_rows: rows per forward pass; 0 is all.

    On a CPU without `keep_freed_memory`, unlike training: the peer runs in the same process, and as its users
    run it.
    """
    with torch.device("meta"):
        model = GPT(shape, fast_dtype(device.type, shape.width))
    model.to_empty(device=device).init_weights()
    optimizer = MuonAdamW(model, OptimConfig())
    if device.type == "cuda":
        for block in model.blocks:
            block.compile(dynamic=False)

    def step(tokens: Tensor) -> None:
        for rows in tokens.split(micro_rows or len(tokens)):
            (model(rows[:, :-1], rows[:, 1:].contiguous()) / tokens[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def nanogpt_step(path: Path, shape: GPTConfig, device) -> Step:
    """nanoGPT's step as in its train.py: AdamW, clipping, and on a GPU compiled, with bf16 autocast."""
    module = module_at("nanogpt_model", path / "model.py")
    config = module.GPTConfig(
        block_size=shape.context, vocab_size=shape.vocab_size, n_layer=shape.layers, n_head=shape.heads,
        n_embd=shape.width, dropout=0.0, bias=False,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        model = module.GPT(config).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    on_gpu = device.type == "cuda"
    forward = torch.compile(model) if on_gpu else model

    def step(tokens: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            _, loss = forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def nanochat_step(path: Path, shape: GPTConfig, device) -> Step:
    """nanochat's step as in its base_train.py: its own Muon and AdamW, the model compiled on a GPU."""
    sys.path.insert(0, str(path))
    try:
        with nothing_written():
            from nanochat import gpt
    except ImportError as error:
        raise ImportError(
            f"nanochat at {path} cannot be imported ({error}); install its requirements"
        ) from error
    finally:
        sys.path.remove(str(path))
    config = gpt.GPTConfig(
        sequence_len=shape.context, vocab_size=shape.vocab_size, n_layer=shape.layers, n_head=shape.heads,
        n_kv_head=shape.kv_heads, n_embd=shape.width, window_pattern=shape.window_pattern,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        with torch.device("meta"):
            model = gpt.GPT(config)
        model.to_empty(device=device)
        model.init_weights()
        optimizer = model.setup_optimizer()
    forward = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    def step(tokens: Tensor) -> None:
        forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def module_at(name: str, path: Path) -> ModuleType:
    """Import a file as a module called `name`."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; is that a checkout of the peer?")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with nothing_written():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def nothing_written():
    """Import without writing bytecode into the checkout."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def main(arguments: list[str]) -> None:
    """`hotlap bench peers`."""
    bench_peers(options.parse(PeersConfig, arguments, command="bench peers"))
