"""Models with adapters whose B is not zero, and the folders that hold them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from hotlap.model.adapter_files import save_lora, weights_sha256
from hotlap.model.config import GPTConfig
from hotlap.model.gpt import GPT
from hotlap.model.lora import LoRA, add_adapters, trained_weights
from hotlap.model.tokenizer import Tokenizer
from hotlap.model.weights import load_weights, save_description, save_model

RANK, ALPHA = 4, 12.0
PLAIN = {
    "value_embeddings": False,
    "residual_scalars": False,
    "smear": False,
    "backout": False,
    "softcap": 0.0,
    "window_pattern": "L",
    "heads": 2,
    "kv_heads": 1,
}  # what Transformers' Apertus has, too


def adapted(base: GPT, fresh: bool = False, dtype: torch.dtype = torch.float32, seed: int = 3) -> GPT:
    """A copy of a model with adapters; fresh ones, as training starts with, change nothing."""
    model = GPT(base.config, dtype)
    add_adapters(model, LoRA(RANK, ALPHA, (), None))
    model.init_weights(seed)
    model.load_state_dict(base.state_dict(), strict=False)
    if not fresh:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in trained_weights(model).values():
                tensor.normal_(0, 0.2, generator=generator)
    return model


def write_base(folder: Path, model: GPT, tokenizer: Tokenizer) -> Path:
    folder.mkdir(parents=True)
    save_model(folder, model, tokenizer)
    return folder


def write_adapted(folder: Path, base: Path, config: GPTConfig, tokenizer: Tokenizer, seed: int = 3) -> GPT:
    """Write a checkpoint's files of adapters, and return the model, whose base is not merged with them."""
    whole = GPT(config).init_weights()
    load_weights(whole, base)
    model = adapted(whole, seed=seed)
    folder.mkdir(parents=True)
    save_description(folder, config, tokenizer)
    save_lora(folder, LoRA(RANK, ALPHA, (base.resolve(),), weights_sha256([base])))
    save_file({k: v.contiguous() for k, v in trained_weights(model).items()}, folder / "model.safetensors")
    return model
