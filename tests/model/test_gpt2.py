"""GPT-2: what it computes, with a cache, documents and adapters. test_gpt2_files.py compares with others'."""

import pytest
import torch
from helpers.cached import cached_logits
from helpers.gpt2 import gpt2_config, random_gpt2
from helpers.tools import relative_error

from hotlap.model.adapter_files import merge
from hotlap.model.build import build
from hotlap.model.config import GPT2Config, counts_of, rotary_bytes, shape_from
from hotlap.model.flops import causal_flops, meta_model, nanochat_flops, parameter_counts, training_bytes
from hotlap.model.gpt import GPT
from hotlap.model.kv_cache import KVCache
from hotlap.model.lora import LoRA, add_adapters, base_weights, trained_weights

IDS = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return random_gpt2(gpt2_config())


def test_a_token_depends_on_those_before_it_and_on_its_place(model):
    changed = IDS.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 320
    with torch.no_grad():
        differs = (model(changed) - model(IDS)).abs().amax((0, 2)) > 1e-4
        assert differs.tolist() == [False] * 20 + [True] * 20
        same = model(torch.full((1, 2), 7))[0]
        assert (same[0] - same[1]).abs().max() > 1e-2


def test_a_cache_gives_the_logits_of_the_whole_sequence(model):
    cache = KVCache(model.config, 3, 64, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        whole = model(IDS)
        read = cached_logits(model, cache, IDS, [2, 0], [0, 0], 30)
        steps = [cached_logits(model, cache, IDS, [2, 0], [t, t], 1) for t in range(30, 40)]
    torch.testing.assert_close(torch.cat([read, *steps], dim=1), whole, rtol=1e-5, atol=1e-5)


def test_masked_documents_are_what_each_is_alone():
    masked = random_gpt2(gpt2_config(document_masks=True))
    starts = torch.tensor([0] * 15 + [15] * 25).expand(2, -1)
    with torch.no_grad():
        packed = masked(IDS, document_start=starts)
        torch.testing.assert_close(packed[:, :15], masked(IDS[:, :15]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed[:, 15:], masked(IDS[:, 15:]), rtol=1e-5, atol=1e-5)
        plain = random_gpt2(gpt2_config())
        assert torch.equal(plain(IDS, document_start=starts), plain(IDS))


def test_the_loss_is_that_of_the_logits_and_the_head_is_the_embedding(model):
    loss = model(IDS, IDS, reduction="mean")
    expected = torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    torch.testing.assert_close(loss, expected)
    assert model.head is model.embedding and not any("head" in name for name in model.state_dict())


@pytest.mark.parametrize("fields", [{}, {"layers": 1, "width": 128, "heads": 4, "vocab_size": 64}])
def test_a_shape_alone_gives_the_numbers_of_parameters(fields):
    config = gpt2_config(**fields)
    assert counts_of(config) == parameter_counts(meta_model(config))
    assert rotary_bytes(config) == 0 == len(list(build(config).buffers()))


def test_the_default_is_openai_s_smallest_model_with_a_few_more_rows():
    assert counts_of(GPT2Config())["total"] == 124_439_808 + (50304 - 50257) * 768


def test_flops_count_the_head_once_and_full_windows():
    config = gpt2_config()
    model = meta_model(config)
    weights = 2 * 12 * 64**2 + 320 * 64
    assert nanochat_flops(model) == 6 * weights + 2 * 12 * 64 * 64
    assert causal_flops(model) == 6 * weights + 12 * 64 * (64 + 1)
    assert training_bytes(model, 1, 64)["optimizer"] == 8 * counts_of(config)["total"], "AdamW's alone"


def test_first_weights_are_gpt_2_s():
    model = build(gpt2_config(layers=8, width=128, heads=4)).init_weights(0)
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight.ndim == 2:
            scale = 0.02 / 4 if name.endswith("proj.weight") else 0.02
            assert weight.std().item() == pytest.approx(scale, rel=0.1), name
        else:
            assert (weight == (1.0 if "norm.weight" in name else 0.0)).all(), name
    again = build(model.config).init_weights(0)
    assert all(torch.equal(weights[name], parameter) for name, parameter in again.named_parameters())


def test_config_json_tells_the_kinds_apart():
    config = gpt2_config(document_masks=True)
    fields = {
        "architecture": "gpt2", "vocab_size": 320, "context": 64, "layers": 2, "width": 64, "heads": 2,
        "document_masks": True,
    }  # fmt: skip
    assert shape_from(fields) == config and type(build(config)) is not GPT
    for bad, text in (
        (fields | {"architecture": "gpt3"}, "architecture='gpt3'"),
        (fields | {"kv_heads": 1}, "'kv_heads'"),
        ({k: v for k, v in fields.items() if k != "heads"}, "'heads' is missing"),
        (fields | {"heads": 3}, "heads=3"),
        (fields | {"context": True}, "context=True"),
    ):
        with pytest.raises(ValueError, match=text):
            shape_from(bad)


def test_merged_adapters_compute_the_same(model, monkeypatch):
    from hotlap.model import adapter_files

    adapted = random_gpt2(model.config)
    add_adapters(adapted, LoRA(4, 12.0, (), None))
    for name, parameter in adapted.named_parameters():
        if ".adapter." in name:
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    whole = build(model.config).init_weights()
    whole.load_state_dict(base_weights(adapted))
    monkeypatch.setattr(adapter_files, "read_adapters", lambda *_: trained_weights(adapted))
    monkeypatch.setattr(adapter_files, "read_lora", lambda _: adapted.lora)
    merge(whole, None)
    with torch.no_grad():
        assert relative_error(adapted(IDS), whole(IDS).double()) < 1e-5
        assert relative_error(adapted(IDS), model(IDS).double()) > 1e-2


def test_int8_and_bfloat16_stay_near(model):
    with torch.no_grad():
        exact = model(IDS).double()
        rounded = random_gpt2(model.config).for_inference().quantize()
        low = random_gpt2(model.config, torch.bfloat16)
        before = low(IDS)
        assert torch.equal(low.for_inference()(IDS), before)
        assert relative_error(rounded(IDS), exact) < 0.02
        assert relative_error(before, exact) < 0.02
        assert rounded.embedding.weight.dtype == torch.float32, "whose rows are embeddings too"
