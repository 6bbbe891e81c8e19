"""OpenAI's GPT-2 as Transformers stores it: config.json and weights, as ours and back. Imports no torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hotlap.common.errors import DataError
from hotlap.model.config import MLP_RATIO, GPT2Config
from hotlap.model.foreign_config import OURS, check_fields, check_sizes

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "transformer."  # of all names; files of OpenAI's own models lack it
TABLES = {"embedding": "wte", "positions": "wpe", "norm": "ln_f"}
LAYERS = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.proj": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.fc": "mlp.c_fc",
    "mlp.proj": "mlp.c_proj",
}
MASK = re.compile(r"(?:transformer\.)?h\.\d+\.attn\.(?:masked_)?bias")  # stored by old versions: constants
NEEDED = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
NORM_EPS = 1e-5
KNOWN = {
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "task_specific_params", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "reorder_and_upcast_attn", "output_past", *NEEDED,
}  # fmt: skip


def gpt2_shape(fields: dict[str, Any]) -> GPT2Config:
    """Our configuration for a config.json. DataError names a field that our GPT-2 does not have."""
    check_sizes(fields, NEEDED)
    held = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (NORM_EPS,),
        "n_inner": (None, MLP_RATIO * fields["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    check_fields(fields, held, KNOWN)
    ours = fields.get(OURS)
    masks = ours.get("document_masks", True) if isinstance(ours, dict) else True
    try:
        return GPT2Config(
            vocab_size=fields["vocab_size"], context=fields["n_positions"], layers=fields["n_layer"],
            width=fields["n_embd"], heads=fields["n_head"], document_masks=masks,
        ).validate()  # fmt: skip
    except ValueError as error:
        raise DataError(f"our GPT-2 cannot have its shape: {error}") from None


def gpt2_fields(config: GPT2Config) -> dict[str, Any]:
    """The fields of config.json that say what a GPT-2 of ours computes."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": NORM_EPS,
        "tie_word_embeddings": True,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def their_name(name: str) -> str:
    """What Transformers calls a tensor of ours."""
    layer, _, leaf = name.rpartition(".")
    if not layer.startswith("blocks."):
        return f"{PREFIX}{TABLES[layer]}.{leaf}"
    _, number, layer = layer.split(".", 2)
    return f"{PREFIX}h.{number}.{LAYERS[layer]}.{leaf}"


def is_turned(name: str) -> bool:
    """Whether Transformers stores this tensor of ours transposed: the matrices of the blocks."""
    return name.startswith("blocks.") and name.endswith((".qkv.weight", ".proj.weight", ".fc.weight"))


def to_gpt2(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A whole model's weights by Transformers' names. Nothing shares memory with them."""
    return {
        their_name(name): tensor.T.contiguous() if is_turned(name) else tensor.clone()
        for name, tensor in weights.items()
    }


def from_gpt2(theirs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The inverse of `to_gpt2`. names: of our weights."""
    found = {name: theirs[their_name(name)] for name in names}
    return {name: tensor.T.contiguous() if is_turned(name) else tensor for name, tensor in found.items()}
