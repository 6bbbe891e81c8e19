"""`hotlap export gguf`: write a model as one file for llama.cpp and what is built on it.

llama.cpp's architecture `apertus` computes what a model of ours without extras does. Tensors are converted
and written one after the other, so that the file never is in memory as a whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hotlap.common.files import replacing
from hotlap.common.terminal import printable
from hotlap.kernels.rms_norm import EPS
from hotlap.model.chat_template import chat_template
from hotlap.model.config import MLP_RATIO, ROPE_BASE, GGUFExportConfig, GPT2Config, GPTConfig, Shape
from hotlap.model.export_hf import special_ids
from hotlap.model.stock import EMBEDDING, HEAD, XIELU, extras_of, stock_tensors
from hotlap.model.tokenizer import GPT2_PATTERN, SPLIT_PATTERN, Tokenizer, byte_level_alphabet
from hotlap.model.weights import load_model, model_name, open_model, stage

if TYPE_CHECKING:
    from gguf import GGUFWriter

PRE_TOKENIZERS = {SPLIT_PATTERN: "llama-bpe", GPT2_PATTERN: "gpt-2"}  # by what they split text at
LARGEST_F16 = 65504
Q8_BLOCK = 32  # weights that share a scale


def export_gguf(config: GGUFExportConfig) -> Path:
    """Write a model, with its adapters merged, as a GGUF file, and return its path.

    ValueError names what llama.cpp cannot hold.
    """
    gguf = imported()
    if os.path.lexists(config.out):  # a link to nothing, too
        raise FileExistsError(f"{config.out} exists already; name a new file with --out")
    folder, shape, tokenizer = open_model(config.model)
    check(config, shape, tokenizer)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    model, _ = load_model(folder, torch.device("cpu"), torch.float32)
    with replacing(config.out) as part:
        writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.APERTUS])
        try:
            writer.add_name(model_name(folder))
            add_shape(writer, shape, tokenizer.vocab_size)
            add_tokenizer(writer, tokenizer, chat=stage(folder) != "pretrain")
            write_tensors(writer, model.state_dict(), shape, tokenizer.vocab_size, config.dtype)
        except OSError as error:
            if error.errno is None:  # numpy's, such as on a full disk, which says nothing else
                raise OSError(f"cannot write {config.out}: {error}; is the disk full?") from error
            raise
        finally:
            writer.close()
    return config.out


def imported() -> ModuleType:
    """gguf-py, or an ImportError that names the extra."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"this export needs the package {error.name}: pip install 'hotlap[export]'"
        ) from error
    return gguf


def check(config: GGUFExportConfig, shape: Shape, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a model that llama.cpp cannot hold."""
    if isinstance(shape, GPT2Config):
        raise ValueError(
            f"{config.model} is a GPT-2, which this export does not write; `hotlap export hf` does, for "
            "Transformers"
        )
    if extras := extras_of(shape) + (["softcap"] if shape.softcap else []):
        values = ", ".join(f"{name}={getattr(shape, name)!r}" for name in extras)
        raise ValueError(
            f"{config.model}: llama.cpp has no architecture with {values}; pretrain a model without, for "
            "example with --preset tiny-portable"
        )
    if not tokenizer.is_bpe:
        raise ValueError(
            f"{config.model} reads single characters, which llama.cpp cannot; train with --tokenizer bpe"
        )
    model, pattern = described(tokenizer)
    if pattern not in PRE_TOKENIZERS:
        raise ValueError(
            f"{config.model} splits text by {pattern!r}, which llama.cpp does not know; train with a "
            "tokenizer of `hotlap tokenizer`, or gpt2"
        )
    if not model["merges"]:
        raise ValueError(
            f"{config.model} reads single bytes, and llama.cpp needs merges; train with a larger vocabulary"
        )
    if config.dtype == "q8_0" and shape.width % Q8_BLOCK:
        raise ValueError(
            f"dtype=q8_0 stores blocks of {Q8_BLOCK} weights, and the model's width={shape.width} is no "
            "multiple of that; use f16"
        )


def described(tokenizer: Tokenizer) -> tuple[dict, str]:
    """The vocabulary and merges of a byte-level BPE, and the pattern that splits text before."""
    fields = json.loads(tokenizer.definition)
    return fields["model"], fields["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


def add_shape(writer: GGUFWriter, shape: GPTConfig, rows: int) -> None:
    """What llama.cpp builds the model from. rows: of the tables."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_vocab_size(rows)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(MLP_RATIO * shape.width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPS)
    for name, value in XIELU.items():
        getattr(writer, f"add_xielu_{name}")([value] * shape.layers)


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, chat: bool) -> None:
    """Tokens and merges, and where texts and answers begin and end. chat: with a chat template."""
    import gguf

    model, pattern = described(tokenizer)
    character_of = byte_level_alphabet()
    text = [tokenizer.token_bytes(i) for i in range(tokenizer.text_size)]
    special = sorted(tokenizer.special, key=tokenizer.special.__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[pattern])
    writer.add_token_list(["".join(character_of[byte] for byte in token) for token in text] + special)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(text) + [gguf.TokenType.CONTROL] * len(special))
    writer.add_token_merges(merges)
    ids = special_ids(tokenizer)
    writer.add_bos_token_id(ids["bos_token_id"])
    writer.add_eos_token_id(ids["eos_token_id"])
    writer.add_pad_token_id(ids["pad_token_id"])
    # These end an answer as well: a new document, as in our engine, and a call, for nobody answers it there.
    writer.add_eot_token_id(tokenizer.bos)
    writer.add_eom_token_id(tokenizer.special["<|tool_end|>"])
    writer.add_add_bos_token(True)
    if chat:
        writer.add_chat_template(chat_template(tokenizer))


def write_tensors(
    writer: GGUFWriter, weights: dict[str, Tensor], shape: GPTConfig, rows: int, dtype: str
) -> None:
    """Write the file, after all keys have been added. rows: of the tables; a model's further rows belong to
    no token, and our engine never samples them either.
    """
    import gguf

    kinds = [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType[dtype.upper()]]  # vectors, matrices
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in named(weights, shape, rows):  # shapes come first in the file
        kind = kinds[tensor.ndim - 1]
        stored = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in named(weights, shape, rows):
        if dtype == "f16" and tensor.abs().max() > LARGEST_F16:
            raise ValueError(f"dtype=f16 ends at {LARGEST_F16}, and {name} has larger weights; use bf16")
        writer.write_tensor_data(gguf.quantize(tensor.numpy(), kinds[tensor.ndim - 1]))


def named(weights: dict[str, Tensor], shape: GPTConfig, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Apertus's tensors by llama.cpp's names. Those of its activation are keys (`add_shape`)."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.APERTUS, shape.layers)
    for theirs, tensor in stock_tensors(weights, shape, "apertus"):
        if name := names.get_name(theirs, (".weight",)):
            yield name, tensor[:rows] if theirs in (EMBEDDING, HEAD) else tensor


def main(config: GGUFExportConfig) -> None:
    """`hotlap export gguf`."""
    print(printable(str(export_gguf(config))))
