"""The shape of a GPT, the rule from its depth, and what it costs."""

import dataclasses

import pytest
from helpers.tools import tiny_config

from hotlap.model.config import ROPE_BASE, GPTConfig, counts_of
from hotlap.model.flops import (
    causal_flops,
    meta_model,
    nanochat_flops,
    parameter_counts,
    training_bytes,
)

# depth: matrices, head, value embeddings, FLOPs a token: what nanochat's code gives
NANOCHAT = {
    6: (10.6e6, 12.6e6, 37.7e6, 1.68e8),
    12: (84.9e6, 25.2e6, 151e6, 7.60e8),
    20: (393e6, 41.9e6, 419e6, 2.89e9),
    24: (680e6, 50.3e6, 604e6, 4.78e9),
}


@pytest.mark.parametrize("depth", NANOCHAT)
def test_a_depth_has_the_numbers_of_nanochat(depth):
    config = GPTConfig.from_depth(depth)
    model = meta_model(config)
    counts = parameter_counts(model)
    value_embeddings = sum(p.numel() for p in model.value_embeddings.parameters())
    found = (counts["matrices"], counts["head"], value_embeddings, nanochat_flops(model))
    assert found == pytest.approx(NANOCHAT[depth], rel=0.005)
    assert counts["total"] == sum(p.numel() for p in model.parameters())


def test_twelve_layers_are_the_defaults():
    assert GPTConfig.from_depth(12) == GPTConfig()
    assert GPTConfig().windows == (512, 512, 512, 2048) * 3
    assert (GPTConfig().qk_gain, GPTConfig().softcap, ROPE_BASE) == (1.2, 15.0, 100_000)
    assert GPTConfig.from_depth(6).windows == (512, 512, 512, 2048, 512, 2048)  # the last is always long
    assert GPTConfig().value_embedding_layers == (1, 3, 5, 7, 9, 11)
    five = GPTConfig.from_depth(5)
    assert five.width == 384 and five.value_embedding_layers == (0, 2, 4)


@pytest.mark.parametrize("T", [1, 100, 128, 300])
def test_causal_flops_count_the_keys_that_each_query_sees(T):
    config = tiny_config(context=300, layers=3, kv_heads=1, window_pattern="SL")
    model = meta_model(config)
    keys = sum(min(t + 1, window) for window in config.windows for t in range(T))
    products = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embedding" not in n)
    scores_and_values = (
        2 * 2 * config.heads * config.head_dim * keys / T
    )  # forward; backward takes twice that
    assert causal_flops(model, T) == round(6 * products + 3 * scores_and_values)
    assert nanochat_flops(model, T) >= causal_flops(model, T)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"layers": 5, "kv_heads": 1}, {"value_embeddings": False, "residual_scalars": False},
        {"bigram_rows": 77},
        {"smear": False, "backout": False, "layers": 1}, {"width": 32, "heads": 1, "kv_heads": 1},
    ],
)  # fmt: skip
def test_a_shape_alone_gives_the_numbers_of_parameters(fields):
    config = tiny_config(**fields)
    assert counts_of(config) == parameter_counts(meta_model(config))


def test_memory_grows_with_the_rows_only_in_activations():
    model = meta_model(tiny_config())
    one, two = training_bytes(model, 1, 64), training_bytes(model, 2, 64)
    assert two["activations"] == 2 * one["activations"]
    assert {k: v for k, v in one.items() if k != "activations"} == {
        k: v for k, v in two.items() if k != "activations"
    }
    assert one["parameters"] == 4 * parameter_counts(model)["total"]


def test_the_estimated_memory_is_near_what_an_h100_held():
    """bench/results/nvidia-h100-80gb-hbm3/training.json: d24, steps of several micro-batches of 8 rows, when
    blocks still kept two more tensors of their width."""
    parts = training_bytes(meta_model(GPTConfig.from_depth(24)), 8, 2048)
    assert sum(parts.values()) == pytest.approx(41.15e9, rel=0.05)


@pytest.mark.parametrize(
    "field, value",
    [
        ("vocab_size", 0), ("context", 0), ("layers", 0), ("width", 0), ("heads", 0), ("kv_heads", -1),
        ("width", 65), ("heads", 3), ("kv_heads", 3), ("heads", 64), ("window_pattern", ""),
        ("window_pattern", "SX"), ("softcap", -1.0), ("softcap", float("nan")), ("qk_gain", 0.0),
        ("qk_gain", float("inf")),
    ],
)  # fmt: skip
def test_a_field_that_cannot_work_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        tiny_config(**{field: value})


def test_the_dictionary_form_is_exact():
    config = tiny_config(window_pattern="L", softcap=0.0)
    fields = dataclasses.asdict(config)
    assert GPTConfig.from_dict(fields) == config
    with pytest.raises(ValueError, match="'dropout'"):
        GPTConfig.from_dict(fields | {"dropout": 0.1})
    del fields["qk_gain"], fields["document_masks"], fields["bigram_rows"]
    assert GPTConfig.from_dict(fields) == config, "older models have the default"
    del fields["smear"]
    with pytest.raises(ValueError, match="'smear' is missing"):
        GPTConfig.from_dict(fields)
