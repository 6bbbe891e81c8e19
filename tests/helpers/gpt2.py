"""Small GPT-2s: ours, and folders as Transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hotlap.model.config import GPT2Config
from hotlap.model.gpt2 import GPT2
from hotlap.model.gpt2_files import gpt2_fields, to_gpt2
from hotlap.model.tokenizer import Tokenizer

END = "<|endoftext|>"


def gpt2_config(**fields) -> GPT2Config:
    """2 layers, 64 wide, 2 heads of 32, context 64, a table of 320 ids."""
    shape = {"vocab_size": 320, "context": 64, "layers": 2, "width": 64, "heads": 2}
    return GPT2Config(**(shape | fields)).validate()


def random_gpt2(config: GPT2Config, dtype: torch.dtype = torch.float32) -> GPT2:
    """A model whose every weight is random, biases and norms too."""
    model = GPT2(config, dtype).init_weights(1).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.empty_like(parameter).normal_(0, 0.1, generator=generator)
    return model


def write_gpt2(folder: Path, tokenizer: Tokenizer) -> Path:
    """A GPT-2 of random weights as OpenAI's lies in a folder, with the text ids of a tokenizer and
    <|endoftext|>.
    """
    folder.mkdir()
    text = json.loads(tokenizer.definition)["model"]
    vocabulary = {t: i for t, i in text["vocab"].items() if i < tokenizer.text_size}
    model = random_gpt2(gpt2_config(vocab_size=tokenizer.text_size + 1))
    save_file(to_gpt2(model.state_dict()), folder / "model.safetensors")
    fields = gpt2_fields(model.config) | {"bos_token_id": tokenizer.text_size}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {END: tokenizer.text_size}))
    merges = [" ".join(merge) for merge in text["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder
