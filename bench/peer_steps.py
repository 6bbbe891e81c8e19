"""nanoGPT's and nanochat's models, training steps and decoding, as their own scripts build and run them.

They come from your checkouts, to which nothing is written.
"""
# B rows of a step, T tokens of a row

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
from torch import Tensor

from hotlap.model.config import GPTConfig

Step = Callable[[Tensor], None]  # trains on tokens (B, T + 1)


def shape_beside(peer: str, shape: GPTConfig, window_pattern: str = "") -> GPTConfig:
    """The shape that both sides have: with all of nanochat's extras, or without any beside nanoGPT.
    window_pattern: beside nanochat, in place of the shape's.
    """
    extra = peer == "nanochat"
    return dataclasses.replace(
        shape, value_embeddings=extra, residual_scalars=extra, smear=extra, backout=extra,
        softcap=15.0 if extra else 0.0,
        window_pattern=(window_pattern or shape.window_pattern) if extra else "L",
    ).validate()  # fmt: skip


def nanogpt_step(path: Path, shape: GPTConfig, rows: int, device: torch.device) -> Step:
    """nanoGPT's step as in its train.py: passes of `rows` rows, clipping and AdamW; on a GPU compiled, with
    bf16 autocast.
    """
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
        passes = tokens.split(rows)
        with tf32(device):
            for part in passes:
                with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                    _, loss = forward(part[:, :-1].contiguous(), part[:, 1:].contiguous())
                    loss = loss / len(passes)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def nanochat_step(path: Path, shape: GPTConfig, rows: int, device: torch.device, fp8: bool = False) -> Step:
    """nanochat's step as in its base_train.py: passes of `rows` rows, its own Muon and AdamW, the model
    compiled on a GPU. fp8: with its own fp8 layers, which its script has on a GPU only.
    """
    model = nanochat_model(path, shape, device)
    if fp8:
        convert = nanochat_module(path, "fp8").convert_to_float8_training
        convert(model, module_filter_fn=nanochat_uses_fp8)
    with contextlib.redirect_stdout(sys.stderr):
        optimizer = model.setup_optimizer()
    forward = torch.compile(model, dynamic=False) if device.type == "cuda" else model

    def step(tokens: Tensor) -> None:
        passes = tokens.split(rows)
        with tf32(device):
            for part in passes:
                loss = forward(part[:, :-1].contiguous(), part[:, 1:].contiguous())
                (loss / len(passes)).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
            loss.item()  # for its log, each step

    return step


def nanochat_model(path: Path, shape: GPTConfig, device: torch.device) -> nn.Module:
    """A nanochat model with its first weights: matrices in float32, embeddings in its compute dtype."""
    gpt = nanochat_module(path, "gpt")
    config = gpt.GPTConfig(
        sequence_len=shape.context, vocab_size=shape.vocab_size, n_layer=shape.layers, n_head=shape.heads,
        n_kv_head=shape.kv_heads, n_embd=shape.width, window_pattern=shape.window_pattern,
    )  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr), torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    return model


def nanochat_decoding(
    path: Path, model: nn.Module, batch: int, prompt: int
) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """What nanochat's engine does: a forward pass over one prompt, and a step that adds a token to each of
    `batch` sequences of that length, from their last tokens to their next, the most likely ones.
    """
    engine, c, device = nanochat_engine(path), model.config, model.get_device()

    def cache(rows: int, length: int):
        return engine.KVCache(
            batch_size=rows, seq_len=length, num_heads=c.n_kv_head, head_dim=c.n_embd // c.n_head,
            num_layers=c.n_layer, device=device, dtype=engine.COMPUTE_DTYPE,
        )  # fmt: skip

    ids = torch.randint(c.vocab_size, (1, prompt), device=device)
    full = cache(batch, prompt + 1)
    full.k_cache.normal_()
    full.v_cache.normal_()
    full.prev_embedding = torch.zeros(batch, 1, c.n_embd, dtype=engine.COMPUTE_DTYPE, device=device)
    last_tokens = [i % c.vocab_size for i in range(batch)]

    def prefill(_: int) -> None:
        model(ids, kv_cache=cache(1, prompt))[:, -1, :]

    def decode(_: int) -> None:
        full.cache_seqlens.fill_(prompt)
        tokens = torch.tensor(last_tokens, dtype=torch.long, device=device).unsqueeze(1)  # (B, 1)
        logits = model(tokens, kv_cache=full)[:, -1, :]  # (B, V)
        engine.sample_next_token(logits, None, temperature=0.0)[:, 0].tolist()

    return prefill, decode


def nanochat_engine(path: Path) -> ModuleType:
    """nanochat's engine.py, without what it imports to read checkpoints when it is run as a script: that
    needs its tokenizers' packages.
    """
    name = "nanochat.checkpoint_manager"
    nothing = ModuleType(name)
    nothing.load_model = None
    found = sys.modules.setdefault(name, nothing)
    try:
        return nanochat_module(path, "engine")
    finally:
        if found is nothing:
            del sys.modules[name]


def nanochat_uses_fp8(module: nn.Module, name: str) -> bool:
    """Whether base_train.py converts a layer to fp8: if its sizes are multiples of 16, and at least 128."""
    if not isinstance(module, nn.Linear):
        return False
    sizes = module.in_features, module.out_features
    return all(size % 16 == 0 for size in sizes) and min(sizes) >= 128


def nanochat_attention(path: Path, shape: GPTConfig) -> str:
    """Which attention nanochat uses for whole rows. It chooses when it is imported."""
    if nanochat_module(path, "flash_attention").USE_FA3:
        return "FlashAttention 3"
    masked = any(window < shape.context for window in shape.windows)
    return "SDPA, with a mask in layers with a window" if masked else "SDPA"


def nanochat_module(path: Path, name: str) -> ModuleType:
    """Import a module of nanochat's package."""
    sys.path.insert(0, str(path))
    try:
        with nothing_written():
            return importlib.import_module(f"nanochat.{name}")
    except ImportError as error:
        raise ImportError(
            f"nanochat at {path} cannot be imported ({error}); install its requirements"
        ) from error
    finally:
        sys.path.remove(str(path))


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


@contextlib.contextmanager
def tf32(device: torch.device):
    """On a GPU, let float32 matmuls use TF32, as both scripts do; what runs beside them is not affected."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
