"""config.json of Transformers' Apertus and NanoChat: from our configuration, and back. Imports no torch."""

from __future__ import annotations

from typing import Any

from hotlap.common.errors import DataError
from hotlap.model.config import MLP_RATIO, ROPE_BASE, GPTConfig, Shape
from hotlap.model.foreign_config import OURS, check_fields, check_sizes, shown
from hotlap.model.gpt2_files import gpt2_fields

NORM_EPS = 1e-6  # of all our norms
CLASSES = {"apertus": "ApertusForCausalLM", "nanochat": "NanoChatForCausalLM", "gpt2": "GPT2LMHeadModel"}
ACTIVATIONS = {"apertus": "xielu", "nanochat": "relu2"}
DEFAULTS = {  # of fields that a file may leave out, by Transformers
    "apertus": {"rms_norm_eps": 1e-5},
    "nanochat": {"rms_norm_eps": NORM_EPS, "final_logit_softcapping": 15.0},
}
DEFAULT_ROPE: dict[str, dict] = {"apertus": {"rope_type": "llama3"}, "nanochat": {}}
ROPE = {"rope_type": "default", "rope_theta": ROPE_BASE}
NEEDED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
KNOWN = {"attention_dropout", "tie_word_embeddings", "num_key_value_heads", "rope_theta", *NEEDED}


def stock_config(config: Shape, kind: str) -> dict[str, Any]:
    """The fields of a class that say what a model of ours computes."""
    if kind == "gpt2":
        return gpt2_fields(config)
    fields: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": MLP_RATIO * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.context,
        "hidden_act": ACTIVATIONS[kind],
        "rms_norm_eps": NORM_EPS,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rope_parameters": ROPE,  # Apertus' default is another base, stretched as Llama 3's
        "rope_theta": ROPE_BASE,  # where Transformers before 5 looks
        "rope_scaling": None,
    }
    if kind == "nanochat":
        fields["final_logit_softcapping"] = config.softcap or None
    return fields


def our_config(fields: dict[str, Any], kind: str) -> GPTConfig:
    """The configuration of a model of ours that computes what these fields of a class say, but for qk_gain,
    which is among Apertus' weights. DataError names a field that our models do not have.
    """
    check_sizes(fields, NEEDED)
    fields = DEFAULTS[kind] | fields
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    held = {
        "hidden_act": (ACTIVATIONS[kind],),
        "rms_norm_eps": (NORM_EPS,),
        "intermediate_size": (MLP_RATIO * width,),
        "head_dim": (width / heads, None),
    }
    check_fields(fields, held, KNOWN | {"rope_parameters", "rope_scaling", *DEFAULTS[kind]})
    check_rope(fields, kind)
    softcap = fields.get("final_logit_softcapping") if kind == "nanochat" else None
    ours = fields.get(OURS)
    masks = ours.get("document_masks", True) if isinstance(ours, dict) else True
    try:
        return GPTConfig(
            vocab_size=fields["vocab_size"], context=fields["max_position_embeddings"],
            layers=fields["num_hidden_layers"], width=width, heads=heads,
            kv_heads=fields.get("num_key_value_heads") or heads, window_pattern="L", document_masks=masks,
            qk_gain=1.0, value_embeddings=False, residual_scalars=False, smear=False, backout=False,
            softcap=softcap or 0.0,
        ).validate()  # fmt: skip
    except ValueError as error:
        raise DataError(f"our models cannot have its shape: {error}") from None


def check_rope(fields: dict[str, Any], kind: str) -> None:
    """Raise DataError for other rotary positions than ours. As Transformers reads them, rope_scaling, where
    versions before 5 write, comes before rope_parameters.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    found = fields.get(name) or DEFAULT_ROPE[kind]
    if not isinstance(found, dict):
        raise DataError(f"{name}={shown(found)} must be an object")
    found = {"rope_theta": fields.get("rope_theta")} | found
    theta, scaling = found.get("rope_theta"), found.get("rope_type", found.get("type", "default"))
    if scaling != "default":
        raise DataError(f"rope_type={shown(scaling)} is not supported; our positions are not scaled")
    if theta != ROPE_BASE:
        raise DataError(f"rope_theta={shown(theta)} is not supported; it must be {ROPE_BASE:g}")
    if found.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise DataError(f"partial_rotary_factor={found['partial_rotary_factor']!r} is not supported")
