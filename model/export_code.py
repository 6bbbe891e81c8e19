"""A model as our own class for Transformers (modeling_hotlap.py), which holds what no stock class does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from hotlap.common.errors import DataError
from hotlap.common.files import write
from hotlap.model.config import MLP_RATIO, ROPE_BASE, GPTConfig
from hotlap.model.foreign_config import OURS, shown
from hotlap.model.stock_config import NORM_EPS

OWN_CLASS = "hotlap"  # the model_type
CODE = Path(__file__).with_name("modeling_hotlap.py")
NAMES = {  # of our fields, by the names that Transformers expects
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "context",
    "qk_gain": "qk_gain",
    "bigram_rows": "bigram_rows",
    "value_embeddings": "value_embeddings",
    "residual_scalars": "residual_scalars",
    "smear": "smear",
    "backout": "backout",
}


def code_config(config: GPTConfig) -> dict[str, Any]:
    """The fields of the class that say what a model of ours computes."""
    short = [window < config.context for window in config.windows]
    return {
        "architectures": ["HotlapForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_hotlap.HotlapConfig",
            "AutoModel": "modeling_hotlap.HotlapModel",
            "AutoModelForCausalLM": "modeling_hotlap.HotlapForCausalLM",
        },
        "model_type": OWN_CLASS,
        **{name: getattr(config, ours) for name, ours in NAMES.items()},
        "head_dim": config.head_dim,
        "intermediate_size": MLP_RATIO * config.width,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in short],
        "sliding_window": config.short_window if any(short) else None,
        "final_logit_softcapping": config.softcap or None,  # other engines divide by a 0
        "rope_theta": ROPE_BASE,
        "rms_norm_eps": NORM_EPS,
        "tie_word_embeddings": False,
    }


def config_of(fields: dict[str, Any]) -> GPTConfig:
    """The inverse of `code_config`, with what an export says for us alone. DataError names a field that our
    models do not have.
    """
    kept = fields.get(OURS)
    kept = kept if isinstance(kept, dict) else {}
    try:
        config = GPTConfig(
            **{ours: fields[name] for name, ours in NAMES.items()},
            softcap=fields["final_logit_softcapping"] or 0.0,
            window_pattern=kept.get("window_pattern", "L"),
            document_masks=kept.get("document_masks", True),
        ).validate()
    except KeyError as error:
        raise DataError(f"{error.args[0]} is missing") from None
    except ValueError as error:
        raise DataError(f"our models cannot have its shape: {error}") from None
    types = fields.get("layer_types")
    if not isinstance(types, list) or len(types) != config.layers:  # before a list of as many is made
        raise DataError(f"layer_types={shown(types)} must have num_hidden_layers={config.layers} kinds")
    for name, value in code_config(config).items():
        if name not in ("architectures", "auto_map") and fields.get(name) != value:
            raise DataError(f"{name}={shown(fields.get(name))} is not supported; it must be {shown(value)}")
    return config


def code_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights by their names in the class: ours after "model.", but for the head."""
    return {
        "lm_head.weight" if name == "head.weight" else f"model.{name}": tensor
        for name, tensor in weights.items()
    }


def our_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `code_weights`."""
    return {
        "head.weight" if name == "lm_head.weight" else name.removeprefix("model."): tensor
        for name, tensor in weights.items()
    }


def write_code(folder: Path) -> None:
    """Put the class beside a model's weights."""
    write(folder / CODE.name, CODE.read_text(encoding="utf-8"))
